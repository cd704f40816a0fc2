"""What deploying does before Ray is asked: models found, and said what they cannot do."""

import pytest

from memory_worker.models import embedded, smollm2
from serving.config import AuthConfig, ProfileError, load_profile, parse_profile
from serving.deploy.app import limits_of, memories_root, needs_of, require_safe, resolve_models


def test_the_embedded_model_is_found_and_known_to_be_narrow():
    profile = resolve_models(load_profile("embedded"))
    assert profile.memory.engine.model == profile.generator.engine.model == str(embedded.FOLDER)
    assert limits_of(profile) == ("embedded-model",)
    assert profile.memory.engine.max_model_len == load_profile("embedded").memory.engine.max_model_len


def test_the_model_in_a_package_is_made_where_it_is_asked_for_and_named_by_its_folder(monkeypatch, tmp_path):
    said: list[str] = []

    def prepare(say):
        say("making it")
        return tmp_path

    monkeypatch.setattr(smollm2, "prepare_smollm2", prepare)
    text = "memory: {engine: {model: embedded}}\ngenerator: {engine: {model: smollm2}}"
    profile = resolve_models(parse_profile(text, "mine"), said.append)
    assert profile.generator.engine.model == str(tmp_path) and said == ["making it"]
    assert profile.memory.engine.model == str(embedded.FOLDER)


def test_other_models_are_left_as_they_are():
    profile = load_profile("laptop")
    assert resolve_models(profile) is profile and limits_of(profile) == ()


def test_a_model_folder_that_is_not_there_is_named(tmp_path):
    text = f"memory: {{engine: {{model: {tmp_path}/none}}}}\ngenerator: {{engine: {{model: b}}}}"
    with pytest.raises(ProfileError, match="none is not there"):
        resolve_models(parse_profile(text, "mine"))


def test_where_things_are_kept(tmp_path):
    assert memories_root(str(tmp_path)) == str(tmp_path / "memories")
    assert memories_root("s3://bucket/memories") == "s3://bucket/memories"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_without_keys_only_this_machine_is_listened_to(host):
    require_safe(load_profile("embedded"), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.example.org", ""])
def test_without_keys_no_other_address_is_listened_at(host):
    with pytest.raises(ProfileError, match=r"auth.mode is off.*memorag keys create TENANT"):
        require_safe(load_profile("embedded"), host)
    with_keys = load_profile("embedded").model_copy(update={"auth": AuthConfig(mode="keys")})
    require_safe(with_keys, host)


def test_keys_are_asked_for_unless_a_profile_says_otherwise():
    text = "memory: {engine: {model: a}}\ngenerator: {engine: {model: b}}"
    assert parse_profile(text, "mine").auth.mode == "keys"


def test_what_the_cluster_profile_needs_of_its_nodes():
    profile = load_profile("cluster")
    needs = {need.deployment: (need.pool, need.parts, dict(need.resources)) for need in needs_of(profile)}
    assert needs["Recaller"] == ("memory", 1, {"CPU": 1, "GPU": 1, "memory_pool": 1}) == needs["Memorizer"]
    assert needs["Generator"] == ("generator", 2, {"CPU": 1, "GPU": 1, "generator_pool": 0.5})
    assert needs["Router"] == ("cpu", 2, {"CPU": 1}) == needs["Ingress"]


def test_each_rank_of_a_memorizer_needs_a_place():
    profile = load_profile("cluster")
    memorize = profile.memory.memorize.model_copy(update={"ranks": 4})
    profile = profile.model_copy(update={"memory": profile.memory.model_copy(update={"memorize": memorize})})
    (memorizer,) = [need for need in needs_of(profile) if need.deployment == "Memorizer"]
    assert (memorizer.parts, memorizer.resources["GPU"]) == (4, 1)
