"""The default model: SmolLM2 from its package's GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashserve import LLM
from flashserve.config import EngineConfig
from flashserve.models.registry import open_model
from flashserve.text.chat_template import ChatRequest, ChatTemplate
from real_models import SMOLLM2, smollm2

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"device": "cpu", "kv_cache_memory_bytes": 64 << 20, "num_threads": 2}
PROMPTS = ("The three primary colours are", "def fibonacci(n):\n", "Es war einmal ein")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def file():
    return smollm2()


def ask(card, question):
    template = ChatTemplate(card.tokenizer_config["chat_template"], {})
    return template.render(ChatRequest.from_mapping({"messages": [{"role": "user", "content": question}]}))


def test_it_answers(file):
    # As it is served. With its weights in their blocks, and so with activations of 8 bits, "L'Étoile" comes first, as
    # it does in llama.cpp (by 0.16).
    served = json.loads((ROOT / "model_repository" / "smollm2" / "1" / "model.json").read_text())
    assert served["override_generation_config"] == {"temperature": 0}
    files = open_model(EngineConfig(SMOLLM2))
    assert files.end_token_ids(files.config["vocab_size"]) == (2, 0)  # <|im_end|>, <|endoftext|>
    with LLM(**{**served, **SETTINGS}) as llm:
        (answer,) = llm.generate([ask(files.card, "What is the capital of France?")], {"temperature": 0})
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


def test_greedy_tokens_are_those_of_transformers(file):
    pytest.importorskip("gguf", reason="transformers needs it to read the file: `make install`")
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with LLM(SMOLLM2, dtype="float32", quantization="dense", **SETTINGS) as llm:
        answers = llm.generate(list(PROMPTS), {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True})
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for answer in answers:  # each token is the best one after those before it
        known = torch.tensor([[*answer.prompt_token_ids, *answer.token_ids]])
        with torch.inference_mode():
            best = model(known).logits[0].argmax(-1)
        assert answer.token_ids == best[len(answer.prompt_token_ids) - 1 : -1].tolist()
