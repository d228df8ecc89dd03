"""What transformers says of a prompt: greedy, float32. The suite's texts of another model are replaced by these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MAX_TOKENS = 16  # what the vLLM backend generates when a request does not say


@dataclass(frozen=True)
class Continuation:
    """Of one prompt."""

    num_prompt_tokens: int
    deltas: tuple[str, ...]
    """The text that each generated token adds."""
    finish_reason: str
    """stop: the model ended it; length."""

    @property
    def text(self) -> str:
        return "".join(self.deltas)


class Reference:
    """A model in transformers. Importing torch takes seconds, so it happens when one is made."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_grad_enabled(False)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def continuation(self, prompt: str, max_tokens: int = MAX_TOKENS) -> Continuation:
        """Greedy, up to the end-of-text token."""
        prompt_ids = self._tokenizer(prompt)["input_ids"]
        generated: list[int] = []
        finish_reason = "length"
        while len(generated) < max_tokens:
            token = int(self._logits(prompt_ids + generated).argmax())
            if token == self._model.config.eos_token_id:
                finish_reason = "stop"
                break
            generated.append(token)
        texts = [self._tokenizer.decode(generated[:count]) for count in range(len(generated) + 1)]
        deltas = tuple(text[len(before) :] for before, text in pairwise(texts))
        return Continuation(len(prompt_ids), deltas, finish_reason)

    def choose(self, prompt: str, choices: Sequence[str]) -> str:
        """Greedy among the tokens that lead to one of ``choices``."""
        prompt_ids = self._tokenizer(prompt)["input_ids"]
        open_choices = {choice: self._tokenizer(choice)["input_ids"] for choice in choices}
        generated: list[int] = []
        while len(open_choices) > 1:
            position = len(generated)
            logits = self._logits(prompt_ids + generated)
            generated.append(
                max((ids[position] for ids in open_choices.values()), key=lambda token: float(logits[token]))
            )
            open_choices = {choice: ids for choice, ids in open_choices.items() if ids[position] == generated[-1]}
        return next(iter(open_choices))

    def _logits(self, token_ids: list[int]) -> Any:
        """Of the next token; a tensor of [vocabulary]. No KV cache: prompts are short, and this is the reference."""
        import torch

        return self._model(torch.tensor([token_ids])).logits[0, -1]
