"""Spans of requests, as a collector receives them from a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from harness import Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import generate, post

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes OTLP over HTTP, as every collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                sent = ExportTraceServiceRequest.FromString(body)
                spans.extend(span for r in sent.resource_spans for scope in r.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_request_is_a_span_of_its_clients_trace_with_its_parts_below(tmp_path: Path, collector: Collector) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with Server({"m": null_model(write_null_model(tmp_path / "null"), 2)}, env=env) as server:
        ask = {"text_input": "hello", "max_tokens": 7, "id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        generate(server, model="m", **ask)
        late = {"text_input": "hello", "sampling_parameters": '{"timeout_ms": 40, "max_tokens": 999}'}
        assert post(server, late, model="m").status_code == 400
        assert wait_until(lambda: len(collector.spans) >= 8, 20)
    whole, failed = (span for span in collector.spans if span.name == "text_completion m")
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    wanted = {"gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 7,
              "gen_ai.request.max_tokens": 7, "gen_ai.response.id": "mine"}  # fmt: skip
    assert wanted.items() <= attributes(whole).items()
    parts = [span for span in collector.spans if span.parent_span_id == whole.span_id]
    assert [part.name for part in parts] == ["queue", "prefill", "decode"]
    edges = [edge for part in parts for edge in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert [whole.start_time_unix_nano, *edges, whole.end_time_unix_nano] == sorted(
        [whole.start_time_unix_nano, *edges, whole.end_time_unix_nano]
    )
    assert parts[2].end_time_unix_nano - parts[2].start_time_unix_nano >= 6 * 2e6, "six steps of 2 ms"
    assert failed.trace_id != whole.trace_id
    assert not failed.parent_span_id
    assert (failed.status.code, attributes(failed)["error.type"]) == (2, "CANCELLED")


def test_a_collector_that_is_gone_holds_up_no_answer_and_no_end(tmp_path: Path) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with Server({"m": null_model(write_null_model(tmp_path / "null"))}, env=env) as server:
        for _ in range(20):
            assert generate(server, model="m", text_input="hello", max_tokens=2)["text_output"]
        assert wait_until(lambda: "Transient error" in server.log, 20), "it tries again by now"
        server.stop()
        assert "the rest was killed" not in server.log
        assert "Traceback" not in server.log
