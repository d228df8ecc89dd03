"""Tokens of hard texts are llama.cpp's, of both kinds of tokenizer; and of every pre-tokenizer those of its models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from flashserve.models.gguf.header import read_headers
from flashserve.models.gguf.metadata import Metadata
from flashserve.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from flashserve.models.gguf.tokenizer import BYTE_LEVEL, build_tokenizer
from hard_texts import TEXTS
from real_models import gemma3, smollm2

# Made by tests/peers/gguf/tokens.py.
REFERENCE = json.loads((Path(__file__).parents[1] / "support" / "hard_texts.tokens.json").read_text())


def tokenizer_of(file: Path) -> tokenizers.Tokenizer:
    return build_tokenizer(Metadata(read_headers(file)[0]))


def test_byte_level_tokens_are_llama_cpps():
    file = smollm2()
    tokenizer = tokenizer_of(file)
    assert [tokenizer.encode(text).ids for text in TEXTS] == REFERENCE[file.name]


def test_sentencepiece_tokens_are_llama_cpps(tmp_path):
    file = gemma3(tmp_path)
    tokenizer = tokenizer_of(file)
    assert [tokenizer.encode(text).ids for text in TEXTS] == REFERENCE[file.name]


def test_texts_come_back_as_they_were():
    tokenizer = tokenizer_of(smollm2())
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def pieces(patterns):
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    rule = pre_tokenizers.Sequence(splits)
    return [[piece for piece, _ in rule.pre_tokenize_str(text)] for text in TEXTS]


def test_pre_tokenizers_are_transformers_where_it_knows_them():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = GGUF_PRE_TOKENIZER_SPLITS.keys() & PRE_TOKENIZERS.keys()
    assert len(shared) > 15
    for name in sorted(shared):
        assert pieces(PRE_TOKENIZERS[name].patterns) == pieces([GGUF_PRE_TOKENIZER_SPLITS[name]]), name


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("smollm", "ab 123  x", ["ab", " ", "1", "2", "3", " ", " x"]),
        ("gpt-2", "ab 123  x", ["ab", " 123", " ", " x"]),
        ("default", "ab 12345=>", ["ab", " ", "123", "45", "=>"]),
        ("falcon", "a`b 12345", ["a", "`", "b", " ", "123", "45"]),
        ("llama-bpe", "IT'S 12345", ["IT", "'S", " ", "123", "45"]),
        ("qwen2", "it's 12", ["it", "'s", " ", "1", "2"]),
        ("tekken", "HelloWorld", ["Hello", "World"]),
        ("deepseek-llm", "ab 漢字12\n", ["ab", " ", "漢字", "12", "\n"]),
        ("deepseek-v3", "ab 漢字12345", ["ab", " ", "漢字", "123", "45"]),
        ("bloom", "ab, 12", ["ab", ",", " 12"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(name, text, expected):
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    assert [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)] == expected


def test_every_rule_can_be_compiled_and_loses_nothing():
    for name, rule in PRE_TOKENIZERS.items():
        assert ["".join(found) for found in pieces(rule.patterns)] == list(TEXTS), name
    assert BYTE_LEVEL == "gpt2"
