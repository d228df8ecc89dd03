"""What a loaded model thinks of a text: the logits of all its tokens, and their perplexity."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flashserve.protocol import SamplingParams
from flashserve.runner.staging import array_fields, num_bytes, tensor_fields
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput

WINDOW = 512


def bits_per_token(driver, token_ids: list[int]) -> float:
    """Mean of -log2 p(token | the ones before it in its window)."""
    total, count = 0.0, 0
    for first in range(0, len(token_ids) - WINDOW, WINDOW):
        window = token_ids[first : first + WINDOW]
        scores = all_logits(driver.runner, window).log_softmax(-1)
        chosen = scores[:-1].gather(1, torch.tensor(window[1:])[:, None])
        total, count = total - float(chosen.sum()) / math.log(2), count + len(window) - 1
    return total / count


@torch.inference_mode()
def all_logits(runner, tokens: list[int]) -> torch.Tensor:
    """The logits of every token of one prompt, [T, V] float32."""
    blocks = list(range(-(-len(tokens) // 16)))
    row = ScheduledRow(0, 0, 0, len(tokens), tokens, blocks, 1)
    admission = Admission(0, 0, SamplingParams(temperature=0), 0, len(tokens), ())
    step = runner._builder.arrange(SchedulerOutput(0, [admission], [row], len(tokens), []))
    buffer = torch.zeros(num_bytes(step.sizes), dtype=torch.uint8)
    runner._builder.fill(step, array_fields(buffer, step.sizes), step.sizes)
    fields = replace(tensor_fields(buffer, step.sizes), logits_rows=torch.arange(len(tokens)))
    return runner._step_model.logits(fields, len(tokens)).float()
