"""A GGUF file's tokenizer: what its metadata say, made a tokenizer.json once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from flashserve.errors import ConfigError
from flashserve.models.gguf.metadata import Metadata
from flashserve.models.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from flashserve.models.source import cached_tokenizer

log = logging.getLogger(__name__)

PREFIX = "tokenizer."
KIND, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, TYPES, MERGES, SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores"))
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
KINDS = {BYTE_LEVEL: "byte-level BPE", SENTENCEPIECE: "SentencePiece"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"),
        *("<EOT>", "_<EOT>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
    )
)
"""Tokens that end a turn or a text wherever they are in a vocabulary. Most files name one end of several: Gemma's
say <eos> and their answers end with <end_of_turn>."""
_SPACE = "▁"
_MAX_LENGTH = 1024
"""Characters of a token that is cut in two at every place. SentencePiece makes none of more than 16 by default; one of
100,000 would take two seconds, and twice as long four times that."""
_FORMAT = b"1"
"""Of what is made here; another number makes every tokenizer anew."""


def check_tokenizer(metadata: Metadata) -> None:
    """Raises ConfigError for a kind or a pre-tokenizer that is not known, which it names."""
    kind = metadata.text(KIND)
    if kind not in KINDS:
        known = ", ".join(f"{name} ({words})" for name, words in KINDS.items())
        raise ConfigError(f"{metadata.name}: {KIND} {kind!r} is not supported; supported: {known}")
    if kind == BYTE_LEVEL and metadata.text(PRE, "default") not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{metadata.name}: {PRE} {metadata.text(PRE)!r} is not known, and another rule would give wrong tokens; "
            'name the model whose tokenizer it is: "tokenizer" in model.json'
        )


def tokenizer_file(metadata: Metadata) -> Path:
    """A tokenizer.json. Raises ConfigError for tokens, types, merges or scores that do not fit together."""
    check_tokenizer(metadata)
    digest = hashlib.sha256(_FORMAT + metadata.digest(PREFIX).encode()).hexdigest()

    def save(target: Path) -> None:
        try:
            build_tokenizer(metadata).save(str(target))
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{metadata.name}: its tokenizer cannot be built: {error}") from error

    return cached_tokenizer(digest, save)


def tokenizer_config(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    """What tokenizer_config.json would say: chat templates, and the tokens that these refer to."""
    config: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.integer(f"tokenizer.ggml.{key}_token_id", -1, minimum=0)
        if 0 <= token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    prefix = "tokenizer.chat_template"
    templates = {key.removeprefix(f"{prefix}."): metadata.text(key) for key in metadata.keys(f"{prefix}.")}
    if prefix in metadata:
        templates["default"] = metadata.text(prefix)
    return {**config, "chat_template": templates} if templates else config


def end_token_ids(metadata: Metadata, tokens: list[str]) -> list[int]:
    """Those that the file names, then those whose names say it."""
    named = [metadata.integer(key, minimum=0) for key in END_KEYS if key in metadata]
    return [*named, *(index for index, token in enumerate(tokens) if token in END_NAMES)]


def build_tokenizer(metadata: Metadata) -> tokenizers.Tokenizer:
    """Of a kind that was checked. Raises ConfigError."""
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata.strings(TOKENS))]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ConfigError(f"{metadata.name}: {TOKENS} holds {twice!r} twice")
    types = metadata.numbers(TYPES) if TYPES in metadata else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ConfigError(f"{metadata.name}: {TYPES} has {len(types)} values for {len(tokens)} tokens")
    is_byte_level = metadata.text(KIND) == BYTE_LEVEL
    rule = PRE_TOKENIZERS[metadata.text(PRE, "default")] if is_byte_level else None
    tokenizer = _byte_level(metadata, vocab, rule) if rule else _sentencepiece(metadata, tokens, vocab, types)
    _add_tokens(tokenizer, tokens, types)
    _add_ends(metadata, tokenizer, tokens, add_bos=rule.add_bos if rule else True)
    return tokenizer


def _byte_level(metadata: Metadata, vocab: dict[str, int], rule: PreTokenizer) -> tokenizers.Tokenizer:
    if PRE not in metadata:
        log.warning("%s names no %s: its tokens for numbers and punctuation may be others", metadata.name, PRE)
    merges = []
    for index, merge in enumerate(metadata.strings(MERGES)):
        split = merge.find(" ", 1)
        if split < 0:
            raise ConfigError(f"{metadata.name}: {MERGES}[{index}] is no pair: {merge[:60]!r}")
        merges.append((merge[:split], merge[split + 1 :]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Metadata, tokens: list[str], vocab: dict[str, int], types: list[int]
) -> tokenizers.Tokenizer:
    """Merges with "▁" for a space, and bytes for what the vocabulary lacks."""
    scores = metadata.numbers(SCORES)
    if len(scores) != len(tokens):
        raise ConfigError(f"{metadata.name}: {SCORES} has {len(scores)} values for {len(tokens)} tokens")
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id", 0, minimum=0)
    model = models.BPE(
        vocab,
        _merges_by_score(metadata.name, tokens, vocab, types, scores),
        unk_token=tokens[unknown] if unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
    )
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    prefix_space = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix_space else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    return tokenizer


def _merges_by_score(
    name: str, tokens: list[str], vocab: dict[str, int], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose token has the best score; so every way to cut a token in two is a merge.
    name: the file's. Raises ConfigError."""
    order = sorted((i for i, kind in enumerate(types) if kind == NORMAL), key=lambda i: -scores[i])
    merges = []
    for token in (tokens[index] for index in order):
        if len(token) > _MAX_LENGTH:
            raise ConfigError(f"{name}: {TOKENS} holds a token of {len(token)} characters, more than {_MAX_LENGTH}")
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += [(left, right) for left, right in cuts if left in vocab and right in vocab]
    return merges


def _add_tokens(tokenizer: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Those that are found in a text as they are: control tokens, which have no text, and those users defined."""

    def added(token: str, special: bool) -> AddedToken:
        return AddedToken(token, normalized=False, special=special)

    pairs = list(zip(tokens, types, strict=True))
    is_special = [kind in (UNKNOWN, CONTROL) or token in END_NAMES for token, kind in pairs]
    tokenizer.add_special_tokens([added(t, True) for t, special in zip(tokens, is_special, strict=True) if special])
    tokenizer.add_tokens([added(token, False) for token, kind in pairs if kind == USER_DEFINED])


def _add_ends(metadata: Metadata, tokenizer: tokenizers.Tokenizer, tokens: list[str], add_bos: bool) -> None:
    """What stands before and after every text. add_bos: where the file says nothing and has one."""
    bos = _added_token(metadata, tokens, "bos", add_bos and "tokenizer.ggml.bos_token_id" in metadata)
    eos = _added_token(metadata, tokens, "eos", False)
    if bos or eos:
        template = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[*bos, *eos])


def _added_token(metadata: Metadata, tokens: list[str], name: str, default: bool) -> list[tuple[str, int]]:
    """One token with its id, or none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if not metadata.flag(f"tokenizer.ggml.add_{name}_token", default):
        return []
    token_id = metadata.integer(key, minimum=0)
    if token_id >= len(tokens):
        raise metadata.error(key, f"must be below {len(tokens)}", token_id)
    return [(tokens[token_id], token_id)]
