"""From the engine's sum of hidden states to what a client reads."""

from __future__ import annotations

import msgspec
import numpy as np

from flashserve.errors import INTERNAL
from flashserve.protocol import ErrorInfo, GenerateRequest, PoolingParams, TokenOutput
from flashserve.text.completion import Completion
from flashserve.text.tokenizer import Tokenizer


def embedding_of(pooled: bytes, params: PoolingParams) -> np.ndarray:
    """[dimensions] float32. pooled: float32, little endian."""
    vector = np.frombuffer(pooled, "<f4")[: params.dimensions]
    length = np.linalg.norm(vector) if params.normalize else 0.0
    return vector / length if length else vector


class EmbeddingAnswer(Completion):
    """An answer whose text is a JSON list of numbers, and which has no tokens."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        super().__init__(tokenizer, request)
        assert request.pooling is not None
        self._params = request.pooling
        self.values: list[float] = []

    def take(self, output: TokenOutput) -> bool:
        if output.embedding is not None:
            if np.isfinite(np.frombuffer(output.embedding, "<f4")).all():
                self.values = embedding_of(output.embedding, self._params).tolist()
                # Nine digits say a float32 exactly; as Python floats they would be twice as long.
                self._add("[" + ",".join([f"{value:.9g}" for value in self.values]) + "]")
            else:
                error = ErrorInfo(INTERNAL, "the model's hidden states are not finite: there is no embedding")
                output = msgspec.structs.replace(output, finish_reason="error", error=error)
        return super().take(output)
