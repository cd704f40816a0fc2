"""The plugin that has vLLM read beacon checkpoints: every family that `BeaconModel` reads."""

import os
import subprocess
import sys

import pytest

from memory_worker.models.beacon.checkpoint import FAMILIES, families
from memory_worker.recall import vllm_plugin


def test_every_family_that_is_read_is_registered() -> None:
    assert [families({"architectures": [name]}) for name in vllm_plugin.ARCHITECTURES] == [{each} for each in FAMILIES]


@pytest.mark.parametrize("name", vllm_plugin.ARCHITECTURES)
def test_its_classes_are_vllms_own_but_skip_beacon_weights(name: str) -> None:
    from vllm import ModelRegistry

    stock = ModelRegistry.models[name].load_model_cls()
    ours = getattr(vllm_plugin, name)
    assert issubclass(ours, stock) and ours is not stock and ours.__name__ == name
    assert getattr(vllm_plugin, name) is ours


def test_registered_classes_are_inspected_without_a_process_that_imports_vllm_anew() -> None:
    code = (
        "import subprocess; from vllm import ModelRegistry; from memory_worker.recall import vllm_plugin as plugin\n"
        "plugin.register()\n"
        "def refuse(*_, **__): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "for name in plugin.ARCHITECTURES:\n"
        "    assert ModelRegistry.models[name].load_model_cls() is getattr(plugin, name), name\n"
        "    assert ModelRegistry.models[name].inspect_model_cls().architecture == name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"VLLM_CACHE_ROOT": "/nonexistent"})


def test_another_name_is_no_class_of_it() -> None:
    with pytest.raises(AttributeError, match="GptForCausalLM"):
        getattr(vllm_plugin, "GptForCausalLM")  # noqa: B009


def test_attention_by_head_is_what_vllm_takes() -> None:
    """In a process of its own: what is registered stays so."""
    code = (
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends\n"
        "from memory_worker.recall import vllm_plugin as plugin\n"
        "stock = {name: Backends[name].get_class() for name in ('CPU_ATTN', 'FLASH_ATTN')}\n"
        "plugin.register()\n"
        "for name, of_vllm in stock.items():\n"
        "    ours = Backends[name].get_class()\n"
        "    assert ours is getattr(plugin, name) is not of_vllm and issubclass(ours, of_vllm)\n"
        "    assert ours.get_name() == name and issubclass(ours.get_impl_cls(), of_vllm.get_impl_cls())\n"
        "    assert ours.supported_kv_cache_layouts() == of_vllm.supported_kv_cache_layouts()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"VLLM_CACHE_ROOT": "/nonexistent"})
