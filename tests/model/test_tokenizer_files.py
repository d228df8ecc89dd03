"""Models without a tokenizer.json get one, converted once."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from flashserve.errors import ConfigError
from model_facts import facts_of
from tiny_models import make_tiny_model

TEXT = "def hello(name):\n    return 'höllo ' + name  # 😀"


@pytest.fixture
def gpt2_folder(tmp_path, monkeypatch):
    """A model with GPT-2's own files, vocab.json and merges.txt, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_tiny_model("gpt2", tmp_path / "model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    original = folder / "tokenizer.json"
    return folder, original.rename(tmp_path / "original.json")


def tokenizer_file(folder, **settings) -> str:
    return facts_of(folder, **settings).card.tokenizer_file


def test_vocab_and_merges_are_converted_once(gpt2_folder, tmp_path, monkeypatch):
    folder, original = gpt2_folder
    converted = tokenizer_file(folder)
    assert converted.startswith(str(tmp_path / "cache" / "flashserve" / "tokenizers"))
    ids = Tokenizer.from_file(str(original)).encode(TEXT).ids
    assert Tokenizer.from_file(converted).encode(TEXT).ids == ids
    assert Tokenizer.from_file(converted).decode(ids) == TEXT
    # The second time nothing is converted: transformers is not even asked.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    assert tokenizer_file(folder) == converted
    # Other files, another conversion.
    with (folder / "merges.txt").open("a") as stream:
        stream.write("\n")
    with pytest.raises(ConfigError, match="cannot be converted"):
        tokenizer_file(folder)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_sentencepiece_is_converted(tmp_path, monkeypatch):
    import sentencepiece

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_tiny_model("llama", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the quick brown fox number {i} jumps over the lazy dog" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    converted = Tokenizer.from_file(tokenizer_file(folder))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = converted.encode("the quick fox", add_special_tokens=False).ids
    assert converted.decode(ids).strip() == "the quick fox"
    assert [expected.id_to_piece(i) for i in ids] == expected.encode("the quick fox", out_type=str)


def test_a_tokenizer_from_another_folder(gpt2_folder, tmp_path):
    folder, _ = gpt2_folder
    other = make_tiny_model("llama", tmp_path / "other")
    assert tokenizer_file(folder, tokenizer=str(other)) == str(other / "tokenizer.json")


def test_no_tokenizer_at_all(tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        tokenizer_file(folder)
