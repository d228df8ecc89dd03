"""Requests as clients of all kinds send them, and what comes back, without the comfort of a client library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import HTTP, Server, wait_until

TIMEOUT_S = 60.0
ASK_FOR_ALL = {
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "return_request_metrics": True,
}
NUMPY_TYPES = {"BOOL": np.bool_, "INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}


# --- HTTP --------------------------------------------------------------------------------------------------


def post(server: Server, body: Any, *, model: str = "letters", verb: str = "generate") -> httpx.Response:
    """Send ``body``: bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(f"{server.http}/v2/models/{model}/{verb}", content=content, timeout=TIMEOUT_S)


def generate(server: Server, *, model: str = "letters", **body: Any) -> dict[str, Any]:
    """The JSON answer of ``generate``; fails unless it is one."""
    response = post(server, body, model=model)
    assert response.status_code == 200, response.text
    return response.json()


def stream_sse(server: Server, *, model: str = "letters", **body: Any) -> list[dict[str, Any]]:
    """The events of ``generate_stream``, whose every byte must be valid UTF-8 and every event valid JSON."""
    response = post(server, {"stream": True, **body}, model=model, verb="generate_stream")
    assert response.status_code == 200, response.text
    lines = response.content.decode("utf-8").split("\n")
    return [json.loads(line.removeprefix("data:")) for line in lines if line]


def stream_in_thread(server: Server, **body: Any) -> None:
    """Start a stream of ``demo`` that the server's end will end; returns once it runs."""
    running = threading.Event()

    def read() -> None:
        try:
            url = f"{server.http}/v2/models/demo/generate_stream"
            with httpx.stream("POST", url, json=body, timeout=60) as response:
                for _ in response.iter_lines():
                    running.set()
        except httpx.HTTPError:
            pass  # the server is stopped under it

    threading.Thread(target=read, daemon=True).start()
    assert running.wait(10), "no first token"


def text_of(responses: list[dict[str, Any]]) -> str:
    return "".join(response["text_output"] for response in responses)


# --- gRPC --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """One message of a gRPC stream: a response's outputs, or an error's text."""

    outputs: dict[str, Any]
    """str, int, float: the single element of each output."""
    shapes: dict[str, list[int]]
    types: dict[str, str]
    final: bool
    error: str = ""

    @property
    def text(self) -> str:
        return self.outputs["text_output"]


class Raw(bytes):
    """The bytes of a tensor as they go over the wire; ``datatype`` and ``shape`` say what they claim to be."""

    datatype: str
    shape: list[int]

    def __new__(cls, content: bytes, datatype: str = "BYTES", shape: tuple[int, ...] = (1,)) -> Raw:
        raw = super().__new__(cls, content)
        raw.datatype, raw.shape = datatype, list(shape)
        return raw


def strings(*values: bytes) -> Raw:
    """A BYTES tensor of these elements."""
    return Raw(b"".join(len(value).to_bytes(4, "little") + value for value in values), "BYTES", (len(values),))


def as_raw(value: Any) -> Raw:
    """The tensor of shape [1] that a Python value stands for."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, (str, bytes)):
        return strings(value.encode() if isinstance(value, str) else value)
    if isinstance(value, bool):
        return Raw(bytes([value]), "BOOL")
    if isinstance(value, int):
        return Raw(value.to_bytes(4, "little", signed=True), "INT32")
    return strings(json.dumps(value).encode())


class GrpcCall:
    """A request over a gRPC stream of its own; iterate for its replies, ``cancel`` to go away."""

    def __init__(
        self,
        server: Server,
        inputs: Mapping[str, Any],
        *,
        model: str = "letters",
        request_id: str = "",
        parameters: Mapping[str, bool | int | str | float] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        for name, value in inputs.items():
            raw = as_raw(value)
            message.inputs.add(name=name, datatype=raw.datatype, shape=raw.shape)
            message.raw_input_contents.append(bytes(raw))
        kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
        for name, value in (parameters or {}).items():
            setattr(message.parameters[name], kinds[type(value)], value)
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(server.grpc, options=options)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        headers = tuple((metadata or {}).items())
        self._call = stub.ModelStreamInfer(iter([message]), timeout=TIMEOUT_S, metadata=headers)

    def __iter__(self) -> Iterator[Reply]:
        return self

    def __next__(self) -> Reply:
        try:
            message = next(self._call)
        except StopIteration:
            self.cancel()
            raise
        return _reply(message)

    def cancel(self) -> None:
        self._call.cancel()
        self._channel.close()


def call(server: Server, *, model: str = "letters", parameters: Any = None, request_id: str = "",
         **inputs: Any) -> list[Reply]:  # fmt: skip
    """All replies to a request whose inputs are given as keyword arguments."""
    return list(GrpcCall(server, inputs, model=model, parameters=parameters, request_id=request_id))


def call_one(server: Server, **arguments: Any) -> Reply:
    """The only reply to a request; fails if it is an error."""
    (reply,) = call(server, **arguments)
    assert not reply.error, reply.error
    return reply


def _reply(message: Any) -> Reply:
    response = message.infer_response
    if message.error_message:
        return Reply({}, {}, {}, False, message.error_message)
    outputs = {o.name: _element(o, raw) for o, raw in zip(response.outputs, response.raw_output_contents, strict=True)}
    return Reply(
        outputs,
        shapes={o.name: list(o.shape) for o in response.outputs},
        types={o.name: o.datatype for o in response.outputs},
        final=response.parameters["triton_final_response"].bool_param,
    )


def _element(output: Any, raw: bytes) -> Any:
    if output.datatype == "BYTES":
        assert int.from_bytes(raw[:4], "little") == len(raw) - 4, f"{output.name} is not one string"
        return raw[4:].decode("utf-8")  # strictly: an invalid byte is a failure
    (value,) = np.frombuffer(raw, NUMPY_TYPES[output.datatype]).tolist()
    return value


# --- the server's state ------------------------------------------------------------------------------------


COUNTERS_WITHIN_S = 1.5
"""After that everything that had happened is in /metrics: counters are passed on every second."""


def wait_idle(server: Server, model: str, within_s: float = 5.0) -> None:
    """Wait until nothing runs or waits and no KV block is held; fails if that does not come."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

    def state() -> list[float]:
        return [server.metric(name, model=model) for name in names]

    assert wait_until(lambda: state() == [0, 0, 0], within_s), dict(zip(names, state(), strict=True))


def wait_metric(server: Server, name: str, value: float, within_s: float = 5.0, **labels: str) -> None:
    """Wait until a metric has the value: counters reach /metrics up to a second late."""
    wait_until(lambda: server.metric(name, **labels) == value, within_s)
    assert server.metric(name, **labels) == value, name
