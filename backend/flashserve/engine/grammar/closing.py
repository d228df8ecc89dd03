"""Texts of JSON that end as JSON when ``max_tokens`` is near.

A matcher that closes knows, after each token, a few more that would complete the text. A sample after which that would
take more tokens than the request has left is not taken; the text ends with what completes it. Until that very token
the model is as free as without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from flashserve.engine.grammar.matcher import GrammarMatcher

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CLOSING = 512
"""Tokens that a search looks for. What would take more is not followed: then a text may be cut, as without."""
_BEAM_WIDTH, _BEAM_DEPTH = 4, 48
_BESIDE = 3  # of a beam's candidates: the longest tokens, and the shortest
_LOOKED_AT = 256  # of those that are allowed, beside as many of the longest

# What ends more goes before what ends less. In a string a brace is a sign like others.
_ENDINGS_OF_STRINGS = ('"}]', '"]}', '"}}', '"}', '"]', '":"', '":', '"')
_OTHER_ENDINGS = ("}}", "}]", "]}", "]]", "}", "]", '""', '"', ':"', ":", ',"', ",")
_WHOLE = ("null", "true", "false", "0", "1", "10", "100", "1000", "[]", "{}", '""')
_BEGINNINGS = ("1", "0", "{", "[")

Place = Literal["outside", "string", "escape"]
"""Where in JSON a text ends."""


def place_after(text: bytes, place: Place) -> Place:
    """Where a text goes on, which began at ``place``."""
    for sign in text:
        if place == "escape":
            place = "string"
        elif sign == ord('"'):
            place = "outside" if place == "string" else "string"
        elif sign == ord("\\") and place == "string":
            place = "escape"
    return place


class Closings:
    """Looks for short ends of texts. One for each tokenizer; its methods take 10-20 µs per token of an end."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._end_token = tokenizer.eos_token
        self._whole = [tokenizer.tokenize_bytes(text.encode()) for text in _WHOLE]
        self._beginnings = self._single(_BEGINNINGS)
        of_strings, others = self._single(_ENDINGS_OF_STRINGS), self._single(_OTHER_ENDINGS)
        self._endings = {"outside": others, "string": of_strings, "escape": of_strings[:0]}
        ids = range(tokenizer.vocab_size)
        self._lengths = np.array([len(tokenizer.decode_bytes([token])) for token in ids], np.int64)
        self._longest = np.argsort(-self._lengths, kind="stable")[:_LOOKED_AT]

    def completes(self, matcher: LLMatcher, tokens: list[int]) -> bool:
        """Whether the tokens end the text."""
        return bool(matcher.validate_tokens([*tokens, self._end_token]) > len(tokens))

    def place_after(self, tokens: list[int], place: Place) -> Place:
        """Where a text of JSON goes on behind these tokens."""
        return place_after(self._tokenizer.decode_bytes(tokens), place)

    def find(self, matcher: LLMatcher, place: Place = "outside", most: int = MAX_CLOSING) -> list[int] | None:
        """Tokens that end the text, at most so many, often as few as can be; None if none were found."""
        found: list[int] = []
        at = matcher.deep_copy()
        while not at.is_accepting():
            step = self._forced(at) or self._ending(_allowed(at), place) or self._way_to_an_ending(at, place)
            found += step
            if not step or len(found) > min(most, MAX_CLOSING) or not at.consume_tokens(step):
                return None
            place = self.place_after(step, place)
        written = self._tokenizer.tokenize_bytes(self._tokenizer.decode_bytes(found))
        return written if len(written) < len(found) and self.completes(matcher, written) else found

    def _forced(self, matcher: LLMatcher) -> list[int]:
        """What must come next, such as the rest of a name."""
        text = matcher.compute_ff_bytes()
        tokens = self._tokenizer.tokenize_bytes(text) if text else []
        return tokens[: matcher.validate_tokens(tokens)]

    def _ending(self, allowed: np.ndarray, place: Place) -> list[int]:
        """The best of the tokens that end something here."""
        endings = self._endings[place]
        return endings[allowed[endings]][:1].tolist()

    def _way_to_an_ending(self, matcher: LLMatcher, place: Place) -> list[int]:
        """Few tokens behind which something can end, such as a number's or those that a pattern asks for."""
        for tokens in self._whole if place == "outside" else ():
            then = matcher.deep_copy()
            fits = then.validate_tokens(tokens) == len(tokens) and then.consume_tokens(tokens)
            if fits and (then.is_accepting() or self._ending(_allowed(then), place)):
                return tokens
        beam = [(list[int](), matcher, _allowed(matcher))]
        for _ in range(_BEAM_DEPTH):
            grown = []
            for tokens, at, allowed in beam:
                for token in self._candidates(allowed, place):
                    then, path = at.deep_copy(), [*tokens, token]
                    if not then.consume_token(token):
                        continue
                    allowed_then = _allowed(then)
                    if then.is_accepting() or self._ending(allowed_then, self.place_after(path, place)):
                        return path
                    grown.append((path, then, allowed_then))
            # Of each, for what only goes on and on must not be alone.
            beam = grown[:: max(1, len(grown) // _BEAM_WIDTH)][:_BEAM_WIDTH]
        return beam[0][0] if beam else []  # on from there, such as through a long string

    def _candidates(self, allowed: np.ndarray, place: Place) -> list[int]:
        """Long and short tokens, in a string; elsewhere before them what begins something."""
        found = np.flatnonzero(allowed)
        if len(found) > _LOOKED_AT:
            found = np.concatenate([found[:: len(found) // _LOOKED_AT], self._longest[allowed[self._longest]]])
        found = found[np.argsort(-self._lengths[found], kind="stable")]
        parts = [found[:_BESIDE], found[::-1][:_BESIDE]]
        if place == "outside":
            parts.insert(0, self._beginnings[allowed[self._beginnings]])
        return list(dict.fromkeys(np.concatenate(parts).tolist()))

    def _single(self, texts: tuple[str, ...]) -> np.ndarray:
        """Those that are one token."""
        tokens = (self._tokenizer.tokenize_bytes(text.encode()) for text in texts)
        return np.array([ids[0] for ids in tokens if len(ids) == 1], np.int64)


def _allowed(matcher: LLMatcher) -> np.ndarray:
    """[vocabulary] bool"""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").view(bool)


class ClosingMatcher(GrammarMatcher):
    """Follows a grammar, and ends its text in time."""

    def __init__(self, matcher: LLMatcher, end_token: int, closings: Closings, closing: list[int]) -> None:
        """closing: what would end the text from here."""
        super().__init__(matcher, end_token)
        self._closings = closings
        self._closing: list[int] | None = closing
        """None while it would be too long to look for."""
        self._place: Place = "outside"
        self._has_given_up = False

    @property
    def least_tokens(self) -> int:
        return 0 if self._closing is None else len(self._closing)

    def ends_with(self, token_id: int, num_left: int) -> list[int] | None:
        if self._has_given_up or self._has_failed or token_id == self.end_token:
            return None
        closing = self._closing
        if closing is None:
            if num_left >= MAX_CLOSING:
                return None  # it need not be known yet
            closing = self._closings.find(self._matcher, self._place, num_left + 1)
            self._has_given_up = closing is None  # a search without result takes 10 ms, of all requests' time
        then = self._matcher.deep_copy()
        if closing is None or not then.consume_token(token_id):
            return None  # take() reports the latter
        place = self._closings.place_after([token_id], self._place)
        if closing[:1] == [token_id]:
            after: list[int] | None = closing[1:]
        elif len(closing) <= num_left and self._closings.completes(then, closing):
            after = closing
        else:
            after = self._closings.find(then, place, num_left)
        if after is None and num_left < MAX_CLOSING:
            return closing
        self._closing = after
        return None

    def take(self, token_id: int) -> bool:
        if token_id != self.end_token:
            self._place = self._closings.place_after([token_id], self._place)
        return super().take(token_id)

    def copy(self) -> ClosingMatcher:
        """Before the first token."""
        return ClosingMatcher(self._matcher.deep_copy(), self.end_token, self._closings, list(self._closing or ()))
