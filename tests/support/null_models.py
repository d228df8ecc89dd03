"""Models that compute nothing: a folder of two kilobytes, and an engine whose pace is set in model.json.

They make streams that are slow or endless, and a server with them is ready in a few seconds.
"""

from __future__ import annotations

import http.client
import json
import re
import struct
from pathlib import Path
from typing import Any

from tiny_models import EOS_ID, VOCAB_SIZE, write_byte_level_tokenizer

CONTEXT_LEN = 4096


def write_null_model(folder: Path) -> Path:
    """A Llama without a single weight, which only the null device takes. Returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LEN,
        "eos_token_id": EOS_ID,
        "rms_norm_eps": 1e-6,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    write_byte_level_tokenizer(folder)
    return folder


def null_model(folder: Path, step_ms: float = 0, **settings: Any) -> dict[str, Any]:
    """The model.json of an engine whose steps take ``step_ms`` each."""
    return {"model": str(folder), "device": f"null:{step_ms}", "num_threads": 1, **settings}


class MetricsReader:
    """Reads one model's metrics over a connection that stays open: 2 ms each, for measuring."""

    def __init__(self, url: str, model: str) -> None:
        host, path = url.removeprefix("http://").split("/", 1)
        self._connection = http.client.HTTPConnection(host, timeout=10)
        self._path = f"/{path}"
        self._model = f'model="{model}"'

    def read(self) -> dict[str, float]:
        """Values by name; those of a labelled counter by ``name{label's value}``."""
        self._connection.request("GET", self._path)
        text = self._connection.getresponse().read().decode()
        values = {}
        for name, labels, value in re.findall(r"^([a-z_:]+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if self._model in labels and not name.endswith("_bucket"):
                extra = re.search(r'(?:reason|code|finished_reason)="([^"]*)"', labels)
                values[f"{name}{{{extra[1]}}}" if extra else name] = float(value)
        return values

    def cancelled(self, reason: str = "client") -> int:
        return int(self.read().get(f"flashserve:requests_cancelled_total{{{reason}}}", 0))

    def requests(self) -> tuple[int, int]:
        """How many run and how many wait, 50 ms old at most."""
        values = self.read()
        return int(values["vllm:num_requests_running"]), int(values["vllm:num_requests_waiting"])

    def is_idle(self) -> bool:
        """Whether every block is free and no request is known."""
        values = self.read()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return all(values[name] == 0 for name in names)

    def close(self) -> None:
        self._connection.close()
