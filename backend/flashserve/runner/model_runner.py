"""Runs a model's steps on a torch device. Implements Runner."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flashserve.config import ResolvedConfig
from flashserve.models.checkpoint import Checkpoint, CheckpointWeights
from flashserve.models.model_input import CausalLM
from flashserve.models.registry import find_architecture, read_json
from flashserve.protocol import SamplingParams
from flashserve.runner.device import torch_device
from flashserve.runner.input_builder import InputBuilder
from flashserve.runner.kv_cache import KVCache
from flashserve.runner.sampler import Sampler
from flashserve.runner.slots import SlotTable
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepOutput

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StepHandle:
    """A step on its way."""

    num_rows: int
    sample_rows: np.ndarray
    tokens: torch.Tensor | None
    """[N] int64 on the device; None where nothing samples."""


class ModelRunner:
    """The model, its KV cache and the state of its slots. Use from one thread: torch keeps a pool of compute
    threads for each thread that calls it."""

    run_ahead = False

    def __init__(self, resolved: ResolvedConfig) -> None:
        self._resolved = resolved
        self._device = torch_device(resolved.config.device, resolved.device)
        self._dtype = DTYPES[resolved.dtype]
        self._model: CausalLM | None = None
        self._kv_cache: KVCache | None = None

    def load(self) -> None:
        """Read the weights and allocate the KV cache. Raises ConfigError where they do not fit config.json."""
        started = time.perf_counter()
        resolved = self._resolved
        if self._device.type == "cpu":
            torch.set_num_threads(resolved.config.num_threads or resolved.device.num_threads)
        self._model = load_model(resolved, self._dtype, self._device)
        self._kv_cache = KVCache(resolved, self._dtype, self._device)
        max_blocks = -(-resolved.max_model_len // resolved.block_size)
        slots = SlotTable(resolved.max_num_seqs, max_blocks, self._device)
        self._slots = slots
        self._builder = InputBuilder(slots, resolved.block_size, self._device)
        self._sampler = Sampler(slots, self._device)
        log.info("loaded %s in %.1f s", resolved.model.architecture, time.perf_counter() - started)

    @torch.inference_mode()
    def submit(self, plan: SchedulerOutput) -> StepHandle:
        """Compute the step; on a CPU it is done on return."""
        if self._model is None or self._kv_cache is None:
            raise RuntimeError("the runner is not loaded, or closed")
        step = self._builder.build(plan)
        hidden = self._model.forward(step.model, self._kv_cache.layers)
        tokens = None
        if step.sample_rows.size:
            tokens = self._sampler(self._model.logits(hidden), step.sample_slots, step.sample_positions)
            slots = torch.from_numpy(np.ascontiguousarray(step.sample_slots)).to(self._device)
            self._slots.last_token.index_copy_(0, slots, tokens)
        return StepHandle(len(plan.rows), step.sample_rows, tokens)

    def wait(self, handle: StepHandle) -> StepOutput:
        """The samples, on the host."""
        token_ids: list[list[int]] = [[] for _ in range(handle.num_rows)]
        if handle.tokens is not None:
            for row, token in zip(handle.sample_rows.tolist(), handle.tokens.tolist(), strict=True):
                token_ids[row] = [token]
        return StepOutput(token_ids)

    def warm_up(self) -> None:
        """Run a prefill and some decode steps, so that the first request pays for no lazy initialisation."""
        vocab, block_size = self._resolved.model.vocab_size, self._resolved.block_size
        num_tokens = min(self._resolved.max_num_batched_tokens, block_size, self._resolved.max_model_len)
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature, top_p=0.9)
            admission = Admission(0, 0, params, 0, num_tokens, ())
            row = ScheduledRow(0, 0, 0, num_tokens, [i % vocab for i in range(num_tokens)], [0], True)
            self.wait(self.submit(SchedulerOutput(0, [admission], [row], num_tokens, [])))
            # The same token again: its key and value are written once more to the same place.
            decode = ScheduledRow(0, 0, num_tokens - 1, 1, [], [], True)
            self.wait(self.submit(SchedulerOutput(1, [], [decode], 1, [])))

    def close(self) -> None:
        """Free the model and the cache. Idempotent."""
        self._model = None
        self._kv_cache = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def load_model(resolved: ResolvedConfig, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Build the model with its weights. Raises ConfigError for missing, unexpected or mis-shaped tensors."""
    folder = Path(resolved.model.path)
    weights = CheckpointWeights(Checkpoint(folder), dtype, device)
    model_config = read_json(folder / "config.json")
    _, model_class = find_architecture(model_config)
    model = model_class(model_config, weights, resolved.max_model_len)
    weights.check_all_used(model_class.ignored_weights(model_config))
    return model
