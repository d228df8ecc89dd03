"""A repository of which one model is served: made for Triton's vLLM backend, with a broken one beside it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import httpx

from harness import Server
from null_models import null_model, write_null_model


def generate(server: Server, model: str) -> str:
    body = {"text_input": "def f(x):", "sampling_parameters": json.dumps({"max_tokens": 8})}
    response = httpx.post(f"{server.http}/v2/models/{model}/generate", json=body, timeout=10)
    assert response.status_code == 200, response.text
    return str(response.json()["text_output"])


def test_a_vllm_model_is_served_as_it_is_beside_a_broken_one(tmp_path: Path) -> None:
    weights = write_null_model(tmp_path / "weights")
    server = Server(
        {"vllm_model": null_model(weights, 5), "broken": {"model": "weights", "max_num_seq": 3}},
        arguments=["--serve-vllm-models"],
        triton_arguments=["--model-control-mode=explicit", "--load-model", "vllm_model"],
    )
    config = 'backend: "vllm"\n\ninstance_group [ { count: 1 kind: KIND_MODEL } ]\n'  # as in vLLM's own example
    (server.repository / "vllm_model" / "config.pbtxt").write_text(config)
    with server:
        assert re.search(r"^ready in .*: vllm_model$", server.log, re.MULTILINE), server.log
        assert generate(server, "vllm_model")
        os.kill(server.stubs("vllm_model")[0].pid, signal.SIGKILL)
        server.wait_for_log("model vllm_model: ready again", 15)
        assert generate(server, "vllm_model")
