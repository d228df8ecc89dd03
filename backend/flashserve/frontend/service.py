"""One model's frontend: wires parser, responder, watchers, metrics and engine together."""

from __future__ import annotations

import itertools
import logging
from typing import Any

from flashserve.coercion import shorten
from flashserve.config import EngineConfig
from flashserve.errors import FlashserveError, InternalError
from flashserve.frontend.cancellation import CancellationWatcher
from flashserve.frontend.drain import DrainWatcher
from flashserve.frontend.engine_watch import EngineWatch
from flashserve.frontend.generation import Generation
from flashserve.frontend.health_check import HealthCheck
from flashserve.frontend.metrics import Metrics, MetricsExportThread, TritonExporter, engine_infos
from flashserve.frontend.model_parameters import ModelParameters
from flashserve.frontend.request_log import log_end
from flashserve.frontend.request_parser import ParsedRequest, ParserContext, parse, read_raw
from flashserve.frontend.responder import Responder
from flashserve.frontend.responses import ResponseBuilder
from flashserve.frontend.server_watch import ServerWatch
from flashserve.frontend.tracing import start_tracing
from flashserve.ipc.supervisor import EngineSupervisor
from flashserve.stub_processes import has_predecessor
from flashserve.text.completion import Completion
from flashserve.text.embedding import EmbeddingAnswer

log = logging.getLogger(__name__)


class ModelService:
    """Everything that lives as long as a loaded model. The constructor blocks until the engine is ready."""

    def __init__(
        self,
        config: EngineConfig,
        pb_utils: Any,
        name: str,
        version: str,
        engine: str,
        parameters: ModelParameters,
    ) -> None:
        """``engine`` is the instance's index, which tells the series of a model's instances apart."""
        self._server_watch = ServerWatch()
        self._builder = ResponseBuilder(pb_utils, parameters.plain_errors)
        metrics = Metrics()
        self._tracing = start_tracing(name)
        observers = [log_end] if config.enable_log_requests else []
        observers += [self._tracing.record] if self._tracing is not None else []
        self._responder = Responder(self._builder, metrics, observers)
        self._supervisor = EngineSupervisor(config, self._responder)
        ready = self._supervisor.start()
        try:
            self._context = ParserContext.of_engine(config, ready)
            labels = {"model": name, "version": version, "model_name": name, "engine": engine}
            self._metrics_thread = MetricsExportThread(
                TritonExporter(metrics, pb_utils, labels),
                metrics.hurry,
                engine_infos(ready.limits.block_size, ready.limits.num_blocks),
                has_predecessor,
                lambda: self._server_watch.server_lives,
            )
            if parameters.report_metrics:
                self._metrics_thread.start()
        except BaseException:
            self._supervisor.stop()
            raise
        self._ids = itertools.count(1)
        self._cancellation = CancellationWatcher(self._responder)
        self._drain = DrainWatcher(
            name, version, config.triton_http, config.drain_timeout_s, self._responder, self._supervisor.stop
        )
        self._health_check: HealthCheck | None = None
        if parameters.health_check:
            self._health_check = HealthCheck(
                lambda: self._supervisor.ready, lambda: self._drain.draining, lambda: pb_utils.unload_model(name)
            )
        self._engine_watch = EngineWatch(self._responder, self._supervisor, metrics)
        self._responder.start(self._supervisor.send)
        for part in (self._server_watch, self._cancellation, self._drain, self._engine_watch):
            part.start()

    @property
    def engine_ready(self) -> bool:
        return self._supervisor.ready

    def accept(self, request: Any) -> None:
        """Parse a Triton request and set it going. Whatever is wrong with it becomes its response."""
        sender = request.get_response_sender()
        try:
            if self._health_check is not None:
                self._health_check.check()
            parsed = parse(read_raw(request), self._context, next(self._ids))
            if isinstance(parsed, ParsedRequest):
                kind = Completion if parsed.message.pooling is None else EmbeddingAnswer
                samples = range(parsed.message.params.n)
                completions = [kind(self._context.tokenizer, parsed.message) for _ in samples]
                self._responder.submit(Generation(parsed, sender, completions))
            else:
                self._responder.answer(sender, self._builder.text(parsed.answer))
        except FlashserveError as error:
            self._responder.refuse(sender, error)
        except Exception:
            log.exception("request %s could not be parsed", shorten(request.request_id()))
            self._responder.refuse(sender, InternalError("the request could not be parsed"))

    def stop(self) -> None:
        """End everything, in an order that lets the last responses out."""
        for part in (self._drain, self._engine_watch, self._cancellation, self._responder, self._supervisor):
            part.stop()
        self._metrics_thread.stop()
        self._server_watch.stop()
        if self._tracing is not None:
            self._tracing.stop()
