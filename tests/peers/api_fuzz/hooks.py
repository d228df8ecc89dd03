"""Runs inside schemathesis: most bodies name the model that is served, or nearly all answers would be 404."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

MODEL = os.environ["FLASHSERVE_MODEL"]


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 4:
        return {**body, "model": MODEL}
    return body
