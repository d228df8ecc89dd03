"""`make loadtest`: two minutes of load on the demo model, on a server that runs already or one that this starts."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from .interface import INTERRUPTED, MISSED

HTTP_PORT = 8000
MODEL = "demo"
LIVE, READY = "/v2/health/live", f"/v2/models/{MODEL}/ready"
LOADING = f"/v2/repository/models/{MODEL}"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
# A ramp, a spike and a calm end over both protocols; prompts that share a beginning, and clients that leave.
LOAD = (
    *("--model", MODEL),
    *("grpc://localhost:8001", "http://localhost:8000"),
    *("--rate", "2-20@60,60@10,8@40", "--warmup", "10", "--output-tokens", "uniform:16-64"),
    *("--prompt-tokens", "lognormal:96,0.5,400", "--shared-prefix", "48", "--shared-share", "0.5"),
    *("--cancel-share", "0.05", "--p99-ttft", "2000", "--p99-itl", "500", "--max-error-rate", "0.01"),
)


def succeeds(method: str, path: str, timeout_s: float = 2.0) -> bool:
    """Whether the server on the port answers a question with yes."""
    connection = http.client.HTTPConnection("localhost", HTTP_PORT, timeout=timeout_s)
    try:
        connection.request(method, path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """A server with the demo model; one that was there before stays, with the models that it had."""
    if not succeeds("GET", LIVE):
        with own_server():
            yield
        return
    print(f"using the server on port {HTTP_PORT}", flush=True)
    if succeeds("GET", READY):
        yield
        return
    if not succeeds("POST", f"{LOADING}/load", START_TIMEOUT_S):
        sys.exit(f"it does not load the model {MODEL}: end it, and a server that does will be started")
    try:
        yield
    finally:
        succeeds("POST", f"{LOADING}/unload", STOP_TIMEOUT_S)


@contextlib.contextmanager
def own_server() -> Iterator[None]:
    """A server with nothing but the demo model."""
    print("starting a server with the demo model", flush=True)
    command = [sys.executable, "-m", "flashserve.cli", "serve", "--no-gateway", "--", f"--load-model={MODEL}"]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not succeeds("GET", READY):
            if server.poll() is not None:
                sys.exit("the server did not start: its own words are above")
            if time.monotonic() > deadline:
                sys.exit(f"the server was not ready within {START_TIMEOUT_S:g} s")
            time.sleep(0.3)
        yield
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def main() -> int:
    """Returns bench's exit code. Further arguments are bench's, and overrule those above."""
    with serving():
        code = subprocess.call([sys.executable, "-m", "flashserve.cli", "bench", *LOAD, *sys.argv[1:]])
    return 0 if code == MISSED else code  # a slow machine may miss an objective; the demonstration shows that too


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
