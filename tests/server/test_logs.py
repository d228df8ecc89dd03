"""The log of a server in JSON, and its line for each request."""

from __future__ import annotations

import json
from pathlib import Path

from harness import Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import GrpcCall, generate, post


def test_every_line_is_an_object_and_every_request_has_one(tmp_path: Path) -> None:
    folder = write_null_model(tmp_path / "null")
    model = null_model(folder, 1, enable_log_requests=True)
    with Server({"m": model}, arguments=["--log-format", "json"], ready_pattern='"ready in ') as server:
        generate(server, model="m", text_input="hello", max_tokens=7, id="mine alone")
        assert post(server, {"text_input": "hello", "sampling_parameters": '{"timeout_ms": 30, "max_tokens": 999}'},
                    model="m").status_code == 400  # fmt: skip
        endless = GrpcCall(server, {"text_input": "hello", "max_tokens": 4000, "stream": True}, model="m")
        next(endless)
        endless.cancel()
        assert wait_until(lambda: len(requests(server)) == 3, 10)
        done, late, gone = requests(server)
    assert {"id": "mine_alone", "reason": "length", "prompt_tokens": 3, "generated_tokens": 7}.items() <= done.items()
    assert done["source"] == "stub[m]"
    assert 0 < done["ttft_ms"] < done["ttft_ms"] + done["decode_ms"] < 5000
    assert (late["reason"], gone["reason"]) == ("deadline", "client")


def requests(server: Server) -> list[dict]:
    """Parses all lines there are."""
    entries = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "source", "message"} <= entry.keys() for entry in entries)
    return [entry for entry in entries if entry["message"] == "request"]
