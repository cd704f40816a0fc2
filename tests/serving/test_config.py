"""Profiles: those that ship are valid, and a mistake is answered with what would be right."""

import pytest

from serving.config import ProfileError, load_profile, parse_profile, profile_names

ENGINES = "memory: {engine: {model: a}}\ngenerator: {engine: {model: b}}\n"


def test_the_shipped_profiles_are_valid():
    assert profile_names() == ["cluster", "embedded", "laptop", "single-gpu"]
    for name in profile_names():
        profile = load_profile(name)
        assert profile.memory.engine.max_model_len > 0
    assert load_profile("embedded").memory.engine.model == "embedded"


def test_a_path_is_a_profile_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(ENGINES + "limits: {documents: 3}\n")
    assert load_profile(str(path)).limits.documents == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENGINES + "limts: {}", ["'limts'", "did you mean 'limits'"]),
        (ENGINES + "limits: {documens: 3}", ["limits.documens", "did you mean 'documents'"]),
        ("memory: {engine: {model: a, dtyp: x}}\ngenerator: {engine: {model: b}}", ["dtyp", "did you mean 'dtype'"]),
        (ENGINES + "limits: {documents: many}", ["limits.documents", "integer"]),
        ("memory: {engine: {model: a}}\ngenerator: {}", ["generator", "exactly one"]),
        ("- a list", ["mapping"]),
        ("{", ["not YAML"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(text, words):
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, "mine.yaml")
    assert all(word in str(caught.value) for word in ["mine.yaml", *words]), caught.value


def test_a_misspelt_name_too():
    with pytest.raises(ProfileError, match="did you mean 'embedded'"):
        load_profile("embeded")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_profile("embedded").limits.documents = 5
