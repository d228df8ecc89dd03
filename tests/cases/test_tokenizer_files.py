"""A tokenizer is what transformers' AutoTokenizer makes of its folder."""

import logging

import pytest

from flashserve import LLM
from flashserve.model_card import read_model_card
from flashserve.text.tokenizer import Tokenizer
from model_facts import facts_of
from tiny_models import make_tiny_model, write_byte_level_tokenizer


def automatic(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load(folder):
    return Tokenizer.from_card(read_model_card(folder))


@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_only_the_configuration_adds(tmp_path, edit, special):
    folder = make_tiny_model("llama", tmp_path, vocab_size=513)
    write_byte_level_tokenizer(folder, 512)
    added = {"512": {"content": "<|x|>", "special": special, "lstrip": False, "rstrip": False, "single_word": False,
                     "normalized": False}}  # fmt: skip
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    ids = load(folder).encode("hi<|x|>")
    assert ids == automatic(folder).encode("hi<|x|>", add_special_tokens=False)
    assert ids[-1] == 512
    assert load(folder).decode(ids) == ("hi" if special else "hi<|x|>")


def test_added_tokens_that_are_there_stay_as_they_are(tmp_path, edit):
    folder = make_tiny_model("llama", tmp_path)
    before = load(folder).encode("a<|im_start|>b")
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"1": {"content": "<|im_start|>", "special": True}})
    assert load(folder).encode("a<|im_start|>b") == before


def test_an_added_token_whose_place_is_taken_is_said(tmp_path, edit, caplog):
    folder = make_tiny_model("llama", tmp_path)
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<|new|>", "special": True}})
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "<|new|>" in caplog.text


def test_the_tokenizers_end_token_ends_a_text(tmp_path, edit):
    """Tuned models name the end of a turn there, while config.json still says what the base model said."""
    folder = make_tiny_model("llama", tmp_path)
    settings = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 8 << 20, "num_threads": 1}
    ask = {"temperature": 0, "max_tokens": 12}
    with LLM(folder, **settings) as llm:
        (before,) = llm.generate([[7, 99, 250]], ask)
        fifth = before.token_ids[4]
        word = llm.tokenizer._tokenizer.id_to_token(fifth)
    assert fifth not in before.token_ids[:4]
    edit(folder / "tokenizer_config.json", eos_token=word)
    assert facts_of(folder).eos_token_ids == (0, fifth)
    with LLM(folder, **settings) as llm:
        (result,) = llm.generate([[7, 99, 250]], ask)
    assert (result.finish_reason, len(result.token_ids)) == ("stop", 5)


@pytest.mark.parametrize("eos", [None, "<|none such|>", {"content": "<|endoftext|>"}, 5])
def test_an_end_token_that_names_nothing_new_changes_nothing(tmp_path, edit, eos):
    folder = make_tiny_model("llama", tmp_path)
    edit(folder / "tokenizer_config.json", eos_token=eos)
    assert facts_of(folder).eos_token_ids == (0,)
