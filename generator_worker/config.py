"""Settings of the generator pool: a vLLM engine of our own, or a remote OpenAI-compatible endpoint."""

from pydantic import Field, model_validator

from cluster.config import EngineConfig, Settings


class RemoteConfig(Settings):
    """An OpenAI-compatible endpoint."""

    base_url: str = Field(description="such as http://host:8000/v1")
    model: str = Field(description="the model's name there")
    tokenizer: str = Field(description="folder or hub name of the model's tokenizer; budgets are counted with it")
    max_model_len: int = Field(description="tokens of the model's context window")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    timeout_s: float = Field(60.0, gt=0, description="seconds without a token before a request is given up")


class GeneratorConfig(Settings):
    """Everything of the generator pool: exactly one of `engine` and `remote`."""

    engine: EngineConfig | None = None
    remote: RemoteConfig | None = None
    max_answer_tokens: int = Field(512, gt=0, description="tokens of an answer where a request names none")

    @model_validator(mode="after")
    def _one_of(self) -> "GeneratorConfig":
        if (self.engine is None) == (self.remote is None):
            raise ValueError("set exactly one of generator.engine (own GPUs) and generator.remote (an endpoint)")
        return self
