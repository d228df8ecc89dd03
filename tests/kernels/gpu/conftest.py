"""Kernels in Triton-lang: in Triton's interpreter on a machine without a GPU, on the GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from driver import load
from flashserve.runner.model_runner import ModelRunner
from triton_interpreter import import_interpreted

ON_GPU = torch.cuda.is_available()

if not ON_GPU:
    import_interpreted()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Some of Triton's functions look at the switch when they are called."""
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of these tests lie."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def load_on_kernels(monkeypatch):
    """``load_on_kernels(folder, **model.json)``: a runner of a small engine, without the steps that warm up, which take
    most of the time here."""
    monkeypatch.setenv("FLASHSERVE_KERNELS", "triton")
    monkeypatch.setattr(ModelRunner, "warm_up", lambda self: None)

    def make(folder, **settings: Any) -> ModelRunner:
        defaults = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 20}
        return load(folder, **{**defaults, **settings})

    return make
