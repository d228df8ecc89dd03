"""What /docs says of requests and answers: their types are those of the openai package."""

from __future__ import annotations

from typing import Any

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    400: "the request is wrong; param names the field",
    401: "no key, or one that is not known",
    403: "this key may not, or, without keys: the Host is not this machine",
    404: "there is nothing of this name",
    408: "the body, or the answer, took too long",
    409: "not now: the model is loading or unloading; or the name belongs to another model",
    413: "the body is too large",
    415: "the body is of another type than this takes, or is compressed",
    429: "the key's limits; Retry-After says when to ask again",
    500: "a bug, or a data folder that cannot be written; the log has the reason under x-request-id",
    502: "the hub answered with an error",
    503: "the engine is full, starting or gone; Retry-After says when to ask again",
}

BODY = (400, 401, 408, 413, 415, 503)
"""The errors of whatever reads a request's body, beside its own."""
_OF_A_MODEL = (*BODY, 403, 404, 429, 500)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors given, or those of an endpoint that asks a model."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _STATUSES[status], "content": content} for status in statuses or _OF_A_MODEL}


def body(required: dict[str, Any], optional: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint whose body the gateway reads itself."""
    schema = {"type": "object", "properties": {**required, **optional}, "required": list(required), "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


SAMPLING: dict[str, Any] = {
    "stream": {"type": "boolean", "default": False},
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": "integer"},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "top_k": {"type": "integer"},
    "min_p": {"type": "number"},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "return_progress": {"type": "boolean", "default": False},
}
