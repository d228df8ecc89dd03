"""When the server ends, each stream gets its finish or its error, and the server's own bound holds."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

from harness import HTTP, Server, wait_until
from null_models import null_model, write_null_model

NUM_STREAMS = 8
END_S = 10.0


def test_requests_that_may_run_for_long_are_told_too(tmp_path: Path) -> None:
    """A minute to finish is more than the server has: once, whatever still ran was cut off without a word."""
    with Server({"demo": null_model(write_null_model(tmp_path / "null"), 20, drain_timeout_s=60)}) as server:
        lines: list[list[str]] = [[] for _ in range(NUM_STREAMS)]
        errors: list[Exception] = []

        def read(number: int) -> None:
            # Every second stream ends by itself within the time.
            params = json.dumps({"max_tokens": 3000 if number % 2 else 60, "ignore_eos": True})
            body = {"text_input": "hello", "stream": True, "sampling_parameters": params, "return_finish_reason": True}
            url = f"{server.http}/v2/models/demo/generate_stream"
            try:
                with HTTP.stream("POST", url, json=body, timeout=60) as response:
                    for line in response.iter_lines():
                        lines[number] += [line] if line else []
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: all(lines), 30)
        started = time.monotonic()
        assert server.launcher is not None
        server.launcher.send_signal(signal.SIGHUP)
        assert server.launcher.wait(END_S) == 0
        assert time.monotonic() - started <= END_S
        for thread in threads:
            thread.join(5)
        assert not errors
        last = [json.loads(one[-1].removeprefix("data:")) for one in lines]
        assert all(event.get("finish_reason") == "length" for event in last[::2]), last
        assert all("[code=CANCELLED reason=shutdown]" in event["error"] for event in last[1::2]), last
        assert "the rest was killed" not in server.log
        server.assert_nothing_left()
