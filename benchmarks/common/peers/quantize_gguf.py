"""Quantises a Llama checkpoint as llama.cpp does: python quantize_gguf.py MODEL_FOLDER FILE.gguf Q4_K_M

By llama.cpp's own quantizer, in its mixture of types: Q4_K_M has a few tensors in Q6_K. It needs no importance matrix,
so random weights do.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp

from benchmarks.common.peers.write_gguf import write_gguf


def quantize_gguf(folder: Path, file: Path, name: str) -> None:
    full = file.with_suffix(".full.gguf")
    write_gguf(folder, full)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    try:
        status = llama_cpp.llama_model_quantize(str(full).encode(), str(file).encode(), ctypes.byref(parameters))
    finally:
        full.unlink()
    if status != 0:
        raise SystemExit(f"llama.cpp's quantizer gave {status}; its log says why")


if __name__ == "__main__":
    quantize_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
