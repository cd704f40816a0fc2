"""What the Router makes of a request for a kind, and of memories that the running model did not make."""

import pytest

from cluster.errors import ExpectedError
from cluster.storage.durable import Storage
from memory_worker.messages import KindDescription, MemorizerDescription
from memory_worker.models.fingerprint import KINDS, fingerprint_of
from serving.errors import problem_for
from serving.router.versions import require_same_model
from tests.support import manifests as made

STOCK = MemorizerDescription(
    "hub/model",
    "a" * 64,
    2048,
    made.SHAPE,
    "gist",
    {"full": KindDescription(2048, (1,)), "gist": KindDescription(4096, (2, 4, 8, 16, 32))},
)


@pytest.mark.parametrize(
    ("kind", "ratio", "right"),
    [
        (None, None, ("gist", 4)),
        (None, 32, ("gist", 32)),
        ("full", None, ("full", 1)),
        ("full", 1, ("full", 1)),
    ],
)
def test_what_is_left_out_is_chosen(kind, ratio, right) -> None:
    assert STOCK.choose_kind(kind, ratio, 4) == right


@pytest.mark.parametrize(
    ("kind", "ratio", "words"),
    [
        ("beacon", None, "no memory of kind beacon can be made with hub/model"),
        ("full", 4, "ratio 4 does not fit a full memory"),
        ("gist", 3, "use one of 2, 4, 8, 16, 32"),
        (None, 0, "ratio 0 does not fit a gist memory"),
    ],
)
def test_what_cannot_be_made_is_said(kind, ratio, words) -> None:
    with pytest.raises(ExpectedError, match=words) as raised:
        STOCK.choose_kind(kind, ratio, 4)
    assert problem_for(raised.value).status == 422


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_is_read_by_the_model_that_made_it_alone(tmp_path, kind) -> None:
    memory = made.memory(Storage(str(tmp_path)))
    own = memory.model_copy(update={"kind": kind, "fingerprint": fingerprint_of(kind, STOCK.fingerprint)})
    require_same_model(own, STOCK)
    others = [fingerprint_of(other, STOCK.fingerprint) for other in KINDS if other != kind]
    for fingerprint in (*others, fingerprint_of(kind, "b" * 64)):
        with pytest.raises(ExpectedError, match="was encoded by the model") as raised:
            require_same_model(own.model_copy(update={"fingerprint": fingerprint}), STOCK)
        assert problem_for(raised.value).status == 409
