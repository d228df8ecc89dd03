"""/docs: the endpoints and an example of each, as one page of HTML that loads nothing.

FastAPI's own would run a script of another host on the page's origin, where the chat keeps its conversations, and is
blank on a machine without internet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>flashserve: endpoints</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre { overflow-x: auto; padding: .7rem; border: 1px solid #8886; border-radius: .4rem }
h3 { margin-bottom: 0; font-family: ui-monospace, monospace }
</style>
"""


def routes(app: FastAPI) -> APIRouter:
    """``app``: whose endpoints are told of; all of them must be known when the page is first asked for."""
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    async def reference() -> HTMLResponse:
        return HTMLResponse("".join(_page(app.openapi())), headers={"content-security-policy": _POLICY})

    return router


def _page(description: dict[str, Any]) -> Iterator[str]:
    info = description["info"]
    yield f"{_HEAD}<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} "
    yield 'For programs: <a href="openapi.json">openapi.json</a>.</p>'
    groups: dict[str, list[str]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            group = groups.setdefault(operation.get("tags", [""])[0], [])
            group.append("".join(_endpoint(method.upper(), path, operation)))
    for name, endpoints in groups.items():
        yield f"<h2>{escape(name)}</h2>{''.join(endpoints)}"


def _endpoint(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h3>{method} {escape(path)}</h3><p>{escape(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    if schema is None:
        return
    names = [name if name in schema["required"] else f"{name} (optional)" for name in schema["properties"]]
    yield f"<p>Body: {escape(', '.join(names))}</p>"
    example = json.dumps(schema["example"], ensure_ascii=False)
    curl = f"curl localhost:9000{path} -H 'Content-Type: application/json' -d '{example}'"
    yield f"<pre>{escape(curl)}</pre>"
