"""What llguidance is given: grammars as it reads them, its limits, and a model's tokenizer. Loads no torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flashserve.protocol import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r"[\x20\x0A]{1,8}"
"""Between the parts of JSON. Without a bound a model fills its max_tokens with blanks; with none at all those that like
", " end their lists early."""


def grammar_source(wanted: StructuredOutputs) -> str:
    """The grammar as llguidance reads it. Raises ValueError for a schema that is not JSON."""
    from llguidance import LLMatcher

    if wanted.kind == "json":
        pattern = WHITESPACE if wanted.whitespace_pattern is None else wanted.whitespace_pattern
        return str(
            LLMatcher.grammar_from_json_schema(
                wanted.text,
                # They come before what the schema itself says under "x-guidance".
                overrides={
                    "whitespace_flexible": bool(pattern),
                    "whitespace_pattern": pattern or None,
                    "item_separator": ",",
                    "key_separator": ":",
                    "lenient": False,
                    "coerce_one_of": False,
                },
            )
        )
    if wanted.kind == "regex":
        return str(LLMatcher.grammar_from_regex(wanted.text))
    if wanted.kind == "choice":
        # A string of Lark is written as in JSON.
        literals = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(wanted.text)]
        return str(LLMatcher.grammar_from_lark("start: " + "\n  | ".join(literals)))
    return str(LLMatcher.grammar_from_lark(wanted.text))


def make_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """vocab_size: as many as a row of logits has, or the tokenizer knows. Raises ValueError for a tokenizer that
    llguidance cannot read, such as one without a decoder."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids or None)


def compile_grammar(tokenizer: LLTokenizer, source: str) -> tuple[LLMatcher, str]:
    """A matcher at the grammar's beginning, and what is wrong with it, if something is. Drops Python's lock."""
    from llguidance import LLMatcher, LLParserLimits

    # Its limits are those of a step: a mask takes some ms at most.
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # what the first step would meet
    return matcher, _one_line(matcher.get_error())


def _one_line(error: str) -> str:
    if "panic" in error:
        return "its compiler failed on it"
    return " ".join(error.split())[:400]
