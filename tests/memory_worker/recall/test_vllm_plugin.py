"""The plugin that has vLLM read beacon checkpoints: every family that `BeaconModel` reads, and lightly."""

import subprocess
import sys

import pytest

from memory_worker.models.beacon.checkpoint import FAMILIES, families
from memory_worker.recall import vllm_plugin


def test_every_family_that_is_read_is_registered() -> None:
    assert [families({"architectures": [name]}) for name in vllm_plugin.ARCHITECTURES] == [{each} for each in FAMILIES]


@pytest.mark.parametrize("name", vllm_plugin.ARCHITECTURES)
def test_its_classes_are_vllms_own_but_skip_beacon_weights(name: str) -> None:
    from vllm import ModelRegistry

    stock = ModelRegistry.models[name].load_model_cls()
    ours = getattr(vllm_plugin, name)
    assert issubclass(ours, stock) and ours is not stock and ours.__name__ == name
    assert getattr(vllm_plugin, name) is ours


def test_the_plugin_registers_them_all_without_loading_one() -> None:
    code = (
        "import sys; from vllm import ModelRegistry; from memory_worker.recall import vllm_plugin as plugin\n"
        "plugin.register()\n"
        "known = {name: ModelRegistry.models[name].module_name for name in plugin.ARCHITECTURES}\n"
        "assert set(known.values()) == {'memory_worker.recall.vllm_plugin'}, known\n"
        "loaded = [name for name in sys.modules if name.startswith('vllm.model_executor.models.qwen')]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_name_is_no_class_of_it() -> None:
    with pytest.raises(AttributeError, match="GptForCausalLM"):
        getattr(vllm_plugin, "GptForCausalLM")  # noqa: B009
