"""The tokenizer's files, its limits, and what it refuses."""

import json
import subprocess
import sys

import msgspec
import pytest

from flashserve.errors import ConfigError, InvalidArgument
from flashserve.model_card import read_model_card
from flashserve.protocol import ModelCard
from flashserve.text.generation_defaults import GenerationDefaults, read_generation_defaults
from flashserve.text.tokenizer import MAX_OVERLONG_BYTES, Tokenizer
from small_tokenizers import byte_level, sentencepiece, word_piece


@pytest.fixture
def folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_encodes_and_decodes_like_the_library(folder):
    tokenizer = Tokenizer.from_card(read_model_card(folder))
    text = "def fibonacci(n): # 👋🏽"
    assert tokenizer.encode(text) == byte_level().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_unless_a_template_wrote_them():
    tokenizer = Tokenizer(sentencepiece())
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.encode("hello", add_special_tokens=False)[0] != 1


def test_truncation_and_padding_of_the_training_are_not_applied(folder):
    raw = byte_level()
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    assert len(Tokenizer(raw).encode("one two three")) == len(byte_level().encode("one two three").ids) > 2


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    tokenizer = Tokenizer(byte_level())
    limit = 10 * tokenizer.longest_token
    assert tokenizer.encode("é" * (limit // 2), max_tokens=10)
    with pytest.raises(
        InvalidArgument, match=rf"text_input has {limit + 2} bytes; more than {limit} cannot fit into 10"
    ):
        tokenizer.encode("é" * (limit // 2 + 1), max_tokens=10)


def test_text_that_will_be_cut_may_be_longer_but_not_endless():
    tokenizer = Tokenizer(byte_level())
    assert len(tokenizer.encode("a " * 10_000, max_tokens=10, overlong=True)) > 10
    with pytest.raises(InvalidArgument, match="cannot fit"):
        tokenizer.encode("a" * (MAX_OVERLONG_BYTES + 1), max_tokens=10, overlong=True)


def test_no_text_has_fewer_tokens_than_its_bytes_by_the_longest_token():
    for raw in (byte_level(), sentencepiece()):
        tokenizer = Tokenizer(raw)
        for text in ("the the the", "hello world" * 9, "👋" * 7, "<|endoftext|>" * 5, "</s>" * 3):
            assert len(tokenizer.encode(text)) * tokenizer.longest_token >= len(text.encode())


def test_lone_surrogates_are_no_text():
    with pytest.raises(InvalidArgument, match="chat_request has a lone surrogate at character 2"):
        Tokenizer(byte_level()).encode("ab\ud800", field="chat_request")


def test_a_tokenizer_that_refuses_a_text_makes_it_an_invalid_argument():
    from tokenizers import Tokenizer as Raw
    from tokenizers import models

    with pytest.raises(InvalidArgument, match="text_input cannot be tokenized"):
        Tokenizer(Raw(models.WordLevel({"a": 0}, unk_token="[missing]"))).encode("b")
    assert Tokenizer(word_piece()).encode("hello playing") == [1, 5, 3]


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot load tokenizer\.json"):
        Tokenizer.from_card(read_model_card(tmp_path))
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json of .* must hold a JSON object"):
        Tokenizer.from_card(read_model_card(tmp_path))


def test_special_tokens_for_templates_come_as_text_or_written_out(folder):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None, "other": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_card(read_model_card(folder)).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_configuration_may_lie_in_the_models_folder(folder, tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    (model / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer.from_card(read_model_card(model, folder / "tokenizer.json")).special_tokens == {
        "eos_token": "</s>"
    }


def test_template_files_win_over_the_configuration(folder):
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert Tokenizer.from_card(read_model_card(folder)).config["chat_template"] == "old"
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    templates = Tokenizer.from_card(read_model_card(folder)).config["chat_template"]
    assert templates == {"default": "new", "tool_use": "tools"}


def test_numbers_that_no_message_holds_do_not_keep_a_model_from_loading(folder):
    """transformers writes int(1e30) for a tokenizer without a limit."""
    config = {"model_max_length": int(1e30), "eos_token": "</s>", "odd": "\ud800"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"max_length": int(1e30), "top_k": 5}))
    card = msgspec.msgpack.decode(msgspec.msgpack.encode(read_model_card(folder)), type=ModelCard)
    assert card.tokenizer_config == {"eos_token": "</s>"}
    assert card.generation_config == {"top_k": 5}


def test_generation_defaults_are_the_samplings_and_no_more(tmp_path):
    assert read_generation_defaults(read_model_card(tmp_path).generation_config) == GenerationDefaults()
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "min_p": None, "eos": 1})
    )
    assert read_generation_defaults(read_model_card(tmp_path).generation_config).parameters == {
        "temperature": 0.6,
        "top_k": 20,
        "max_tokens": 99,
    }


def test_the_stub_process_imports_neither_torch_nor_transformers():
    code = (
        "import sys, flashserve.frontend.request_parser, flashserve.text.output\n"
        "heavy = {'torch', 'transformers', 'triton_python_backend_utils'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
