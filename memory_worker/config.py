"""Settings of the memory pool: the memory model, how it memorizes, and how clues are recalled."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import EngineConfig, Settings
from cluster.planning.costs import MemoryKind
from memory_worker.head_pools import POOL_BLOCK


class MemorizeConfig(Settings):
    """How texts become memory."""

    kind: MemoryKind | None = Field(
        None,
        description="kind of memory where a request names none; none takes beacon where the model has beacon weights, "
        "else pruned, else gist",
    )
    ratio: int = Field(
        4,
        description="tokens for each slot where a request names none: for beacon exactly, and divides the window; for "
        "pruned exactly, and is 2, 3, 4, 8 or 16; for gist at least; full has a slot for every token",
    )
    group_windows: int | None = Field(
        None,
        ge=1,
        description="windows of one rank that go through each layer together; none takes the device's measured default",
    )
    ranks: int = Field(
        1, ge=1, description="processes that share each text of one Memorizer; each takes what the pool gives a replica"
    )
    rank_start_s: float = Field(
        900.0, gt=0, description="seconds that ranks may take to be placed and to load the model from slow storage"
    )
    rank_timeout_s: float = Field(
        120.0,
        gt=0,
        description="seconds after which a rank that does not take part in an exchange is given up: more than one rank "
        "may be behind another on a busy machine, since a process that hangs looks no different",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="weights and stored slots of the memory model"
    )
    device: str = Field("auto", description="torch device of the Memorizer; auto takes cuda where there is one")
    threads: int = Field(0, ge=0, description="torch threads on the CPU; 0 takes torch's default")
    segment_tokens: int | None = Field(
        None,
        gt=0,
        description="most tokens of one segment, rounded down to windows, one at least; none, or more, takes what fits "
        "one prompt",
    )
    head_budgets: bool = Field(
        False,
        description="whether the KV heads of a layer share a pruned memory's slots, each keeping what it needs, where "
        "the engine can read that: on the CPU, and on GPUs with FlashAttention, where it was not run yet",
    )
    checkpoint_windows: int = Field(
        64,
        gt=0,
        description="windows after which a job's slots are made durable; they are held in RAM until then. Gists are "
        "made durable after every group",
    )


INSTRUCTION_TOKENS = 384  # more than what stands around any question, in bytes even: a test counts it


class RecallConfig(Settings):
    """How clues are recalled."""

    max_clue_tokens: int = Field(192, gt=0, description="tokens generated for one kind of clue")
    max_clues: int = Field(8, gt=0, description="clues kept of one kind")
    max_answer_tokens: int = Field(256, gt=0, description="tokens of an answer from memory where none is named")
    question_tokens: int = Field(
        1024,
        gt=INSTRUCTION_TOKENS,
        description=f"tokens kept for a question and {INSTRUCTION_TOKENS} of its instruction",
    )
    deadline_s: float = Field(30.0, gt=0, description="seconds after which a question goes on without its clues")

    @property
    def longest_question(self) -> int:
        """Tokens that a question may have: what is kept for it holds its instruction, too."""
        return self.question_tokens - INSTRUCTION_TOKENS


class KeeperConfig(Settings):
    """The object-store tier of one node."""

    budget_bytes: int = Field(2 * 2**30, gt=0, description="bytes of memories one node keeps in its object store")


class CatalogConfig(Settings):
    """Jobs that make memories, and versions that have been replaced."""

    running_jobs: int = Field(4, ge=1, description="jobs worked on at a time, in the whole cluster")
    waiting_jobs: int = Field(256, ge=1, description="jobs that may wait; beyond, requests get 429")
    lease_s: float = Field(10.0, gt=0, description="seconds without a word from a job's worker before another takes it")
    grace_s: float = Field(
        900.0, gt=0, description="seconds a version is kept after it was replaced and after it was last read"
    )


class MemoryConfig(Settings):
    """Everything of the memory pool."""

    engine: EngineConfig
    memorize: MemorizeConfig = MemorizeConfig()
    recall: RecallConfig = RecallConfig()
    keeper: KeeperConfig = KeeperConfig()
    catalog: CatalogConfig = CatalogConfig()

    @property
    def group_slots(self) -> int:
        """Slots that one prompt may hold, the head's included: what is left beside a question and what is written."""
        written = max(self.recall.max_clue_tokens, self.recall.max_answer_tokens)
        return self.engine.max_model_len - written - self.recall.question_tokens

    def heads_together(self, kv_heads: int) -> int:
        """KV heads of a layer that share a pruned memory's slots in this engine: those of one rank, or 1, not any."""
        ranks = self.engine.tensor_parallel_size
        fits = POOL_BLOCK % (self.engine.block_size or POOL_BLOCK) == 0 and kv_heads % ranks == 0
        return kv_heads // ranks if fits and self.memorize.head_budgets else 1

    @model_validator(mode="after")
    def _prompts_hold_slots(self) -> "MemoryConfig":
        if self.group_slots < 1:
            raise ValueError(
                f"engine.max_model_len of {self.engine.max_model_len} tokens leaves no slot beside "
                f"recall.question_tokens and the larger of recall.max_clue_tokens and recall.max_answer_tokens, "
                f"which lack {1 - self.group_slots}: raise the one or lower the others"
            )
        return self
