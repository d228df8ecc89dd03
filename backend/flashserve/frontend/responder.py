"""From engine outputs to Triton responses.

The engine's thread only files outputs under their requests; sender threads detokenise and send, each request's always
the same one. If it lags (a ``send`` takes 100-170 µs), a request's tokens pile up and leave merged in one response: the
engine never waits for a slow consumer, and no queue grows with the lag.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from flashserve.errors import BY_CODE, INTERNAL, Cancelled, FlashserveError, InternalError, Unavailable
from flashserve.frontend.generation import Generation
from flashserve.frontend.merging import Merging
from flashserve.frontend.metrics import Metrics
from flashserve.frontend.request_metrics import record_end, record_first_token, record_gaps, record_stats
from flashserve.frontend.responses import ResponseBuilder
from flashserve.frontend.senders import Senders
from flashserve.protocol import Abort, EngineReady, ErrorInfo, FinishReason, GenerateRequest, Stats, StepOutputs
from flashserve.text.completion import Delta

log = logging.getLogger(__name__)

ENDS: tuple[FinishReason, ...] = ("stop", "length")
"""Of a sample that ended by itself."""
RESPONSE_COMPLETE_FINAL = 1  # pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

SendToEngine = Callable[[GenerateRequest | Abort], None]
EndObserver = Callable[[Generation, str, FlashserveError | None], None]


class Responder:
    """Knows every open request. Implements the supervisor's EngineListener."""

    def __init__(self, builder: ResponseBuilder, metrics: Metrics, observers: Sequence[EndObserver] = ()) -> None:
        """``observers`` are told of each opened request's end, its reason or its error's code, by its sender thread."""
        self._builder = builder
        self._metrics = metrics
        self._observers = observers
        self._open: dict[int, Generation] = {}
        self._senders = Senders()
        self._answers = itertools.count()
        self._stats: Stats | None = None
        self._engine_seen = False
        self._merging = Merging()
        self._send_to_engine: SendToEngine | None = None
        self._refusal: FlashserveError | None = None

    def start(self, send_to_engine: SendToEngine) -> None:
        self._send_to_engine = send_to_engine
        self._senders.start()

    def stop(self) -> None:
        """End the senders after what is queued. Requests still open get UNAVAILABLE."""
        self.fail_all(Unavailable("the model is being unloaded", retry_after_ms=1000))
        self._senders.stop()

    @property
    def open_requests(self) -> list[Generation]:
        """A snapshot, for the watchers."""
        return list(self._open.values())

    # --- requests come in (Triton's execute thread) -------------------------------------------------------

    def submit(self, generation: Generation) -> None:
        """Open a request and hand it to the engine; failures become its response."""
        assert self._send_to_engine is not None
        self._open[generation.id] = generation
        if self._refusal is not None:
            self.fail(generation, self._refusal)
            return
        try:
            self._send_to_engine(generation.message)
        except FlashserveError as error:
            self.fail(generation, error)
        except Exception:
            log.exception("request %s could not be handed to the engine", generation.name)
            self.fail(generation, InternalError("the request could not be handed to the engine"))
        else:
            if generation.cancelled or generation.inbox.failed:
                self._abort(generation)  # again: an abort until now may have overtaken the request

    def answer(self, sender: Any, response: Any) -> None:
        """Send a response that needs no engine, with its FINAL flag."""
        self._senders.put(next(self._answers), lambda: sender.send(response, flags=RESPONSE_COMPLETE_FINAL))

    def refuse(self, sender: Any, error: FlashserveError) -> None:
        """Answer a request that was not opened with an error."""
        self._count(error)
        self.answer(sender, self._builder.error(error))

    def fail(self, generation: Generation, error: FlashserveError) -> None:
        """End a request with an error, from any thread; what came first wins."""
        generation.inbox.put(error)
        self._announce(generation)

    def fail_all(self, error: FlashserveError) -> None:
        for generation in self.open_requests:
            self.fail(generation, error)

    def refuse_new(self, error: FlashserveError) -> None:
        """From now on answer new requests with ``error`` (draining)."""
        self._refusal = error

    def cancel(self, generation: Generation) -> None:
        """The client is gone: free the engine's resources; the FINAL flag follows the engine's confirmation."""
        if not generation.cancelled:
            generation.cancelled = True
            self._abort(generation)

    def keep_alive(self, generation: Generation) -> None:
        """Send an empty chunk, so that Triton notices a vanished SSE client while nothing else is sent."""
        self._senders.put(generation.id, lambda: self._send_keep_alive(generation))

    # --- the engine's thread ------------------------------------------------------------------------------

    def on_ready(self, ready: EngineReady) -> None:
        if self._engine_seen:
            self._metrics.add("flashserve:engine_restarts_total")
        self._engine_seen = True
        self._stats = None
        self._merging.max_tokens = ready.limits.stream_interval
        self._metrics.set("flashserve:engine_ready", 1)
        self._metrics.set("flashserve:model_bytes", ready.limits.model_bytes)  # not always its predecessor's
        self._metrics.set("flashserve:kv_cache_bytes", ready.limits.kv_cache_bytes)

    def on_dead(self, error: Unavailable) -> None:
        self._metrics.set("flashserve:engine_ready", 0)
        for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            self._metrics.set(gauge, 0)
        self.fail_all(error)

    def on_outputs(self, message: StepOutputs) -> None:
        now = time.monotonic()
        latencies: list[float] = []
        due: list[Generation] = []
        self._merging.start_step(now, len(message.outputs))
        for output in message.outputs:
            generation = self._open.get(output.request_id)
            if generation is None:
                continue  # it ended here first: a stop string, or a failure
            if output.token_ids:
                before = generation.token_times[output.index]
                if before is not None:
                    latencies.append(now - before)
                elif output.timings is not None and generation.last_token_time is None:
                    record_first_token(self._metrics, output.timings)
                generation.token_times[output.index] = now
            generation.inbox.put(output)
            if output.finish_reason is not None or (
                generation.parsed.needs_every_token and not self._merging.holds(generation)
            ):
                due.append(generation)
        if latencies:
            record_gaps(self._metrics, latencies)
        record_stats(self._metrics, self._stats, message.stats)
        self._stats = message.stats
        # After the counters: an answer never comes before what counts its tokens.
        for generation in (*due, *self._merging.overdue()):
            self._announce(generation)

    def _announce(self, generation: Generation) -> None:
        if generation.inbox.announce():
            self._senders.put(generation.id, lambda: self._serve(generation))

    # --- the request's sender thread ------------------------------------------------------------------------

    def _serve(self, generation: Generation) -> None:
        if generation.closed:
            return
        try:
            self._serve_open(generation)
        except Exception:
            log.exception("request %s failed in the frontend", generation.name)
            self._abort(generation)
            self._close_with_error(generation, InternalError("the request failed in the frontend"))

    def _serve_open(self, generation: Generation) -> None:
        for item in generation.inbox.take():
            if isinstance(item, FlashserveError):
                self._abort(generation)  # the engine may still be at it
                self._fail_open(generation, item)
                return
            if item.progress is not None:
                generation.progress = item.progress
            completion = generation.completions[item.index]
            stopped = completion.take(item)
            going_on = any(other.finish_reason is None for other in generation.completions)
            if stopped:  # the engine does not know stop strings
                self._abort(generation, item.index if going_on else None)
            reason = completion.finish_reason
            if reason is not None and (not going_on or reason not in ENDS):
                self._end(generation, reason, completion.error)
                return
        if generation.parsed.stream and generation.has_news:
            self._send_delta(generation)

    def _end(self, generation: Generation, reason: FinishReason, error_info: ErrorInfo | None) -> None:
        if reason in ENDS:
            self._close_with_data(generation, reason)
            return
        error = _error_of(reason, error_info)
        if error.code == INTERNAL:  # the engine has logged why, under a number that clients do not know
            log.error("request %s (the engine's %d): %s", generation.name, generation.id, error.message)
        self._fail_open(generation, error)

    def _fail_open(self, generation: Generation, error: FlashserveError) -> None:
        """What was streamed comes first, whole."""
        for completion in generation.completions:
            completion.finish_text()
        if generation.parsed.stream and generation.has_news:
            self._send_delta(generation)
        self._close_with_error(generation, error)

    def _send_delta(self, generation: Generation, last: bool = False) -> None:
        deltas = [completion.delta() for completion in generation.completions]
        if last:
            deltas = [delta._replace(text=generation.parsed.prompt_text + delta.text) for delta in deltas]
        self._send_data(generation, deltas, RESPONSE_COMPLETE_FINAL if last else 0)

    def _send_keep_alive(self, generation: Generation) -> None:
        if not generation.closed:
            self._send_data(generation, [completion.nothing_new() for completion in generation.completions], flags=0)

    def _send_data(self, generation: Generation, deltas: list[Delta], flags: int) -> None:
        reasons = [completion.finish_reason for completion in generation.completions]
        shown = [reason if reason in ENDS else None for reason in reasons]
        response = self._builder.generation(generation, deltas, shown)
        generation.last_sent = time.monotonic()
        generation.sender.send(response, flags=flags)

    def _close_with_data(self, generation: Generation, reason: FinishReason) -> None:
        self._close(generation)
        record_end(self._metrics, generation, reason)
        self._observe_end(generation, reason)
        self._send_delta(generation, last=True)

    def _close_with_error(self, generation: Generation, error: FlashserveError) -> None:
        self._close(generation)
        self._count(error)
        self._observe_end(generation, error.code, error)
        generation.sender.send(self._builder.error(error), flags=RESPONSE_COMPLETE_FINAL)

    def _observe_end(self, generation: Generation, reason: str, error: FlashserveError | None = None) -> None:
        for observer in self._observers:
            try:
                observer(generation, reason, error)
            except Exception:
                log.exception("the end of request %s was not observed", generation.name)  # its answer goes out

    def _count(self, error: FlashserveError) -> None:
        if isinstance(error, Cancelled):
            self._metrics.add("flashserve:requests_cancelled_total", label_value=error.reason)
        else:
            self._metrics.add("flashserve:request_errors_total", label_value=error.code)

    def _close(self, generation: Generation) -> None:
        generation.close()
        self._open.pop(generation.id, None)

    def _abort(self, generation: Generation, index: int | None = None) -> None:
        """End all of it in the engine, or one sample."""
        assert self._send_to_engine is not None
        try:
            self._send_to_engine(Abort([generation.id]) if index is None else Abort([], [(generation.id, index)]))
        except Unavailable:
            log.debug("request %s needs no abort: its engine is gone", generation.name)


def _error_of(reason: FinishReason, error: ErrorInfo | None) -> FlashserveError:
    """What the client is told when the engine ended its request."""
    if reason == "deadline":
        return Cancelled("the request's deadline has passed", reason="deadline")
    if reason == "abort":
        return Cancelled("the request was cancelled", reason="client")
    if error is None:
        return InternalError("the engine ended the request without a reason")
    if error.code == Unavailable.code:
        return Unavailable(error.message, error.retry_after_ms or 1000)
    return BY_CODE[error.code](error.message)
