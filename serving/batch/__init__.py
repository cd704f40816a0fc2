"""Many questions, or many files, at once on the cluster: `from serving.batch import answer_all`.

`answer` starts a run and watches it, `run` is its actor, `questions` and `answers` are its files, `memorize` is for
files.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.batch.answer import answer_all

__all__ = ["answer_all"]


def __getattr__(name: str) -> Any:
    if name != "answer_all":
        raise AttributeError(f"module 'serving.batch' has no attribute {name!r}")
    from serving.batch.answer import answer_all

    return answer_all
