"""One sample of a request as it grows: the engine's outputs go in; text, size and end come out. The stub and the
offline API share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashserve.protocol import ErrorInfo, FinishReason, GenerateRequest, RequestTimings, TokenLogprob, TokenOutput
from flashserve.text.logprobs import Scorer, TokenScore, prompt_scores
from flashserve.text.output import TextStream
from flashserve.text.tokenizer import Tokenizer

PROMPT_TAIL = 8
"""Tokens of context in which the first generated one is decoded, by tokenizers that need some."""


class Delta(NamedTuple):
    """What came since the last one."""

    text: str
    num_tokens: int
    scores: Sequence[TokenScore] = ()
    """Log-probabilities of these tokens, if they are wanted."""
    cumulative_logprob: float = 0.0
    """Of all tokens so far, if log-probabilities are wanted."""


class Completion:
    """Used by one thread. A request for several samples has one for each."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        tail = request.prompt_token_ids[-PROMPT_TAIL:]
        self._stream = TextStream(tokenizer, request.params, tail)
        self._tokenizer, self._request = tokenizer, request
        scores = request.params.logprobs is not None
        self._scorer = Scorer(tokenizer.detokenizers.create(False, tail)) if scores else None
        self._scores: list[TokenScore] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._prompt_taken = False
        self.cumulative_logprob = 0.0
        """Of ``token_ids``, where log-probabilities are wanted."""
        self._parts: list[str] = []
        self.num_delivered = 0
        """Tokens that were in a delta."""
        self.token_ids: list[int] = []
        """Up to and including the one that completed a stop string."""
        self.finish_reason: FinishReason | None = None
        self.error: ErrorInfo | None = None
        """More about the reason "error"."""
        self.timings: RequestTimings | None = None

    @property
    def has_text(self) -> bool:
        """Whether the next delta has some."""
        return bool(self._parts)

    def take(self, output: TokenOutput) -> bool:
        """Add an output, unless it comes after the end.

        Returns whether a stop string ended the sample, of which the engine does not know: it goes on until told.
        """
        if self.finish_reason is not None:
            return False
        stopped = False
        if output.token_ids:
            text, num_tokens, stopped = self._stream.push(output.token_ids, output.finish_reason == "stop")
            self._add(text)
            self.token_ids += output.token_ids[:num_tokens]
            if self._scorer is not None and output.logprobs is not None:
                self._add_scores(self._scorer.score(output.token_ids[:num_tokens], output.logprobs.tokens))
        if output.logprobs is not None:
            self._prompt_logprobs += output.logprobs.prompt
        if output.timings is not None:
            self.timings = output.timings
        self.finish_reason, self.error = "stop" if stopped else output.finish_reason, output.error
        if self.finish_reason is not None:
            self.finish_text()
        return stopped and output.finish_reason is None

    def finish_text(self) -> None:
        """No output follows: what was held back for a stop string that never came is text."""
        self._add(self._stream.finish())
        if self._scorer is not None and self._scores:
            self._scorer.finish(self._scores[-1])
            self._scorer = None

    def delta(self) -> Delta:
        """What came since the last call."""
        num_tokens = len(self.token_ids) - self.num_delivered
        delta = Delta("".join(self._parts), num_tokens, tuple(self._scores), self.cumulative_logprob)
        self._parts.clear()
        self._scores.clear()
        self.num_delivered = len(self.token_ids)
        return delta

    def nothing_new(self) -> Delta:
        """For a response that only says that the request is alive."""
        return Delta("", 0, (), self.cumulative_logprob)

    def take_prompt_scores(self) -> list[TokenScore | None] | None:
        """Those of the prompt's tokens, once, when all are there; None before, after, and where none are wanted."""
        token_ids = self._request.prompt_token_ids
        wanted = self._request.params.prompt_logprobs is not None and not self._prompt_taken
        if not wanted or len(self._prompt_logprobs) < len(token_ids) - 1:
            return None
        self._prompt_taken = True
        return prompt_scores(token_ids, self._prompt_logprobs, self._tokenizer.detokenizers.create(False))

    def _add_scores(self, scores: list[TokenScore]) -> None:
        self._scores += scores
        self.cumulative_logprob += sum(score.token.logprob for score in scores)

    def _add(self, text: str) -> None:
        if text:
            self._parts.append(text)
