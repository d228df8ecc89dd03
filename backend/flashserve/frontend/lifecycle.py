"""Triton's entry points: what the Python backend calls, in the order of a model's life."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashserve.config import EngineConfig
from flashserve.errors import FlashserveError
from flashserve.frontend import inherited, model_parameters, tensor_spec
from flashserve.load_notes import NOTES_VARIABLE, LoadNote
from flashserve.paths import native

log = logging.getLogger("flashserve")

SWITCH_INTERVAL_S = 0.001  # threads hand over the interpreter's lock within 1 ms (default 5): TTFT under load


class TritonPythonModel:
    """One instance of one model: a frontend in this process and an engine in its own.

    ``auto_complete_config`` runs in an interpreter of its own: this module's imports stay light.
    """

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declare the tensor contract, so that config.pbtxt needs to hold nothing but the backend's name."""
        return tensor_spec.declare(auto_complete_model_config)

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine and block until it is ready: a model that Triton calls ready can answer."""
        import triton_python_backend_utils as pb_utils

        inherited.close_sockets()
        from flashserve.frontend.service import ModelService

        name = args["model_name"]
        logging.basicConfig(
            level=logging.INFO,
            format=f"%(asctime)s %(levelname).1s stub[{name}] %(message)s",
            stream=sys.stderr,
            force=True,
        )
        faulthandler.register(signal.SIGUSR1)  # kill -USR1: every thread's stack goes to the log, also of a hung stub
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            config = EngineConfig.from_file(native(args["model_repository"]) / args["model_version"] / "model.json")
            engine = args["model_instance_name"].removeprefix(f"{name}_")
            parameters = model_parameters.read(args["model_config"], config.disable_log_stats)
            self._service = ModelService(
                _placed(config, args), pb_utils, name, args["model_version"], engine, parameters
            )
            _note_load(args)
        except FlashserveError as error:
            raise pb_utils.TritonModelException(f"{name}: {error.message}") from None

    def execute(self, requests: list[Any]) -> None:
        """Hand requests over; their responses follow through their senders. Never raises."""
        for request in requests:
            self._service.accept(request)

    def is_ready(self) -> bool:
        """For Tritons that ask (2.51 does not): whether an engine answers."""
        return self._service.engine_ready

    def finalize(self) -> None:
        """End every thread and process of this instance, within a bound."""
        service = getattr(self, "_service", None)
        if service is not None:
            service.stop()


def _note_load(args: dict[str, str]) -> None:
    """Tell the launcher with what this model was loaded."""
    notes = os.environ.get(NOTES_VARIABLE)
    if notes:
        try:
            LoadNote(args["model_config"], args["model_repository"]).write(Path(notes), args["model_name"])
        except OSError as error:
            log.warning("what the model was loaded with could not be noted: %s", error)


def _placed(config: EngineConfig, args: dict[str, str]) -> EngineConfig:
    """An instance that Triton places on a GPU runs there, unless model.json names a device itself."""
    if config.device == "auto" and args["model_instance_kind"] == "GPU":
        return replace(config, device=f"cuda:{args['model_instance_device_id']}")
    return config
