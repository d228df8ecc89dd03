"""flashserve: an LLM backend for NVIDIA Triton Inference Server."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """``LLM`` and ``SamplingParams`` on demand: importing the package loads nothing heavy."""
    if name == "LLM":
        from flashserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from flashserve.protocol import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
