"""One model's frontend: wires parser, responder, watchers, metrics and engine together."""

from __future__ import annotations

import itertools
import logging
from typing import Any

from flashserve.config import EngineConfig
from flashserve.errors import FlashserveError, InternalError
from flashserve.frontend.cancellation import CancellationWatcher
from flashserve.frontend.drain import DrainWatcher
from flashserve.frontend.generation import Generation
from flashserve.frontend.metrics import Metrics, MetricsExportThread, TritonExporter
from flashserve.frontend.request_parser import ParsedRequest, ParserContext, parse, read_raw
from flashserve.frontend.responder import Responder
from flashserve.frontend.responses import ResponseBuilder
from flashserve.frontend.server_watch import ServerWatch
from flashserve.ipc.supervisor import EngineSupervisor
from flashserve.protocol import EngineLimits, GenerateRequest
from flashserve.sampling_params import shorten
from flashserve.text.output import TextStream

log = logging.getLogger(__name__)

PROMPT_TAIL = 8  # tokens of context in which the first generated one is decoded, by tokenizers that need some


class ModelService:
    """Everything that lives as long as a loaded model. The constructor blocks until the engine is ready."""

    def __init__(self, config: EngineConfig, pb_utils: Any, name: str, version: str) -> None:
        self._server_watch = ServerWatch()
        self._builder = ResponseBuilder(pb_utils)
        metrics = Metrics()
        self._responder = Responder(self._builder, metrics)
        self._supervisor = EngineSupervisor(config, self._responder)
        limits = self._supervisor.start()
        try:
            self._context = ParserContext.load(config, limits)
            exporter = TritonExporter(metrics, pb_utils, {"model": name, "version": version, "model_name": name})
            self._publish_info(exporter, limits)
        except BaseException:
            self._supervisor.stop()
            raise
        self._ids = itertools.count(1)
        self._metrics_thread = MetricsExportThread(exporter, lambda: self._server_watch.server_lives)
        self._cancellation = CancellationWatcher(self._responder)
        self._drain = DrainWatcher(
            name, version, config.triton_http, config.drain_timeout_s, self._responder, self._supervisor.stop
        )
        self._responder.start(self._supervisor.send)
        for part in (self._server_watch, self._metrics_thread, self._cancellation, self._drain):
            part.start()

    @property
    def engine_ready(self) -> bool:
        return self._supervisor.ready

    def accept(self, request: Any) -> None:
        """Parse a Triton request and set it going. Whatever is wrong with it becomes its response."""
        sender = request.get_response_sender()
        try:
            parsed = parse(read_raw(request), self._context)
            if isinstance(parsed, ParsedRequest):
                self._generate(parsed, sender)
            else:
                self._responder.answer(sender, self._builder.text(parsed.answer))
        except FlashserveError as error:
            self._responder.refuse(sender, error)
        except Exception:
            log.exception("request %s could not be parsed", shorten(request.request_id()))
            self._responder.refuse(sender, InternalError("the request could not be parsed"))

    def _generate(self, parsed: ParsedRequest, sender: Any) -> None:
        internal_id = next(self._ids)
        text = TextStream(self._context.tokenizer, parsed.params, prompt_tail=parsed.prompt_token_ids[-PROMPT_TAIL:])
        message = GenerateRequest(
            request_id=internal_id,
            prompt_token_ids=parsed.prompt_token_ids,
            params=parsed.params,
            arrival=parsed.arrival,
            priority=parsed.priority,
            deadline=parsed.deadline,
            cache_salt=parsed.cache_salt,
        )
        self._responder.submit(Generation(internal_id, parsed, sender, text), message)

    def _publish_info(self, exporter: TritonExporter, limits: EngineLimits) -> None:
        exporter.publish_info(
            "vllm:cache_config_info",
            "The KV cache's shape.",
            {"block_size": str(limits.block_size), "num_gpu_blocks": str(limits.num_blocks)},
        )
        # Gateways that route by adapter read it before anything else: no adapters can be loaded yet.
        exporter.publish_info(
            "vllm:lora_requests_info",
            "LoRA adapters that requests use.",
            {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""},
        )

    def stop(self) -> None:
        """End everything, in an order that lets the last responses out."""
        for part in (
            self._drain,
            self._cancellation,
            self._responder,
            self._supervisor,
            self._metrics_thread,
            self._server_watch,
        ):
            part.stop()
