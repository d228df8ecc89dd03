"""Comparisons of kernels with float64, by the error that torch's own op in the same dtype makes."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN everywhere (of integers, their lowest number): an element that was not written shows."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, value, dtype=dtype, device=device)


def assert_as_exact_as_torch(actual: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """The largest error of a result is at most twice that of torch's, but for half a unit in the last place.

    exact: float64. The error is relative to the larger of the value and the tensor's typical magnitude.
    """
    assert actual.dtype == torchs.dtype and actual.shape == torchs.shape
    scale = exact.abs().clamp(min=float(exact.abs().mean()))
    error = float(((actual.cpu().double() - exact) / scale).abs().max())
    allowed = 2 * float(((torchs.cpu().double() - exact) / scale).abs().max())
    allowed = max(allowed, torch.finfo(actual.dtype).eps)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
