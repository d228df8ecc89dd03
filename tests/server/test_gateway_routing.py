"""One gateway in front of two real tritonservers: prompts go where their beginnings are, and away from the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from flashserve.launcher.ports import free_port
from harness import HTTP, SOURCES, Server, wait_until
from null_models import null_model, write_null_model

MODEL = "letters"
LENGTH = 600


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    models = {MODEL: null_model(write_null_model(tmp_path_factory.mktemp("models") / "null"))}
    one, other = Server(models), Server(models)
    one.start(wait=False)  # they start together
    try:
        with other:
            one.wait_ready()
            yield [one, other]
            one.stop()
            one.assert_nothing_left()
    finally:
        one.destroy()


@pytest.fixture(scope="module")
def gateway(servers: list[Server]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "flashserve_gateway", "--port", str(port)]
    for server in servers:
        address = server.metrics.removeprefix("http://").removesuffix("/metrics")
        command += ["--triton", server.grpc, "--triton-metrics", address]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ":".join(SOURCES)})
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return HTTP.get(f"{url}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    try:
        assert wait_until(is_ready, 30)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def ask(gateway: str, token: int) -> str:
    body = {"model": MODEL, "prompt": [token] * LENGTH, "max_tokens": 4, "ignore_eos": True}
    response = HTTP.post(f"{gateway}/v1/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_prompts_come_again_to_the_server_that_has_computed_them(servers: list[Server], gateway: str) -> None:
    answers = {ask(gateway, token) for _ in range(3) for token in range(10, 22)}
    assert len(answers) == 1

    def hits() -> list[float]:
        return [server.metric("vllm:prefix_cache_hits_total", model=MODEL) for server in servers]

    # At the second and the third time. Counters follow within a second.
    assert wait_until(lambda: sum(hits()) > 0.9 * 2 * 12 * LENGTH, 5), hits()
    assert all(hits())  # one server alone would have all twelve once in two thousand runs


def test_a_server_that_dies_costs_no_request(servers: list[Server], gateway: str) -> None:
    expected = ask(gateway, 10)
    (tritonserver,) = servers[0].tritonserver_pids()
    os.kill(tritonserver, signal.SIGKILL)
    assert {ask(gateway, token) for token in range(10, 22)} == {expected}
