"""Several rankings into one, and what of it goes to the generator: called by the Router."""

from collections.abc import Sequence

from retrieval_worker.config import SearchConfig
from retrieval_worker.messages import Hit, Ranking


def fuse(rankings: Sequence[Ranking], weights: Sequence[float], k: int) -> list[Hit]:
    """Reciprocal-rank fusion (Cormack et al., SIGIR 2009): a passage scores the sum of weight / (k + rank).

    Ranks are from 1. Put the question's ranking first: of equal scores, the passage of the earlier ranking wins,
    then the one that comes first in document order. A passage counts once per ranking.
    """
    scores: dict[int, float] = {}
    first_seen: dict[int, tuple[int, Hit]] = {}
    for order, (ranking, weight) in enumerate(zip(rankings, weights, strict=True)):
        ranked = list(dict.fromkeys(hit.passage.id for hit in ranking.hits))
        for hit in ranking.hits:
            first_seen.setdefault(hit.passage.id, (order, hit))
        for rank, passage in enumerate(ranked, start=1):
            scores[passage] = scores.get(passage, 0.0) + weight / (k + rank)
    # Rounded: sums of the same ranks in another order differ in the last bit, and must tie.
    best = sorted(scores, key=lambda passage: (-round(scores[passage], 12), first_seen[passage][0], passage))
    return [Hit(first_seen[passage][1].passage, scores[passage]) for passage in best]


def clue_weights(rankings: Sequence[Ranking], reference: float) -> list[float]:
    """How much each ranking counts: the square of its grounding over `reference`, the question's, and 1 at most.

    A clue claims to be in the text. What memory recalls well is there, nearly word for word, and what it made up is in
    no passage: that would outvote the question. A question, too, shares some of its words with a passage, so a clue
    that shares fewer is doubted. `benchmarks.fusion` measures what this is worth. Where even the question shares none,
    as in another language, all count 1.
    """
    if not reference:
        return [1.0] * len(rankings)
    return [min(1.0, ranking.grounding / reference) ** 2 for ranking in rankings]


def select_hits(rankings: Sequence[Ranking], weights: Sequence[float], search: SearchConfig) -> list[Hit]:
    """What the generator gets: the best of all rankings, fused, within the budget, in document order.

    The passage most like the question, the first of the first ranking, is always among them: clues add to what the
    question finds, and cannot crowd that out however many they are, or however wrong.
    """
    fused = fuse(rankings, weights, search.rrf_k)
    best = {hit.passage.id for ranking in rankings[:1] for hit in ranking.hits[:1]}
    fused.sort(key=lambda hit: hit.passage.id not in best)  # stable: the others stay in their order
    return fit(fused, search.passages, search.budget_tokens)


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
