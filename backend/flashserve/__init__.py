"""flashserve: an LLM backend for NVIDIA Triton Inference Server."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "PoolingParams", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """``LLM`` and what it is asked with on demand: importing the package loads nothing heavy."""
    if name == "LLM":
        from flashserve.llm import LLM

        return LLM
    if name in ("PoolingParams", "SamplingParams"):
        from flashserve import protocol

        return getattr(protocol, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
