"""What the gateway says of itself, against what it does: `make api-fuzz`.

Schemathesis reads /openapi.json, sends some two thousand requests that it allows or forbids to a gateway in front of a
real tritonserver, and no answer may have a status of 500 or more, or one that the description does not name.
Endpoints that are added are asked without a change here.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from harness import HTTP, ROOT, Server, wait_until
from requests_helper import wait_idle
from shared_servers import REAL
from tiny_models import make_tiny_model

ENVIRONMENT = ROOT / ".venv-api-fuzz"
HOOKS = ROOT / "tests" / "peers" / "api_fuzz" / "hooks.py"
CASES = 2000
MODEL = "smollm2"  # as the description's examples name it
CHECKS = "not_a_server_error,status_code_conformance"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class EmptyHub(BaseHTTPRequestHandler):
    """Stands in for the hub, which a machine that tests may not reach: that would be a 503, as it should."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def gateway(tmp_path: Path, hub: str) -> Iterator[str]:
    """Its URL. Answers end soon, whatever is asked for."""
    model = {"model": str(make_tiny_model("llama", tmp_path / "llama")), **REAL, "max_model_len": 96}
    with Server({MODEL: model}, gateway=True, env={"HF_ENDPOINT": hub, "NO_PROXY": "127.0.0.1"}) as server:

        def is_ready() -> bool:
            try:
                return HTTP.get(f"{server.gateway}/ready", timeout=10).status_code == 200
            except httpx.TransportError:
                return False

        assert wait_until(is_ready, 30), server.log[-4000:]
        yield server.gateway
        wait_idle(server, MODEL)
        assert "Traceback" not in server.log, server.log[-4000:]


def test_no_answer_is_a_failure_or_of_a_status_that_is_not_described(gateway: str, tmp_path: Path) -> None:
    if not (ENVIRONMENT / ".installed").exists():
        pytest.skip("make api-fuzz installs schemathesis")
    description = HTTP.get(f"{gateway}/openapi.json").json()
    with_body = sum("requestBody" in operation for path in description["paths"].values() for operation in path.values())
    command = [
        *(ENVIRONMENT / "bin" / "schemathesis", "run", f"{gateway}/openapi.json", "--checks", CHECKS),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(math.ceil(CASES / with_body))),
        *("--seed", "1", "--continue-on-failure", "--no-shrink", "--warnings", "off", "--suppress-health-check", "all"),
        *("--request-timeout", "60", "--workers", "2"),
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"SCHEMATHESIS_HOOKS": HOOKS.stem, "PYTHONPATH": str(HOOKS.parent), "FLASHSERVE_MODEL": MODEL}
    done = subprocess.run(command, env={**env, "NO_PROXY": "127.0.0.1"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None and int(generated[1]) >= CASES, done.stdout[-2000:]
    figures = HTTP.get(f"{gateway}/metrics").text
    answered = re.search(
        rf'^flashserve_gateway:generation_tokens_total{{model="{MODEL}"}} (\S+)$', figures, re.MULTILINE
    )
    assert answered is not None and float(answered[1]) > CASES, "hardly any request reached the engine"
