"""Several rankings into one, and what of it goes to the generator: called by the Router."""

from collections.abc import Sequence

from retrieval_worker.messages import Hit


def fuse(rankings: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """Reciprocal-rank fusion (Cormack et al., SIGIR 2009): a passage scores the sum of 1 / (k + rank), rank from 1.

    Put the question's rankings first: of equal scores, the passage that appears in the earlier ranking wins,
    then the one that comes first in document order. A passage counts once per ranking.
    """
    scores: dict[int, float] = {}
    first_seen: dict[int, tuple[int, Hit]] = {}
    for order, ranking in enumerate(rankings):
        ranked = list(dict.fromkeys(hit.passage.id for hit in ranking))
        for hit in ranking:
            first_seen.setdefault(hit.passage.id, (order, hit))
        for rank, passage in enumerate(ranked, start=1):
            scores[passage] = scores.get(passage, 0.0) + 1.0 / (k + rank)
    # Rounded: sums of the same ranks in another order differ in the last bit, and must tie.
    best = sorted(scores, key=lambda passage: (-round(scores[passage], 12), first_seen[passage][0], passage))
    return [Hit(first_seen[passage][1].passage, scores[passage]) for passage in best]


def fit(hits: Sequence[Hit], passages: int, budget_tokens: int) -> list[Hit]:
    """The best of `hits` (best first), at most `passages` of them and `budget_tokens` tokens, in document order.

    A passage too long for what is left of the budget is passed over for a later one that fits.
    """
    kept: list[Hit] = []
    for hit in hits:
        if len(kept) == passages:
            break
        if hit.passage.tokens <= budget_tokens:
            kept.append(hit)
            budget_tokens -= hit.passage.tokens
    return sorted(kept, key=lambda hit: hit.passage.id)
