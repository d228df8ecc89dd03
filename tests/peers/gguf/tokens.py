"""llama.cpp's tokens of tests/support/hard_texts.py, for tests/support/hard_texts.tokens.json.

pip install --no-deps xllamacpp httpx      # llama.cpp in a wheel; 2026.10 made the file
python tests/peers/gguf/tokens.py FILE.gguf… > tests/support/hard_texts.tokens.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
import xllamacpp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from hard_texts import TEXTS


def tokens(file: Path) -> list[list[int]]:
    """Of each text, with what stands before every text, special tokens being such."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 256, 1, False
    server = xllamacpp.Server(params)
    bodies = ({"content": text, "add_special": True, "parse_special": True} for text in TEXTS)
    return [httpx.post(f"{server.listening_address}/tokenize", json=body).json()["tokens"] for body in bodies]


def main() -> None:
    parts = []
    for file in map(Path, sys.argv[1:]):
        lines = ",\n".join(json.dumps(ids, separators=(",", ":")) for ids in tokens(file))
        parts.append(f"{json.dumps(file.name)}: [\n{lines}\n]")
    print("{\n" + ",\n".join(parts) + "\n}", flush=True)
    os._exit(0)  # its servers wait for requests


if __name__ == "__main__":
    main()
