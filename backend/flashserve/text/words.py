"""Words that a request names, as tokens: those it does not want, and those that end a repetition."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import msgspec

from flashserve.errors import InvalidArgument
from flashserve.protocol import EngineLimits, SamplingParams
from flashserve.text.prompt import check_vocabulary
from flashserve.text.tokenizer import Tokenizer


def with_word_ids(params: SamplingParams, tokenizer: Tokenizer, limits: EngineLimits) -> SamplingParams:
    """The parameters with the token ids of their words. Raises InvalidArgument, naming the parameter."""
    words = tuple(ids for word in params.bad_words for ids in _forms(word, tokenizer))
    check_vocabulary("bad_words", list(chain.from_iterable(words)), limits)
    breakers: tuple[int, ...] = ()
    if params.dry_multiplier > 0:
        # The end of a word that is not the first, as text-generation-webui takes it: many tokenizers write a text's
        # first word differently.
        texts = (f"a{breaker}" for breaker in params.dry_sequence_breakers)
        found = (tokenizer.encode(text, add_special_tokens=False, field="dry_sequence_breakers") for text in texts)
        breakers = tuple(ids[-1] for ids in found if ids)
    if not words and not breakers:
        return params
    return msgspec.structs.replace(params, bad_word_ids=words, dry_breaker_ids=breakers)


def _forms(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """A word's tokens at the beginning of a text, and within it, as vLLM finds them
    (`SamplingParams.update_from_tokenizer`): the second form only where the space becomes part of the first token."""
    first = tokenizer.encode(word.lstrip(), add_special_tokens=False, field="bad_words")
    if not first:
        raise InvalidArgument(f"bad_words must be words of at least one token each; {word!r} has none")
    yield tuple(first)
    inner = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False, field="bad_words")
    if inner and inner[0] != first[0] and len(inner) == len(first):
        yield tuple(inner)
