"""What can go wrong in a Generator; called by nobody but raised to its callers."""


class QuestionTooLong(Exception):
    """The question alone leaves no room in the generator's context window."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(tokens, limit)

    def __str__(self) -> str:
        return (
            f"the question makes a prompt of {self.tokens} tokens without any passage; the generator's context "
            f"window of {self.limit} tokens must also hold the answer: ask a shorter question"
        )


class GenerationFailed(Exception):
    """The generator gave no answer, or stopped in the middle of one; the message says why."""
