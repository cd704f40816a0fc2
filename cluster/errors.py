"""What can go wrong in an engine. Apart from cluster.engine, whose import takes as long as vLLM's (10 s)."""


class EngineFailed(Exception):
    """The engine ended a request with an error; the request may be tried again."""
