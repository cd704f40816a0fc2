"""What can go wrong in a Generator; called by nobody but raised to its callers."""

from cluster.errors import ExpectedError, MessageError


class QuestionTooLong(ExpectedError):
    """The question alone leaves no room in the generator's context window. Tokens throughout."""

    tokens: int
    limit: int
    status = 422
    template = (
        "the question makes a prompt of {tokens} tokens without any passage; the generator's context window of "
        "{limit} tokens must also hold the answer: ask a shorter question"
    )


class GenerationFailed(MessageError):
    """The generator gave no answer, or stopped in the middle of one; the message says why."""

    status = 503
