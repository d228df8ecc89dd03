"""What an engine computed, logits included, beside transformers' float32 for the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from driver import Engine, SeenLogits


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


def agreement(folder: Path, engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> Agreement:
    """Generate greedily, and compare."""
    seen = SeenLogits(engine.runner)
    results = engine.generate(prompts, max_tokens=num_tokens)
    exact = reference_logits(folder, [[*prompt, *tokens] for prompt, tokens in zip(prompts, results, strict=True)])
    errors, margins, chosen = [], [], []
    for index, (prompt, tokens) in enumerate(zip(prompts, results, strict=True)):
        for number, token in enumerate(tokens):
            position = len(prompt) - 1 + number
            row = exact[index][position]
            errors.append(float((seen[index, position] - row).abs().max()))
            best = row.topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            chosen.append((index, number, token == int(best.indices[0])))
    bound = 2 * max(errors)
    qualifying = [margin > bound for margin in margins]
    wrong = [(i, n) for (i, n, right), q in zip(chosen, qualifying, strict=True) if q and not right]
    return Agreement(max(errors), len(errors), sum(qualifying), wrong)
