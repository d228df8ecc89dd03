"""Drivers of a model's runner, and transformers' answer to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import driver
from driver import Driver
from flashserve.runner.device import CpuDevice
from flashserve.runner.model_runner import ModelRunner
from lazy_device import LazyCpu
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, for tests that have no model of their own."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["native", "torch", "late"])
def on_each_device(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``on_each_device(**model.json)``: a runner on each kind of ops, and on a device that is late."""
    if request.param != "late":
        monkeypatch.setenv("FLASHSERVE_KERNELS", request.param)
    runners: list[ModelRunner] = []

    def make(**settings: Any) -> ModelRunner:
        device = LazyCpu(1) if request.param == "late" else CpuDevice()
        runners.append(driver.load(folder, device, **settings))
        return runners[-1]

    yield make
    for each in runners:
        each.close()


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
