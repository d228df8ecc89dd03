"""What is asked: request number N of a run is the same whoever sends it, and different from all others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .lengths import Length
from .record import Record
from .streams.base import Ask

ONE_TURN = Length("fixed", 1, 1)
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
class Conversation:
    """What a user of a closed loop has said and heard so far."""

    turns_left: int = 0
    history: tuple[tuple[str, str], ...] = ()

    def begin(self, turns: int) -> None:
        self.turns_left, self.history = turns, ()

    def add(self, prompt: str, record: Record) -> None:
        """A turn that has ended; without a whole answer nobody goes on."""
        self.turns_left = self.turns_left - 1 if record.error is None else 0
        self.history = (*self.history, (prompt, record.answer))


@dataclass
class Workload:
    """Makes requests. ``chars_per_token`` is what the server's tokenizer was seen to make of the corpus."""

    prompt: Length
    """Of what is new in a turn."""
    output: Length
    seed: int = 0
    prefixes: Prefixes = Prefixes()
    trouble: Trouble = Trouble()
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 300.0
    turns: Length = ONE_TURN
    """Of a conversation."""
    think_s: float = 0.0
    """Between an answer and its user's next turn."""
    chars_per_token: float = 4.0

    @cached_property
    def corpus(self) -> str:
        return CORPUS_PATH.read_text(encoding="utf-8")

    def ask(self, number: int, prompt_tokens: int | None = None, output_tokens: int | None = None,
            blocks: Sequence[int] = (), history: tuple[tuple[str, str], ...] = ()) -> Ask:  # fmt: skip
        """Request ``number``. A trace gives its lengths, and the ids of its prompt's blocks of 512 tokens. Only the
        first turn of a conversation begins like others."""
        rng = random.Random(f"{self.seed} {number}")
        length = self.prompt.draw(rng) if prompt_tokens is None else prompt_tokens
        max_tokens = self.output.draw(rng) if output_tokens is None else output_tokens
        shares = rng.random() < self.prefixes.share and not history
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
            history,
        )

    def new_turns(self, number: int) -> int:
        """How many turns the conversation has that request ``number`` begins."""
        return self.turns.draw(random.Random(f"turns {self.seed} {number}"))

    def chars(self, tokens: int) -> int:
        return max(1, round(tokens * self.chars_per_token))

    def text(self, name: str, tokens: int) -> str:
        """Text of about so many tokens, from a place in the corpus that the name decides."""
        count, corpus = self.chars(tokens), self.corpus
        start = random.Random(name).randrange(len(corpus))
        copies = (start + count) // len(corpus) + 1
        return (corpus * copies)[start : start + count]
