"""The scales of an FP8 KV cache: a checkpoint's own, else from a run over a few tokens when the model starts.

They are constants from then on: captured steps hold them, and blocks of the prefix cache keep their meaning.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch

from flashserve.config import ResolvedConfig
from flashserve.errors import ConfigError
from flashserve.models.files import ModelFiles
from flashserve.models.kv_scales import read_kv_scales
from flashserve.models.model_input import CausalLM
from flashserve.protocol import SamplingParams
from flashserve.runner.device import Device
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput
from flashserve_kernels import KVScales, Ops

_TOKENS = 512
_LARGEST = 448.0  # of e4m3
_HEADROOM = 8.0
"""A text's largest key may exceed that of random tokens. Room costs a floating format nothing but its smallest numbers:
with 8 to 16 times the maximum free, three bits of mantissa reach down to 1/1792 of it (28 * 2^6; 28 = 448 / 16)."""
_SMALLEST_SCALE = 2.0**-6
"""Three bits reach down to 2^-12 then, and numbers up to 7 have room, however little the batch showed."""


@dataclass(frozen=True)
class KVScaling:
    """Scales per layer, and whose they are. Empty for a cache that takes none."""

    scales: tuple[KVScales, ...] = ()
    origin: str = ""

    def apply(self, resolved: ResolvedConfig) -> ResolvedConfig:
        """The settings with these scales, and a note of them."""
        if not self.scales:
            return resolved
        (k_min, k_max), (v_min, v_max) = ((min(kind), max(kind)) for kind in zip(*self.scales, strict=True))
        note = f"FP8 KV scales {self.origin}: keys {k_min:.3g} to {k_max:.3g}, values {v_min:.3g} to {v_max:.3g}"
        return replace(resolved, kv_scales=self.scales, notes=(*resolved.notes, note))


def find_kv_scales(files: ModelFiles, model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> KVScaling:
    """Raises ConfigError for scales in the checkpoint that make no sense, and for a model that does not compute."""
    config = resolved.config
    if config.kv_cache_dtype != "fp8":
        return KVScaling()
    if not config.calculate_kv_scales:
        stored = read_kv_scales(files, resolved.model.num_layers)
        if stored:
            return KVScaling(stored, "of the checkpoint")
    return KVScaling(_calibrate(model, resolved, device, ops), "calibrated")


@torch.inference_mode()
def _calibrate(model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> tuple[KVScales, ...]:
    """From the largest keys and values of a random prompt, the same at each start, in a cache of the model's dtype."""
    num_tokens = min(_TOKENS, resolved.max_model_len, resolved.max_num_batched_tokens)
    num_blocks = -(-num_tokens // resolved.block_size)
    config = replace(resolved.config, kv_cache_dtype="auto", enforce_eager=True)
    runner = ModelRunner(model, replace(resolved, config=config, max_num_seqs=1, num_blocks=num_blocks), device, ops)
    tokens = random.Random(0).choices(range(resolved.model.vocab_size), k=num_tokens)
    admission = Admission(0, 0, SamplingParams(temperature=0), 0, num_tokens, ())
    row = ScheduledRow(0, 0, 0, num_tokens, tokens, list(range(num_blocks)), 1)
    runner.wait(runner.submit(SchedulerOutput(0, [admission], [row], num_tokens, [])))
    queue, cache = device.make_queue(), runner.step_model.kv_cache
    largest = queue.run(lambda: torch.stack([torch.stack((own.k.abs().amax(), own.v.abs().amax())) for own in cache]))
    found: list[list[float]] = queue.download(largest.float()).result().tolist()
    runner.close()
    for layer, both in enumerate(found):
        if not all(map(math.isfinite, both)):
            raise ConfigError(f"keys or values of layer {layer} are not finite in {resolved.dtype}: set another dtype")
    return tuple(KVScales(*map(_scale_for, both)) for both in found)


def _scale_for(largest: float) -> float:
    """A power of two, so that mantissas are rounded as without a scale."""
    needed = largest * _HEADROOM / _LARGEST
    return _SMALLEST_SCALE if needed <= _SMALLEST_SCALE else 2.0 ** math.ceil(math.log2(needed))
