"""Many questions, or many files, at once on the cluster: `from serving.batch import answer_all`.

`answer` starts a run and watches it, `run` is its actor, `questions` and `answers` are its files, `job` what they tell
each other; `memorize` is for files.
"""

from serving.batch.answer import answer_all

__all__ = ["answer_all"]
