"""An `Embedder` that says how many texts its model was given, in which batches."""

from retrieval_worker.config import EmbedderConfig
from retrieval_worker.embedder import Embedder
from retrieval_worker.messages import Embeddings


class CountingEmbedder(Embedder):
    def __init__(self, config: EmbedderConfig) -> None:
        super().__init__(config)
        self._batches: list[int] = []
        encode = self._model.encode

        def count(texts: list[str]) -> Embeddings:
            self._batches.append(len(texts))
            return encode(texts)

        self._model.encode = count

    async def batches(self) -> list[int]:
        """Texts of each batch that was computed or tried."""
        return self._batches
