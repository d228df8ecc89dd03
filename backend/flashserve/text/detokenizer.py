"""Incremental detokenizing: exact, valid UTF-8 at every step, and cheap enough for every token.

Decoding a growing sequence again for each token costs 20 us and more, and cutting text windows (as most servers
do) guesses at the edges. Here a token's bytes are looked up once, and only bytes are kept between the calls:

- ByteLevel decoders (GPT-2, Llama 3, Qwen, SmolLM): a token is bytes; the stream is decoded as UTF-8.
- SentencePiece-style decoders (Llama 2, Mistral, TinyLlama): a token is text, with "▁" for a space, or one byte.
- Any other decoder: ``tokenizer.decode`` over a short window of tokens.

The pieces add up to ``tokenizers``' own ``decode`` of all ids, with one exception: where bytes that are a whole
character are followed by broken ones, ByteFallback replaces the whole run of bytes, the good character included.
A stream has shown that character already (holding it back would delay every newline of Llama 2, and with it the
stop strings), so it stays, and U+FFFD stands for each byte after it.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer(ABC):
    """Text of one sequence of tokens."""

    @abstractmethod
    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; characters that are not whole yet are held back."""

    @abstractmethod
    def peek(self, token_id: int) -> str:
        """What ``feed`` would give for a token, without taking it."""

    @abstractmethod
    def finish(self) -> str:
        """The sequence has ended: U+FFFD for what never became a character."""


class DetokenizerFactory:
    """Makes detokenizers of one tokenizer; they share its table of token bytes, which fills as tokens appear."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = _steps(tokenizer)
        self._make: Callable[[bool, Sequence[int]], Detokenizer]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            byte_tables = [_ByteTable(tokenizer, skip_special) for skip_special in (False, True)]
            self._make = lambda skip, _tail: ByteLevelDetokenizer(byte_tables[skip])
        elif (rules := _piece_rules(steps)) is not None:
            tables = [_PieceTable(tokenizer, skip_special, rules) for skip_special in (False, True)]
            self._make = lambda skip, _tail: PieceDetokenizer(tables[skip])
        else:
            self._make = lambda skip, tail: WindowDetokenizer(tokenizer, skip, tail)

    def create(self, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()) -> Detokenizer:
        """One for tokens that continue a prompt, so that a leading space stays.

        ``prompt_tail`` holds some last tokens of that prompt; only decoders without an incremental form look at it.
        """
        return self._make(skip_special_tokens, prompt_tail)


def _steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps, nested sequences flattened. No decoder is no step."""

    def flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step["type"] == "Sequence":
            return [inner for child in step["decoders"] for inner in flatten(child)]
        return [step]

    if tokenizer.decoder is None:
        return []
    return flatten(json.loads(tokenizer.decoder.__getstate__()))


# --- ByteLevel ---------------------------------------------------------------------------------------------


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


