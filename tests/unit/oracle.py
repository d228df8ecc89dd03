"""What sequences must generate on the fake runner, from their messages alone."""

from __future__ import annotations

import random
import zlib

from flashserve.protocol import FinishReason, GenerateRequest

VOCAB_SIZE = 97
EOS = (0, 1)
NONSENSE = -1  # what a step gives that ran on spoiled KV
MAX_DRAFTS = 3

Name = int | tuple[int, int]
"""A sequence: its request's id; (id, index) for the further samples of a request."""


def name_of(request_id: int, index: int) -> Name:
    return (request_id, index) if index else request_id


def request_of(name: Name) -> int:
    return name if isinstance(name, int) else name[0]


class Violation(BaseException):
    """What must not be. No Exception: the engine takes those for faults of its runner, and goes on."""


def check(condition: bool, message: str, *values: object) -> None:
    """Like assert, but stays under ``python -O`` and shows the values."""
    if not condition:
        raise Violation(f"{message}: {values}")


def sample_after(prefix: int, index: int) -> int:
    """The token that the fake model gives after a prefix, known by its chain hash; samples differ from each other."""
    return ((prefix >> 8) + index) % VOCAB_SIZE


def forced_after(prefix: int) -> list[int]:
    """What the fake grammar forces behind a sample, which ends this prefix: nothing, or up to nine tokens."""
    return [(prefix >> (9 + index)) % VOCAB_SIZE for index in range((prefix >> 17) % 13 - 3)]


class Forcing:
    """Allows every sample, and forces what comes behind it. Implements Matcher."""

    follows_samples = True
    is_done = False
    end_token = -1
    least_tokens = 0

    def __init__(self, prefix: int) -> None:
        """prefix: the prompt's."""
        self._prefix = prefix

    def ends_with(self, token_id: int, num_left: int) -> list[int] | None:
        return None

    def forced(self, most: int) -> list[int]:
        return forced_after(self._prefix)[:most]

    def mask(self) -> bytes:
        return bytes(16)

    def take(self, token_id: int) -> bool:
        self._prefix = hash((self._prefix, token_id))
        return True

    def copy(self) -> Forcing:
        return Forcing(self._prefix)


def hidden_state(prefix: int) -> int:
    """What the fake model makes of a prefix's last token; sums of a prompt's are exact in float32."""
    return prefix % 1009


class Oracle:
    """What a sequence must generate and why it must end, from its message alone."""

    def __init__(
        self,
        message: GenerateRequest,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        index: int = 0,
        forces: bool = False,
    ) -> None:
        """forces: whether it keeps to the fake grammar."""
        self.message = message
        self.index = index
        params = message.params
        self.num_prompt = len(message.prompt_token_ids)
        self.ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self.tokens = list(message.prompt_token_ids)
        # Of ints only: Python's hash of these is the same in every process. The salt separates what may be shared.
        self.chain: list[int] = []
        prefix = zlib.crc32(message.cache_salt.encode())
        for token in self.tokens:
            prefix = hash((prefix, token))
            self.chain.append(prefix)
        self.known_after: dict[int, int] = {}
        """How many tokens are known when the sample at a place is, where more are forced behind it."""
        self.limit = max_model_len
        if params.max_tokens is not None:
            self.limit = min(max_model_len, self.num_prompt + params.max_tokens)
        if message.pooling is not None:
            self.reason: FinishReason = "stop"
            self.limit = self.num_prompt + 1  # no row is behind the prompt
            return
        self.reason = "length"
        jumps = forces and params.logprobs is None and not params.bad_word_ids
        while not self._append(self.sample(len(self.tokens) - 1)):
            sampled = len(self.tokens) - 1
            for token in forced_after(self.chain[-1]) if jumps else ():
                if token in self.ends or self._append(token):
                    break
            self.known_after[sampled] = len(self.tokens)
            if len(self.tokens) >= self.limit:
                break

    def _append(self, token: int) -> bool:
        """Whether the text ends with it."""
        self.tokens.append(token)
        self.chain.append(hash((self.chain[-1], token)))
        if token in self.ends and len(self.generated) > self.message.params.min_tokens:
            self.reason = "stop"
            return True
        return len(self.tokens) >= self.limit

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def embedding(self) -> float:
        """Of a request for one: hidden states of the fake model have one dimension."""
        assert self.message.pooling is not None
        states = [hidden_state(prefix) for prefix in self.chain]
        means = {"last": states[-1], "mean": sum(states) / len(states), "cls": states[0]}
        return means[self.message.pooling.pooling]

    def sample(self, position: int) -> int:
        """The sample at ``position``; a sampler masks what would end the request before min_tokens."""
        token = sample_after(self.chain[position], self.index)
        if position + 1 - self.num_prompt < self.message.params.min_tokens:
            while token in self.ends:
                token = (token + 1) % VOCAB_SIZE
        return token


class FakeDrafter:
    """Knows how texts go on, and is wrong now and then. Implements Drafter."""

    def __init__(self, oracles: dict[Name, Oracle]) -> None:
        self._oracles = oracles
        self._rng = random.Random(3)

    def draft(self, token_ids: list[int], limit: int) -> list[int]:
        known = len(token_ids)
        found = next((o for o in self._oracles.values() if o.tokens[:known] == token_ids), None)
        drafts = found.tokens[known : known + MAX_DRAFTS] if found else []
        drafts += [self._rng.randrange(VOCAB_SIZE) for _ in range(MAX_DRAFTS - len(drafts))]
        if self._rng.random() < 0.5:
            drafts[self._rng.randrange(MAX_DRAFTS)] = self._rng.randrange(VOCAB_SIZE)
        return drafts[: min(limit, self._rng.randint(0, MAX_DRAFTS))]
