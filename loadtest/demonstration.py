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
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
# A ramp, a spike and a calm end over both protocols; prompts that share a beginning, and clients that leave.
LOAD = (
    *("--model", "demo"),
    *("grpc://localhost:8001", "http://localhost:8000"),
    *("--rate", "2-20@60,60@10,8@40", "--warmup", "10", "--output-tokens", "uniform:16-64"),
    *("--prompt-tokens", "lognormal:96,0.5,400", "--shared-prefix", "48", "--shared-share", "0.5"),
    *("--cancel-share", "0.05", "--p99-ttft", "2000", "--p99-itl", "500", "--max-error-rate", "0.01"),
)


def is_ready() -> bool:
    """Whether the demo model answers."""
    connection = http.client.HTTPConnection("localhost", HTTP_PORT, timeout=2)
    try:
        connection.request("GET", "/v2/models/demo/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """A server with the demo model; one that was there before stays."""
    if is_ready():
        print("using the server on port 8000")
        yield
        return
    print("starting a server with the demo model", flush=True)
    command = [sys.executable, "-m", "flashserve.cli", "serve", "--no-gateway", "--", "--load-model=demo"]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready():
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
