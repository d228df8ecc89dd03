"""Triton's vLLM backend's own health check: a model whose engine died leaves, so that readiness says so."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flashserve.errors import Unavailable

log = logging.getLogger(__name__)


class HealthCheck:
    """Of one model, asked before each request. ``unload`` asks Triton to unload the model, and does not wait for it."""

    def __init__(
        self, is_ready: Callable[[], bool], is_draining: Callable[[], bool], unload: Callable[[], None]
    ) -> None:
        self._is_ready = is_ready
        self._is_draining = is_draining
        self._unload = unload
        self._asked = False
        """For this death of the engine: one that is refused is not asked for with every request."""
        self._leaves = False

    def check(self) -> None:
        """Unload the model if its engine has died. Raises Unavailable then, and until the model is gone."""
        if self._is_ready() and not self._leaves:
            self._asked = False
            return
        if not self._asked and not self._is_draining():
            self._asked = True
            log.error("the engine is not healthy: unloading the model, as ENABLE_VLLM_HEALTH_CHECK asks")
            try:
                self._unload()
                self._leaves = True
            except Exception as error:  # a server whose models are not controlled from outside keeps them
                log.error("the model cannot be unloaded (%s): it serves again when its new engine is ready", error)
        # The vLLM backend's words.
        raise Unavailable("Model is unavailable due to unhealthy vLLM engine", retry_after_ms=1000)
