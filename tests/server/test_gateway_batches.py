"""Batches through OpenAI's own client, in front of a real tritonserver, by a gateway that is killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from flashserve.launcher.ports import free_port
from harness import HTTP, SOURCES, Server, wait_until
from requests_helper import wait_idle


class Gateway:
    """A process with its port and its folder; it can be killed and started again."""

    def __init__(self, server: Server, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, "-m", "flashserve_gateway", "--triton", server.grpc, "--port", str(port),
                         "--data-dir", str(folder)]  # fmt: skip
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env={**os.environ, "PYTHONPATH": ":".join(SOURCES)})

        def is_ready() -> bool:
            try:
                return HTTP.get(f"{self.url}/ready", timeout=10).status_code == 200
            except httpx.TransportError:
                return False

        assert wait_until(is_ready, 30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def gateway(server: Server, tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(server, tmp_path / "data")
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.kill()
        for model in ("paced", "llama"):
            wait_idle(server, model)


def test_each_request_has_one_answer_though_the_gateway_is_killed_twice(gateway: Gateway) -> None:
    lines = [
        {"custom_id": f"{model}-{n}", "method": "POST", "url": "/v1/completions", "body": body}
        for n in range(20)
        for model, body in (
            ("paced", {"model": "paced", "prompt": [1, 2, 3], "max_tokens": 40, "ignore_eos": True}),
            ("llama", {"model": "llama", "prompt": "def f", "max_tokens": 4, "temperature": 0}),
            ("wrong", {"model": "llama", "prompt": "def f", "temperature": -1}),
        )
    ]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")

        def answered() -> int:
            counts = client.batches.retrieve(made.id).request_counts
            return 0 if counts is None else counts.completed + counts.failed

        def kill_after(count: int) -> None:
            assert wait_until(lambda: answered() >= count, 30)
            gateway.kill()
            gateway.start()
            assert count <= answered() < len(lines)

        kill_after(5)
        kill_after(25)
        assert wait_until(lambda: client.batches.retrieve(made.id).status == "completed", 60)
        batch = client.batches.retrieve(made.id)
        assert batch.request_counts is not None and batch.output_file_id and batch.error_file_id
        assert batch.request_counts.to_dict() == {"completed": 40, "failed": 20, "total": 60}
        output, errors = (
            [json.loads(line) for line in client.files.content(name).text.splitlines()]
            for name in (batch.output_file_id, batch.error_file_id)
        )
    assert Counter(row["custom_id"] for row in [*output, *errors]) == Counter(line["custom_id"] for line in lines)
    assert {row["custom_id"].partition("-")[0] for row in errors} == {"wrong"}
    assert {row["response"]["body"]["error"]["param"] for row in errors} == {"temperature"}
    texts = {row["response"]["body"]["choices"][0]["text"] for row in output if row["custom_id"].startswith("llama")}
    assert len(texts) == 1  # greedy: the same before and after


def test_a_folder_that_another_gateway_has_is_refused_with_advice(gateway: Gateway, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    done = subprocess.run(
        [*gateway.command, "--port", "0"],
        env={**os.environ, "PYTHONPATH": ":".join(SOURCES)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and "is used by another gateway" in done.stderr and "--data-dir" in done.stderr
    assert "Traceback" not in done.stderr
