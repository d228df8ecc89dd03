"""Drivers of a model's runner, and transformers' answer to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import driver
from driver import Driver
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, for tests that have no model of their own."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """``drive(folder, **model.json)`` gives a loaded Driver; closed at the test's end."""
    drivers: list[Driver] = []

    def make(folder: Path | str = "", **settings: Any) -> Driver:
        drivers.append(Driver(folder=folder, **settings))
        return drivers[-1]

    yield make
    for each in drivers:
        each.runner.close()


@pytest.fixture(scope="session")
def greedy_reference() -> Callable[..., list[list[int]]]:
    """``greedy_reference(folder, prompts, n)``: what transformers' own generate gives in float32."""

    def generate(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return [
            model.generate(torch.tensor([list(prompt)]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[
                0, len(prompt) :
            ].tolist()
            for prompt in prompts
        ]

    return generate


@pytest.fixture(scope="session")
def random_prompts() -> Callable[..., list[list[int]]]:
    """``random_prompts(lengths)``: token ids without special tokens."""
    return driver.random_prompts
