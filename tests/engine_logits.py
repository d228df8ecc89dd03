"""What an engine computed, logits included, and transformers' float32 for the same tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashserve.runner.input_builder import Arrangement
from flashserve.runner.steps import EagerSteps


@contextmanager
def recorded_logits() -> Iterator[dict[tuple[int, int], Tensor]]:
    """Inside, the sampled logits of every step, by (request id, position), as float32 on the host."""
    found: dict[tuple[int, int], Tensor] = {}
    plain = EagerSteps.logits

    def logits(self: EagerSteps, step: Arrangement) -> Tensor:
        result = plain(self, step)
        rows = self.queue.run(lambda: result[: len(step.sampling)].float().cpu())
        for row, place, position in zip(rows, step.sampling.tolist(), step.sample_positions.tolist(), strict=True):
            found[step.rows[place].request_id, position] = row
        return result

    with patch.object(EagerSteps, "logits", logits):
        yield found


def reference_logits(folder: Path, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """[length, vocabulary] of each sequence by transformers in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(sequence)])).logits[0] for sequence in sequences]


@dataclass(frozen=True)
class Agreement:
    """An engine's tokens and logits against the reference's for the same prefixes."""

    largest_error: float
    num_positions: int
    num_qualifying: int
    """Positions whose margin between the best two tokens exceeds twice the largest error."""
    wrong: list[tuple[int, int]]
    """(prompt, token) of qualifying positions at which another token was chosen."""

    @property
    def qualifying(self) -> float:
        return self.num_qualifying / self.num_positions


def agreement(folder: Path, llm: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> Agreement:
    """Generate greedily with an LLM, and compare. Its requests must be its first ones."""
    params = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
    first_id = 1
    with recorded_logits() as ours:
        results = llm.generate([list(prompt) for prompt in prompts], params)
    sequences = [[*prompt, *result.token_ids] for prompt, result in zip(prompts, results, strict=True)]
    exact = reference_logits(folder, sequences)
    errors, margins, chosen = [], [], []
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        for number, token in enumerate(result.token_ids):
            position = len(prompt) - 1 + number
            row = exact[index][position]
            errors.append(float((ours[first_id + index, position] - row).abs().max()))
            best = row.topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            chosen.append((index, number, token == int(best.indices[0])))
    bound = 2 * max(errors)
    qualifying = [margin > bound for margin in margins]
    wrong = [(i, n) for (i, n, right), q in zip(chosen, qualifying, strict=True) if q and not right]
    return Agreement(max(errors), len(errors), sum(qualifying), wrong)


def mixed_prompts(lengths: Sequence[int], seed: int = 1, vocab_size: int = 512) -> list[list[int]]:
    """Token ids without special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
