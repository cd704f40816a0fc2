import pytest

from generator_worker.citations import find_citations, strip_citations


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Darcy [1] proposes.", [1]),
        ("Twice [3][1], and again [3].", [3, 1]),
        ("Both [1, 2] and [2,3].", [1, 2, 3]),
        ("他来了【2】，又走了［1］。见[1、3]。", [2, 1, 3]),
        ("None [0] of [4] these [99], nor [a] nor [] nor 1.", []),
        ("", []),
        ("[ 2 ] with [4, 1]", [2, 1]),
    ],
)
def test_numbers_in_brackets_become_their_passages(text, numbers):
    assert find_citations(text, 3) == tuple(numbers)


def test_a_text_without_its_citations():
    assert strip_citations("Darcy [1] proposes[2, 3].【4】 In [room] 5.") == "Darcy  proposes. In [room] 5."
