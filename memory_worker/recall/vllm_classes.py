"""vLLM's decoders, but beacon weights are skipped: recall reads memory that exists and never makes any.

Registered under the same names by `memory_worker.recall.vllm_plugin`.
"""

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models import llama, mistral, qwen2


class Qwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(_stock(weights))


class MistralForCausalLM(mistral.MistralForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(_stock(weights))


class LlamaForCausalLM(llama.LlamaForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(_stock(weights))


def _stock(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    return ((name, weight) for name, weight in weights if "beacon" not in name)
