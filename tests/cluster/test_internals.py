"""What the rooms use of Ray and vLLM beneath their public interfaces is there in the versions that are installed."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILES = {"ray": "cluster/ray_internals.py", "vllm": "cluster/vllm_internals.py"}

# Of what attends by head.
BACKEND = ("get_builder_cls", "get_impl_cls", "supported_kv_cache_layouts")
IMPL = ("alibi_slopes", "do_kv_cache_update", "forward", "num_heads", "num_kv_heads", "sinks")
METADATA = ("block_table", "max_seq_len", "num_actual_tokens", "query_start_loc", "scheduler_metadata", "seq_lens")

# Methods that are called or overridden and attributes that are read or set, by the class that has them.
NAMES = {
    "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter": (
        "initialize_state",
        "update_replicas",
        "choose_replicas",
        "on_replica_actor_died",
        "on_send_request",
        "on_request_completed",
        "_choose_replica_for_request",
        "_event_loop",
        "_fulfill_next_pending_request",
        "_pending_requests_to_fulfill",
        "_probe_queue_lens",
        "_record_queue_wait_time",
        "_remove_pending_request_from_indices",
        "_replica_queue_len_cache",
        "_replicas",
        "_select_from_candidate_replicas",
    ),
    "ray.serve.request_router:PendingRequest": ("future", "metadata", "routing_context"),
    "ray.serve.request_router:RunningReplica": (
        "max_ongoing_requests",
        "replica_id",
        "replica_metadata",
        "routing_stats",
    ),
    "ray.serve._private.request_router.common:RequestRoutingContext": ("should_backoff",),
    "ray.serve._private.common:RequestMetadata": ("session_id",),
    "ray._private.node:Node": ("start_log_monitor", "start_monitor"),
    "ray.serve.llm.deployment:LLMServer": ("_start_engine", "engine"),
    "ray.serve.llm:LLMConfig": ("accelerator_config", "get_engine_config", "get_or_create_callback"),
    "ray.llm._internal.common.callbacks.base:CallbackCtx": ("run_init_node",),
    "ray.llm._internal.serve.engines.vllm.vllm_models:VLLMEngineConfig": ("actual_hf_model_id",),
    "ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine": (
        "_engine_client",
        "_start_async_llm_engine",
        "llm_config",
        "shutdown",
        "start",
    ),
    "vllm.v1.engine.async_llm:AsyncLLM": (
        "collective_rpc",
        "engine_core",
        "errored",
        "generate",
        "get_num_unfinished_requests",
        "get_tokenizer",
        "shutdown",
        "vllm_config",
    ),
    "vllm.v1.engine.core_client:AsyncMPClient": ("call_utility_async",),
    "vllm.v1.engine.core:EngineCoreProc": ("has_work",),
    "vllm.config:VllmConfig": ("cache_config", "kv_transfer_config", "model_config", "parallel_config"),
    "vllm.config:CacheConfig": ("block_size", "num_gpu_blocks"),
    "vllm.config:KVTransferConfig": ("kv_connector_extra_config", "kv_connector_module_path", "kv_load_failure_policy"),
    "vllm.config:ModelConfig": (
        "dtype",
        "get_head_size",
        "get_total_num_hidden_layers",
        "get_total_num_kv_heads",
        "hf_text_config",
        "model",
    ),
    "vllm.config:ParallelConfig": (
        "distributed_executor_backend",
        "tensor_parallel_size",
        "worker_extension_cls",
        "world_size",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1": (
        "_connector_metadata",
        "_get_connector_metadata",
        "build_connector_meta",
        "get_block_ids_with_load_errors",
        "get_num_new_matched_tokens",
        "register_kv_caches",
        "request_finished",
        "save_kv_layer",
        "start_load_kv",
        "update_state_after_alloc",
        "wait_for_layer_load",
        "wait_for_save",
    ),
    "vllm.forward_context:ForwardContext": ("no_compile_layers",),
    "vllm.model_executor.layers.attention:Attention": ("impl", "kv_cache", "kv_cache_dtype", "layer_name"),
    "vllm.v1.attention.backend:AttentionCGSupport": ("NEVER",),
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": ("CPU_ATTN", "FLASH_ATTN"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": BACKEND,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": ("get_cudagraph_support",),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": IMPL,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata": METADATA,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": BACKEND,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder": ("get_cudagraph_support",),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": IMPL,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata": (*METADATA, "max_num_splits", "use_cascade"),
    "vllm.v1.kv_cache_layout:KVCacheLayout": ("LBHNC",),
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": ("get_block_ids",),
    # The first says when synchronous loads run.
    "vllm.v1.core.sched.output:SchedulerOutput": ("has_sync_kv_loads", "num_scheduled_tokens"),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups",),
    "vllm.v1.request:Request": ("cache_salt", "kv_transfer_params", "num_prompt_tokens", "num_tokens", "request_id"),
}


def has(cls: Any, name: str) -> bool:
    """Whether instances have it: from the class, its annotations, or what its methods set."""
    for base in cls.__mro__:
        if name in vars(base) or name in inspect.get_annotations(base):
            return True
        if base.__module__.split(".")[0] in FILES and re.search(rf"self\.{name}\b[^=\n]* =", inspect.getsource(base)):
            return True
    return name in getattr(cls, "model_fields", ())


@pytest.mark.parametrize("owner", NAMES)
def test_the_names_are_there(owner):
    module, _, cls = owner.partition(":")
    found = getattr(importlib.import_module(module), cls)
    assert [name for name in NAMES[owner] if not has(found, name)] == []


def test_a_name_that_is_not_there_is_told():
    from ray.serve.request_router import PendingRequest

    assert not has(PendingRequest, "memory")


@pytest.mark.parametrize("library", FILES)
def test_all_that_is_imported_is_there(library):
    missing = []
    for node in ast.walk(ast.parse((ROOT / FILES[library]).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == library:
            module = importlib.import_module(node.module)
            missing += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    assert missing == []


def test_every_private_name_that_is_used_is_looked_for():
    tree = ast.parse((ROOT / FILES["ray"]).read_text("utf-8"))
    own = {
        "_rank",
        "_load",
        "_ask",
        "_rank_replicas",
        "_routing",
        "_ranked",
        "_own",
        "_asked",
        "_client",
        "_raylet_lives",
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")} - own
    assert private <= {name for names in NAMES.values() for name in names}


def test_proxies_are_waited_for_where_serve_would_give_up():
    """What `wait_for_proxies` sets is what Serve looks at."""
    from ray.serve._private import api, client

    for function in (api.serve_start, client.ServeControllerClient.wait_for_proxies_serving):
        assert "timeout=HTTP_PROXY_TIMEOUT" in inspect.getsource(inspect.unwrap(function))


def test_nothing_else_reaches_beneath_the_public_interfaces():
    """Of vLLM only its top level; of Ray nothing whose path has a private part."""
    for file in (file for room in ("cluster", "*_worker", "serving") for file in ROOT.glob(f"{room}/**/*.py")):
        if str(file.relative_to(ROOT)) in FILES.values():
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in modules:
                top, *inner = module.split(".")
                assert not (top == "vllm" and inner), f"{file} imports {module}"
                assert not (top == "ray" and any(part.startswith("_") for part in inner)), f"{file} imports {module}"
