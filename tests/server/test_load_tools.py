"""NVIDIA's own load generators, unchanged, against a real tritonserver with the demo model: `make load-tools`.

They lie in an environment of their own (load_tools.txt), for they need other versions than flashserve's client.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT, Server

TOOLS = ROOT / ".venv-load-tools"
WEIGHTS = ROOT / "model_repository" / "demo" / "1" / "weights"
REQUESTS, CONCURRENCY, TOKENS = 40, 4, 16
SAMPLING = {"max_tokens": TOKENS, "ignore_eos": True}
COUNTERS = {"requests": "vllm:request_success_total", "tokens": "vllm:generation_tokens_total"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TOOLS / ".installed").exists(), reason="no load generators: make load-tools installs them"),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with Server({"demo": {"model": str(WEIGHTS)}}) as running:
        yield running


def run_tool(demo: Server, *command: str) -> tuple[str, dict[str, float]]:
    """What a tool printed, and what the server counted meanwhile."""
    before = {name: demo.metric(metric, model_name="demo") for name, metric in COUNTERS.items()}
    cuda = next((TOOLS / "lib").glob("python*/site-packages/nvidia/cuda_runtime/lib"))
    env = {**os.environ, "LD_LIBRARY_PATH": str(cuda)}
    env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [TOOLS / "bin" / command[0], *command[1:]], env=env, capture_output=True, text=True, timeout=90
    )
    if "libb64.so" in done.stderr:
        pytest.skip(f"perf_analyzer needs libb64 (apt install libb64-0d): {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {
        name: demo.metric(metric, model_name="demo") - before[name] for name, metric in COUNTERS.items()
    }


def test_perf_analyzer(demo: Server, tmp_path: Path) -> None:
    inputs, table, profile = tmp_path / "inputs.json", tmp_path / "table.csv", tmp_path / "profile.json"
    row = {"text_input": ["hello"], "stream": [True], "sampling_parameters": [json.dumps(SAMPLING)]}
    inputs.write_text(json.dumps({"data": [row]}))
    printed, counted = run_tool(
        demo,
        *("perf_analyzer", "-m", "demo", "-u", demo.grpc, "-i", "grpc", "--async", "--streaming"),
        *("--input-data", str(inputs), "--concurrency-range", str(CONCURRENCY), "--request-count", str(REQUESTS)),
        *("-f", str(table), "--profile-export-file", str(profile)),
    )
    assert f"Successful request count: {REQUESTS}" in printed
    assert counted == {"requests": REQUESTS, "tokens": REQUESTS * TOKENS}
    [measured] = csv.DictReader(table.open())
    assert int(measured["Concurrency"]) == CONCURRENCY and float(measured["Inferences/Second"]) > 0
    # Each request streamed: its first response comes before its last.
    [experiment] = json.loads(profile.read_text())["experiments"]
    streams = [request["response_timestamps"] for request in experiment["requests"]]
    assert len(streams) == REQUESTS and all(1 < len(stream) <= TOKENS + 1 for stream in streams)


def test_aiperf(demo: Server, tmp_path: Path) -> None:
    template = '{"text_input": {{ text|tojson }}}'
    fields = {"payload_template": template, "response_field": "text_output", "stream": True, **SAMPLING}
    _, counted = run_tool(
        demo,
        *("aiperf", "profile", "--model", "demo", "--url", demo.http, "--streaming", "--endpoint-type", "template"),
        *("--custom-endpoint", "/v2/models/demo/generate_stream", "--extra-inputs", json.dumps(fields)),
        *("--tokenizer", str(WEIGHTS), "--isl", "32", "--random-seed", "1", "--ui", "none", "--workers-max", "1"),
        *("--request-count", str(REQUESTS), "--concurrency", str(CONCURRENCY), "--output-artifact-dir", str(tmp_path)),
    )
    assert counted == {"requests": REQUESTS, "tokens": REQUESTS * TOKENS}
    report: dict[str, Any] = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS and not report["error_summary"]
    assert 0 < report["time_to_first_token"]["p50"] < report["request_latency"]["p50"]
    assert report["inter_token_latency"]["avg"] > 0