class _ByteTable(dict[int, bytes]):
    """Bytes of each token; filled on first use, so that start costs nothing."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skipped = special_token_ids(tokenizer) if skip_special else frozenset()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            value = b""  # special, or an id in the padding of the embedding table: no text
        elif all(char in BYTE_OF_CHAR for char in token):
            value = bytes(BYTE_OF_CHAR[char] for char in token)
        else:
            value = token.encode()  # an added token is text, not bytes
        self[token_id] = value
        return value


class ByteLevelDetokenizer(Detokenizer):
    """Tokens are bytes of UTF-8 text."""

    def __init__(self, table: _ByteTable) -> None:
        self._lookup = table.__getitem__
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._lookup, token_ids)))

    def peek(self, token_id: int) -> str:
        state = self._decoder.getstate()
        text = self.feed((token_id,))
        self._decoder.setstate(state)
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


# --- SentencePiece -----------------------------------------------------------------------------------------


class _PieceRules:
    """How a decoder turns a token into text."""

    def __init__(self) -> None:
        self.replacements: list[tuple[str, str]] = []
        self.byte_fallback = False


def _piece_rules(steps: list[dict[str, Any]]) -> _PieceRules | None:
    """The rules of a SentencePiece-style decoder: [Replace*, ByteFallback?, Fuse, Strip?] or [Metaspace].

    What such a decoder drops at the start of a text is of no concern: ours continue one.
    """
    rules = _PieceRules()
    kinds = [step["type"] for step in steps]
    if kinds == ["Metaspace"]:
        rules.replacements.append((steps[0]["replacement"], " "))
        return rules
    if not re.fullmatch(r"(Replace )*(ByteFallback )?Fuse (Strip )?", "".join(f"{kind} " for kind in kinds)):
        return None
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"] or not step["pattern"]["String"]:
                return None
            rules.replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "ByteFallback":
            rules.byte_fallback = True
        elif step["type"] == "Strip" and step["stop"]:
            return None
    return rules


BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _PieceTable(dict[int, "str | int | None"]):
    """Per token its text, or one byte as an int, or None if it has no text (and separates nothing)."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, rules: _PieceRules) -> None:
        super().__init__()
        self.rules = rules
        self._tokenizer = tokenizer
        self._skipped = special_token_ids(tokenizer) if skip_special else frozenset()

    def __missing__(self, token_id: int) -> str | int | None:
        value: str | int | None = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if value is not None:
            for old, new in self.rules.replacements:
                value = str(value).replace(old, new)
            if self.rules.byte_fallback and (match := BYTE_TOKEN.fullmatch(str(value))):
                value = int(match[1], 16)
        self[token_id] = value
        return value


class PieceDetokenizer(Detokenizer):
    """Tokens are pieces of text or single bytes."""

    def __init__(self, table: _PieceTable) -> None:
        self._table = table
        self._run = bytearray()
        """Byte tokens that are no whole character yet."""
        self._run_broken = False
        """The present run of byte tokens is no UTF-8."""

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = list(map(self._table.__getitem__, token_ids))
        if not self._run and not self._run_broken and None not in pieces:
            try:
                return "".join(pieces)  # type: ignore[arg-type]
            except TypeError:
                pass  # a byte token is among them
        return "".join(map(self._one, pieces))

    def peek(self, token_id: int) -> str:
        run, broken = bytes(self._run), self._run_broken
        text = self.feed((token_id,))
        self._run[:], self._run_broken = run, broken
        return text

    def finish(self) -> str:
        return self._end_run()

    def _one(self, piece: str | int | None) -> str:
        if piece is None:
            return ""
        if isinstance(piece, str):
            return self._end_run() + piece
        if self._run_broken:
            return REPLACEMENT
        self._run.append(piece)
        try:
            text = self._run.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            self._run_broken = True
            text = REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._run)
        self._run.clear()
        self._run_broken = False
        return text


# --- anything else -----------------------------------------------------------------------------------------


class WindowDetokenizer(Detokenizer):
    """Decodes a window of the last tokens twice, without and with the new ones; the difference is new text.

    The way of vLLM and TGI. A window is needed because such decoders join tokens by what stands next to them.
    """

    WINDOW = 6

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._known = list(prompt_tail[-self.WINDOW :])
        self._new: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def peek(self, token_id: int) -> str:
        known, new = self._known, list(self._new)
        text = self._feed_one(token_id)
        self._known, self._new = known, new
        return text

    def _feed_one(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._difference()
        if len(self._new) < self.WINDOW and (not text or text.endswith(REPLACEMENT)):
            return ""  # perhaps a character that is not whole yet
        self._known, self._new = (self._known + self._new)[-self.WINDOW :], []
        return text

    def finish(self) -> str:
        return self._difference() if self._new else ""

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._known, skip_special_tokens=self._skip)
        after = self._tokenizer.decode(self._known + self._new, skip_special_tokens=self._skip)
        return after[len(before) :]


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that ``skip_special_tokens`` leaves out."""
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
