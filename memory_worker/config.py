"""Settings of the memory pool: the memory model, how it memorizes, and how clues are recalled."""

from typing import Literal

from pydantic import Field

from cluster.config import EngineConfig, Settings


class MemorizeConfig(Settings):
    """How texts become memory."""

    ratio: int = Field(4, description="tokens per beacon where a request names none; divides the window")
    group_windows: int | None = Field(
        None, ge=1, description="windows that go through each layer together; none takes the device's measured default"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="weights and stored slots of the memory model"
    )
    device: str = Field("auto", description="torch device of the Memorizer; auto takes cuda where there is one")
    threads: int = Field(0, ge=0, description="torch threads on the CPU; 0 takes torch's default")


class RecallConfig(Settings):
    """How clues are recalled."""

    max_clue_tokens: int = Field(192, gt=0, description="tokens generated for one kind of clue")
    max_clues: int = Field(8, gt=0, description="clues kept of one kind")
    max_answer_tokens: int = Field(256, gt=0, description="tokens of an answer from memory where none is named")
    deadline_s: float = Field(30.0, gt=0, description="seconds after which a question goes on without its clues")


class KeeperConfig(Settings):
    """The object-store tier of one node."""

    budget_bytes: int = Field(2 * 2**30, gt=0, description="bytes of memories one node keeps in its object store")


class MemoryConfig(Settings):
    """Everything of the memory pool."""

    engine: EngineConfig
    memorize: MemorizeConfig = MemorizeConfig()
    recall: RecallConfig = RecallConfig()
    keeper: KeeperConfig = KeeperConfig()
