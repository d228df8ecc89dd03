"""Kernels in Triton-lang: in Triton's interpreter on a machine without a GPU, on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

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
