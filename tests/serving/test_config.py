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
        (ENGINES + "auth: {mod: keys}", ["auth.mod", "did you mean 'mode'"]),
        (ENGINES + "auth: {mode: none}", ["auth.mode", "'keys' or 'off'"]),
        (ENGINES + "quotas: {tenants: {acme: {memorys: 3}}}", ["quotas.tenants.acme.memorys", "'memories'"]),
        (ENGINES + "quotas: {default: {jobs: 0}}", ["quotas.default.jobs", "greater than or equal to 1"]),
        (ENGINES + "limits: {convert: {second: 3}}", ["limits.convert.second", "did you mean 'seconds'"]),
        (ENGINES + "limits: {question_s: 1000}", ["grace_s", "must not be less than limits.question_s"]),
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


def test_quotas_of_tenants_are_their_own_or_the_default():
    profile = parse_profile(ENGINES + "quotas: {default: {memories: 1}, tenants: {acme: {jobs: 2}}}", "mine")
    assert profile.quotas.of("acme").model_dump(exclude_none=True) == {"jobs": 2}
    assert profile.quotas.of("other").model_dump(exclude_none=True) == {"memories": 1}
