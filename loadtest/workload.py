"""What is asked: request number N of a run is the same whoever sends it, and different from all others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .lengths import Length
from .streams.base import Ask

CORPUS_PATH = Path(__file__).with_name("corpus.txt")


@dataclass(frozen=True)
class Trouble:
    """Clients that leave or lose patience, as shares of all requests."""

    cancel_share: float = 0.0
    cancel_after: int = 8
    """Tokens."""
    timeout_share: float = 0.0
    timeout_s: float = 1.0


@dataclass(frozen=True)
class Prefixes:
    """Prompts that begin alike: ``share`` of them with one of ``groups`` texts of ``tokens`` tokens."""

    tokens: int = 0
    share: float = 0.0
    groups: int = 1


@dataclass
class Workload:
    """Makes requests. ``chars_per_token`` is what the server's tokenizer was seen to make of the corpus."""

    prompt: Length
    output: Length
    seed: int = 0
    prefixes: Prefixes = Prefixes()
    trouble: Trouble = Trouble()
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 300.0
    chars_per_token: float = 4.0

    @cached_property
    def corpus(self) -> str:
        return CORPUS_PATH.read_text(encoding="utf-8")

    def ask(self, number: int, prompt_tokens: int | None = None, output_tokens: int | None = None,
            blocks: Sequence[int] = ()) -> Ask:  # fmt: skip
        """Request ``number``. A trace gives its lengths, and the ids of its prompt's blocks of 512 tokens."""
        rng = random.Random(f"{self.seed} {number}")
        length = self.prompt.draw(rng) if prompt_tokens is None else prompt_tokens
        max_tokens = self.output.draw(rng) if output_tokens is None else output_tokens
        shares = rng.random() < self.prefixes.share
        group = rng.randrange(self.prefixes.groups)
        leaves, impatient = rng.random() < self.trouble.cancel_share, rng.random() < self.trouble.timeout_share
        if blocks:
            text = "".join(self.text(f"block {block}", 512) for block in blocks)[: self.chars(length)]
        else:
            before = self.text(f"prefix {group}", min(self.prefixes.tokens, length)) if shares else ""
            # Its number comes first, so that no cache of prefixes can know what follows.
            own = f"{number}.{self.seed}\n" + self.text(f"{self.seed} {number}", length)
            text = (before + own)[: self.chars(length)]
        return Ask(
            text,
            max_tokens,
            self.params,
            self.trouble.timeout_s if impatient else self.timeout_s,
            impatient,
            self.trouble.cancel_after if leaves else None,
        )

    def chars(self, tokens: int) -> int:
        return max(1, round(tokens * self.chars_per_token))

    def text(self, name: str, tokens: int) -> str:
        """Text of about so many tokens, from a place in the corpus that the name decides."""
        count, corpus = self.chars(tokens), self.corpus
        start = random.Random(name).randrange(len(corpus))
        copies = (start + count) // len(corpus) + 1
        return (corpus * copies)[start : start + count]
