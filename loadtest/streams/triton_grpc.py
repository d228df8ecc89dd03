"""Triton's `ModelStreamInfer` over one HTTP/2 connection, on gRPC's own event loop for gevent."""

from __future__ import annotations

import time
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from flashserve_client.errors import FlashserveError, error_from_message
from flashserve_client.grpc_transport import infer_message, parse_response

from ..record import CONNECTION, TIMEOUT, Record, RequestFailed
from .base import Ask, Stream, cancel_if_due
from .triton_http import NOT_FINISHED, add_usage, triton_request

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # A server that comes back is asked again after a second; the default grows to two minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_gevent_is_ready = False


def prepare_gevent() -> None:
    """Makes gRPC's waiting cooperative. Once per process, and after a fork: `--processes` forks."""
    global _gevent_is_ready
    from gevent import monkey

    if not _gevent_is_ready and monkey.is_module_patched("threading"):
        import grpc.experimental.gevent as grpc_gevent

        grpc_gevent.init_gevent()
        _gevent_is_ready = True


class TritonGrpcStream(Stream):
    protocol = "triton-grpc"

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model)
        self._channel: Any = None

    def _call(self, message: Any, timeout_s: float) -> Any:
        if self._channel is None:
            prepare_gevent()
            scheme, _, address = self.url.partition("://")
            if scheme == "grpcs":
                self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(), _OPTIONS)
            else:
                self._channel = grpc.insecure_channel(address, _OPTIONS)
            # One request per call: what goes over the wire is the same as from a stream of requests, without a thread
            # that feeds it.
            self._infer = self._channel.unary_stream(
                _METHOD,
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
            )
        return self._infer(message, timeout=timeout_s)

    def run(self, ask: Ask, record: Record) -> None:
        request = triton_request(self.model, ask)
        call = self._call(infer_message(request), ask.timeout_s)
        try:
            for message in call:
                arrival = time.perf_counter()
                if message.error_message:
                    raise error_from_message(message.error_message)
                chunk = parse_response(message.infer_response)
                record.add_chunk(arrival, chunk.output_tokens, bool(chunk.text), chunk.text)
                add_usage(record, chunk.input_tokens, chunk.output_tokens)
                if chunk.finish_reason in NOT_FINISHED:  # one that has ended need not be left
                    cancel_if_due(ask, record)
        except grpc.RpcError as error:
            raise _failure(error, ask.timeout_s) from None
        except FlashserveError as error:
            raise RequestFailed(error.code, error.message) from None
        finally:
            call.cancel()  # does nothing to one that has ended

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


def _failure(error: Any, timeout_s: float) -> RequestFailed:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestFailed(TIMEOUT, f"no end within {timeout_s:g} s")
    if code is grpc.StatusCode.UNAVAILABLE and "[code=" not in details:
        return RequestFailed(CONNECTION, details)
    found = error_from_message(details, code.name)
    return RequestFailed(found.code, found.message)
