"""llama.cpp through llama-cpp-python's low-level API: one context, a sequence for each request, greedy."""

from __future__ import annotations

import ctypes
import time
from importlib.metadata import version
from typing import Any

from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve

BATCH_TOKENS = 2048  # n_batch's default in llama.cpp's tools
UBATCH_TOKENS = 2048  # the default of 512 made prefills a third slower


class LlamaCpp(PeerEngine):
    def load(self, setup: EngineSetup) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.setup = setup
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(setup.model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp could not load the model; its log says why")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.settings = {
            "weights": "as in the file",
            "KV": "f16",
            "n_batch": BATCH_TOKENS,
            "n_ubatch": UBATCH_TOKENS,
            "flash_attn": "auto",
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.context: Any = None
        self.context_for: tuple[int, int] = (0, 0)

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        prompts = requests.prompts
        self._make_context(len(prompts), requests.longest)
        started = time.perf_counter()
        token_ids: list[list[int]] = [[] for _ in prompts]
        self._prefill(prompts, token_ids)
        for step in range(1, requests.outputs[0]):
            rows = [(ids[-1], len(prompts[i]) + step - 1, i, True) for i, ids in enumerate(token_ids)]
            self._decode(rows, token_ids)
        seconds = time.perf_counter() - started
        return Run(seconds, [len(ids) for ids in token_ids], token_ids)

    def _prefill(self, prompts: list[list[int]], token_ids: list[list[int]]) -> None:
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for begin in range(0, len(rows), BATCH_TOKENS):
            self._decode(rows[begin : begin + BATCH_TOKENS], token_ids)

    def _decode(self, rows: list[tuple[int, int, int, bool]], token_ids: list[list[int]]) -> None:
        """Compute rows of (token, position, sequence, whether its next token is wanted) and append what comes next."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        status = self.lib.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for index, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                token_ids[sequence].append(self._best(index))

    def _best(self, index: int) -> int:
        import numpy as np

        logits = self.lib.llama_get_logits_ith(self.context, index)
        row = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))
        return int(row.argmax())

    def _make_context(self, requests: int, length: int) -> None:
        """A context that fits the workload, as llama-batched-bench makes it; kept, and emptied, while it still fits."""
        lib = self.lib
        if self.context_for == (requests, length):
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            lib.llama_free(self.context)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = requests * (-(-length // 256) * 256)
        parameters.n_seq_max = requests
        parameters.n_batch = BATCH_TOKENS
        parameters.n_ubatch = UBATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = self.setup.threads
        self.context = lib.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context; its log says why")
        self.context_for = (requests, length)


if __name__ == "__main__":
    serve(LlamaCpp())
