"""The models that turn texts into vectors, behind one protocol: used by the `Embedder` deployment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retrieval_worker.config import EmbedderConfig
from retrieval_worker.errors import EmbedderUnavailable
from retrieval_worker.messages import Embeddings


class EmbedderModel(Protocol):
    """Texts to vectors. `encode` is called from one thread at a time, `count_tokens` from any."""

    dimension: int
    has_sparse: bool
    max_tokens: int  # of one text, special tokens left out; what is longer is cut
    query_prompt: str  # put before a text that searches
    passage_prompt: str  # put before a text that is searched

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """One row per text, in order."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each whole text, special tokens left out."""


def load_embedder(config: EmbedderConfig) -> EmbedderModel:
    """Loads the configured model. Raises `EmbedderUnavailable`."""
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    if config.kind == "bge-m3":
        return BgeM3(config)
    if config.kind == "minilm":
        from retrieval_worker.minilm import MiniLm

        device = _device(config)
        return MiniLm(config.max_tokens, config.batch_size, _dtype(config, device), device)
    return SentenceTransformerEmbedder(config)


class SentenceTransformerEmbedder:
    """Any sentence-transformers model; dense vectors only."""

    has_sparse = False

    def __init__(self, config: EmbedderConfig) -> None:
        from sentence_transformers import SentenceTransformer

        folder = _folder(config.model, "modules.json")
        device = _device(config)
        try:
            self._model = SentenceTransformer(
                folder, device=device, model_kwargs={"dtype": _dtype(config, device)}, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise EmbedderUnavailable(config.model, str(error)) from error
        self._batch_size = config.batch_size
        self._model.max_seq_length = min(self._model.max_seq_length or config.max_tokens, config.max_tokens)
        self._counter = _TokenCounter(self._model.tokenizer, config.model)
        self.max_tokens = self._model.max_seq_length - self._counter.special_tokens
        self.dimension = int(self._model.get_embedding_dimension())
        prompts = self._model.prompts
        self.query_prompt = prompts.get("query", "")
        self.passage_prompt = prompts.get("document", "") or prompts.get("passage", "")

    def encode(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return Embeddings(np.zeros((0, self.dimension), np.float32), None)
        # sentence-transformers itself sorts by length; an empty prompt keeps its default prompt away.
        dense = self._model.encode(
            list(texts), batch_size=self._batch_size, prompt="", convert_to_numpy=True, show_progress_bar=False
        )
        return Embeddings(_normalise(dense), None)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._counter.count(texts)


class BgeM3:
    """BGE-M3 through FlagEmbedding: dense vectors and learned sparse weights by token id.

    FlagEmbedding loads the model; the batches are run here, because its own `encode` runs the first batch
    twice and always computes in float32 on the CPU.
    """

    has_sparse = True
    query_prompt = passage_prompt = ""

    def __init__(self, config: EmbedderConfig) -> None:
        import torch
        from FlagEmbedding import BGEM3FlagModel

        folder = _folder(config.model, "config.json", "sparse_linear.pt", "colbert_linear.pt")
        self._device = _device(config)
        dtype = _dtype(config, self._device)
        try:
            loaded = BGEM3FlagModel(
                folder,
                use_fp16=dtype == torch.float16,
                use_bf16=dtype == torch.bfloat16,
                devices=[self._device],
            )
        except (OSError, ValueError) as error:
            raise EmbedderUnavailable(config.model, str(error)) from error
        self._model = loaded.model.to(self._device).eval()
        self._tokenizer = loaded.tokenizer
        self._batch_size = config.batch_size
        self._counter = _TokenCounter(self._tokenizer, config.model)
        # XLM-R numbers its positions from padding_idx + 1.
        positions = self._model.config.max_position_embeddings - (self._model.config.pad_token_id or 0) - 1
        self._limit = min(config.max_tokens, positions)
        self.max_tokens = self._limit - self._counter.special_tokens
        self.dimension = int(self._model.config.hidden_size)
        self._unweighted = set(self._tokenizer.all_special_ids)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        dense = np.zeros((len(texts), self.dimension), np.float32)
        sparse: list[dict[int, float]] = [{} for _ in texts]
        if texts:
            ids = self._tokenizer(list(texts), truncation=True, max_length=self._limit)["input_ids"]
            by_length = sorted(range(len(texts)), key=lambda row: -len(ids[row]))
            for begin in range(0, len(texts), self._batch_size):
                rows = by_length[begin : begin + self._batch_size]
                vectors, weights = self._forward([ids[row] for row in rows])
                dense[rows] = vectors
                for row, row_weights in zip(rows, weights, strict=True):
                    sparse[row] = self._lexical(ids[row], row_weights)
        return Embeddings(_normalise(dense), sparse)

    def _forward(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Dense vectors `[n, dim]` and token weights `[n, longest]` of token ids."""
        import torch

        padded = self._tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            outputs = self._model(padded, return_dense=True, return_sparse=True)
        vectors = outputs["dense_vecs"].float().cpu().numpy()
        return vectors, outputs["sparse_vecs"].squeeze(-1).float().cpu().numpy()

    def _lexical(self, ids: list[int], weights: np.ndarray) -> dict[int, float]:
        """The greatest weight of each token; none for special tokens."""
        lexical: dict[int, float] = {}
        for token, weight in zip(ids, weights.tolist(), strict=False):
            if weight > lexical.get(token, 0.0) and token not in self._unweighted:
                lexical[token] = weight
        return lexical

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._counter.count(texts)


class _TokenCounter:
    """Counts tokens with a tokenizer of its own: a Hugging Face tokenizer shared by threads fails."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise EmbedderUnavailable(model, "it has no fast tokenizer (tokenizer.json)")
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_tokens = self._tokenizer.num_special_tokens_to_add(False)

    def count(self, texts: Sequence[str]) -> list[int]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]


def _folder(model: str, *needed: str) -> str:
    """The local folder of a checkpoint, fetched from the hub if need be, with all `needed` files in it."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            raise EmbedderUnavailable(model, "there is no such folder")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(model, ignore_patterns=["onnx/*", "*.msgpack", "*.ot", "*.h5"]))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise EmbedderUnavailable(model, f"no such folder, and the hub says: {error}") from error
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise EmbedderUnavailable(model, f"its folder has no {', '.join(missing)}")
    return str(folder)


def _device(config: EmbedderConfig) -> str:
    import torch

    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(config: EmbedderConfig, device: str) -> Any:
    """The configured dtype; float16 has no fast kernels on the CPU and becomes float32 there."""
    import torch

    if device == "cpu" and config.dtype == "float16":
        return torch.float32
    return getattr(torch, config.dtype)


def _normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length in float32: bfloat16 models normalise to three digits only."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
