"""The file that Triton's Python backend loads: backends/flashserve/model.py."""

from flashserve.frontend.lifecycle import TritonPythonModel

__all__ = ["TritonPythonModel"]
