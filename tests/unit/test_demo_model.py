"""The demo model's files: what a server needs is there, small enough, and consistent."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

tokenizers = pytest.importorskip("tokenizers")
jinja2 = pytest.importorskip("jinja2")

WEIGHTS = Path(__file__).resolve().parents[2] / "model_repository/demo/1/weights"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)
TEXTS = (
    "",
    " ",
    "def f(a, b=1):\n    return a + b\n",
    "\tif x:\n\t\ty  =  'é – 漢字 🙂'\r\n\r\n  # trailing  \n\n\n    \n",
    "    leading spaces, 1234567 and \x00\x7f control characters",
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer_config():
    return json.loads((WEIGHTS / "tokenizer_config.json").read_text())


def read_header(path: Path) -> dict:
    """The header of a safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def render(tokenizer_config: dict, messages: list[dict], add_generation_prompt: bool) -> str:
    def fail(message: str) -> None:
        raise ValueError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(tokenizer_config["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=fail)


def test_all_files_are_there_and_small():
    sizes = {name: (WEIGHTS / name).stat().st_size for name in FILES}
    assert sum(sizes.values()) <= 20_000_000, sizes


@pytest.mark.parametrize("text", TEXTS)
def test_text_makes_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(tokenizer):
    text = "".join(map(chr, range(0x250)))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_newline_and_its_indentation_are_one_token(tokenizer):
    tokens = tokenizer.encode("def f():\n        return 1").tokens
    assert "Ċ" + 8 * "Ġ" in tokens


def test_special_tokens_agree(tokenizer, tokenizer_config):
    config = json.loads((WEIGHTS / "config.json").read_text())
    generation = json.loads((WEIGHTS / "generation_config.json").read_text())
    end_of_text, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|end|>")
    assert generation["eos_token_id"] == [end_of_text, end]
    assert config["eos_token_id"] == end_of_text
    assert tokenizer_config["eos_token"] == "<|endoftext|>"
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    # No token is put in front of a prompt unasked.
    assert tokenizer.encode("x").ids == tokenizer.encode("x", add_special_tokens=False).ids


def test_chat_template(tokenizer, tokenizer_config):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Write f."},
        {"role": "assistant", "content": "def f(): pass"},
        {"role": "user", "content": "And g?"},
    ]
    text = render(tokenizer_config, messages, add_generation_prompt=True)
    assert text == (
        "<|user|>\nBe short.\nWrite f.<|end|>\n<|assistant|>\ndef f(): pass<|end|>\n"
        "<|user|>\nAnd g?<|end|>\n<|assistant|>\n"
    )
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|user|>")
    assert ids.count(tokenizer.token_to_id("<|end|>")) == 3
    assert render(tokenizer_config, messages[1:3], add_generation_prompt=False).endswith("pass<|end|>\n")
    with pytest.raises(ValueError, match="unknown role"):
        render(tokenizer_config, [{"role": "tool", "content": ""}], add_generation_prompt=False)


def test_weights_are_the_network_of_the_configuration():
    config = json.loads((WEIGHTS / "config.json").read_text())
    header = read_header(WEIGHTS / "model.safetensors")
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    embedding = header["model.embed_tokens.weight"]["shape"]
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    assert "lm_head.weight" not in header  # tied
    assert config["tie_word_embeddings"]
    assert len(header) == 9 * config["num_hidden_layers"] + 2
