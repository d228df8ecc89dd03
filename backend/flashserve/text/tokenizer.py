"""Text to token ids and back, with the ``tokenizers`` library alone.

transformers' AutoTokenizer would load torch into the stub process: 359 MB with a 151k-token vocabulary, against
138 MB here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken

from flashserve.errors import ConfigError, InvalidArgument
from flashserve.paths import native, portable
from flashserve.protocol import ModelCard
from flashserve.text.detokenizer import DetokenizerFactory

log = logging.getLogger(__name__)

TOKEN_KEYS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of an AddedToken
# Text that will be cut or only counted may be longer than the context; this much takes about a second to tokenize.
MAX_OVERLONG_BYTES = 4 * 2**20


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        """``config`` is the content of ``tokenizer_config.json``."""
        # A tokenizer.json may carry the truncation and padding of its training; a server must apply neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.config: Mapping[str, Any] = config or {}
        self.detokenizers = DetokenizerFactory(tokenizer)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_card(cls, card: ModelCard) -> Tokenizer:
        """Load a model's tokenizer. Raises ConfigError."""
        path = native(card.tokenizer_file)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(portable(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"cannot load {path.name}: {error}") from error
        _add_configured_tokens(tokenizer, card.tokenizer_config.get("added_tokens_decoder"))
        return cls(tokenizer, card.tokenizer_config)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token, at most: no prompt has fewer tokens than its bytes divided by this."""
        tokens = (self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size))
        return max((len(token.encode("utf-8", "surrogatepass")) for token in tokens), default=1) or 1

    @cached_property
    def special_token_ids(self) -> dict[str, int]:
        """The tokens that `skip_special_tokens` leaves out of a text, with their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ...: what chat templates may refer to."""
        tokens: dict[str, str] = {}
        for key, value in self.config.items():
            if isinstance(value, dict):
                value = value.get("content")  # written out as an AddedToken
            if key.endswith("_token") and isinstance(value, str):
                tokens[key] = value
        return tokens

    def to_json(self) -> str:
        """The content of a ``tokenizer.json`` with everything that was added to the model's own."""
        return str(self._tokenizer.to_str())

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        max_tokens: int | None = None,
        overlong: bool = False,
        field: str = "text_input",
    ) -> list[int]:
        """Token ids of ``text``; may be empty. ``field`` names it in errors. Raises InvalidArgument.

        ``max_tokens``: how many can be of use. Text that certainly has more is refused before it is tokenized, for
        100 MB of it would keep a core busy for half a minute. ``overlong`` lets some MB pass nevertheless.
        """
        size = len(utf8(text, field))
        if max_tokens is not None:
            most = max(max_tokens * self.longest_token, MAX_OVERLONG_BYTES if overlong else 0)
            if size > most:
                raise InvalidArgument(f"{field} has {size} bytes; more than {most} cannot fit into {max_tokens} tokens")
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises bare Exception, e.g. without a token for unknown characters
            raise InvalidArgument(f"{field} cannot be tokenized: {error}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids must be in [0, 2^32)."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def _add_configured_tokens(tokenizer: tokenizers.Tokenizer, added: Any) -> None:
    """Tokens that only ``tokenizer_config.json`` lists: some tuned models add theirs there alone.

    As in transformers, ``tokenizer.json`` comes first. Raises ConfigError for a list of another form.
    """
    try:
        entries = sorted((int(index), dict(token)) for index, token in (added or {}).items())
        tokens = [
            (index, AddedToken(**{key: token[key] for key in TOKEN_KEYS if key in token})) for index, token in entries
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"added_tokens_decoder of tokenizer_config.json is not a table of tokens: {error}") from error
    for index, token in tokens:
        if tokenizer.token_to_id(token.content) is not None:
            continue
        if tokenizer.id_to_token(index) is not None or tokenizer.get_vocab_size() != index:
            log.warning(
                "tokenizer_config.json adds %r as %d, which is not the next free id: left out", token.content, index
            )
        else:
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])


def utf8(text: str, field: str) -> bytes:
    """The text's UTF-8 form; raises InvalidArgument for lone surrogates, which have none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{field} has a lone surrogate at character {error.start}, so it is not text") from None
