"""Triton's control API over HTTP: readiness, the repository, load and unload. Standard library only."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from flashserve.triton_http import ask

NO_PARAMETERS: Mapping[str, str] = MappingProxyType({})


class ControlError(Exception):
    """Triton refused, or could not be reached."""


class TritonControl:
    """Asks one server; opens a connection per call, so a restarted server is no special case."""

    def __init__(
        self, address: str, timeout_s: float = 5.0, unlisted: Callable[[], Iterable[str]] = lambda: ()
    ) -> None:
        """``unlisted`` gives names that Triton's index may lack: it lists what the repositories hold, and a client may
        have loaded a model all of whose files are its own."""
        self.address = address
        self.timeout_s = timeout_s
        self._unlisted = unlisted

    def server_ready(self) -> bool:
        """True once every model that tritonserver was told to load is ready."""
        return self._status("/v2/health/ready") == 200

    def answers(self, path: str) -> bool:
        """True if a GET of this path is answered, whatever it says."""
        return self._status(path) != 0

    def model_ready(self, name: str) -> bool:
        """True if a model is ready. Stays true when its stub process has died."""
        return self._status(f"/v2/models/{name}/ready") == 200

    def index(self) -> list[dict[str, str]]:
        """Rows of name, version, state, reason: every model of the repository, and ready ones beside it."""
        rows = self._call("POST", "/v2/repository/index", {})
        rows = rows if isinstance(rows, list) else []
        unlisted = set(self._unlisted()) - {row["name"] for row in rows}
        return rows + [{"name": name, "state": "READY"} for name in sorted(unlisted) if self.model_ready(name)]

    def ready_models(self) -> list[str]:
        """Names of the models that answer, sorted."""
        return sorted({row["name"] for row in self.index() if row.get("state") == "READY"})

    def config(self, name: str) -> dict[str, Any]:
        """A loaded model's configuration."""
        config = self._call("GET", f"/v2/models/{name}/config")
        return config if isinstance(config, dict) else {}

    def load(self, name: str, timeout_s: float, parameters: Mapping[str, str] = NO_PARAMETERS) -> None:
        """Load or reload a model; returns once it is ready. ``parameters``: a configuration and files (in base64) that
        take the place of the repository's."""
        body = {"parameters": dict(parameters)} if parameters else {}
        self._call("POST", f"/v2/repository/models/{name}/load", body, timeout_s)

    def unload(self, name: str, timeout_s: float = 30.0) -> None:
        """Start unloading a model; requests in flight still end."""
        self._call("POST", f"/v2/repository/models/{name}/unload", {}, timeout_s)

    def _status(self, path: str) -> int:
        try:
            return ask(self.address, "GET", path, timeout_s=self.timeout_s)[0]
        except (OSError, http.client.HTTPException):
            return 0

    def _call(self, method: str, path: str, body: object = None, timeout_s: float | None = None) -> Any:
        text = None if body is None else json.dumps(body)
        try:
            status, raw = ask(self.address, method, path, text, timeout_s=timeout_s or self.timeout_s)
            answer = json.loads(raw) if raw else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ControlError(f"no answer from {self.address}: {error}") from error
        if status != 200:
            reason = answer.get("error", raw) if isinstance(answer, dict) else raw
            raise ControlError(str(reason))
        return answer
