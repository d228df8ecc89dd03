"""The page's files and figures. What a user does with it: test_page_in_browser."""

from __future__ import annotations

import asyncio
import re

from flashserve_gateway.settings import Settings
from gateway_peers import gate, metrics_server


async def test_the_page_and_its_files_come_from_here_and_so_does_all_that_they_need():
    async with gate() as gateway:
        page = await gateway.http.get("/")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        files = [part.split('"')[0] for part in page.text.split('"static/')[1:]]
        assert len(files) == 3
        scripts = [name for name in files if name.endswith(".js")]
        for name in scripts:  # and those that they import, which the loop comes to
            text = (await gateway.http.get(f"/static/{name}")).text
            scripts += [other for other in re.findall(r'from "\./([\w.]+)"', text) if other not in scripts]
        assert {"chat.js", "lane.js", "models.js", "batch.js"} < set(scripts)
        for name in {*files, *scripts}:
            assert (await gateway.http.get(f"/static/{name}")).status_code == 200
        for name in ("none", "..%2fapp.py", "%2e%2e/app.py"):
            assert (await gateway.http.get(f"/static/{name}")).status_code == 404


async def test_the_endpoints_are_described_on_a_page_that_loads_nothing():
    async with gate() as gateway:
        page = await gateway.http.get("/docs")
        assert "POST /v1/chat/completions" in page.text and "max_tokens (optional)" in page.text
        assert not re.search(r"<script|<link|<img|src=|https?://", page.text)
        assert page.headers["content-security-policy"].startswith("default-src 'none'")


async def test_figures_are_summed_over_engines_and_asked_for_once_a_second():
    asked: list[bytes] = []
    async with metrics_server(asked) as address, gate(settings=Settings(triton_metrics=(address,))) as gateway:
        answers = await asyncio.gather(*(gateway.http.get("/operations") for _ in range(5)))
        models = answers[0].json()["models"]
        assert set(models) == {"demo"}
        assert (models["demo"]["running"], models["demo"]["generated"]) == (4, 120)
        assert models["demo"]["ttft"] == [[0.01, 5], [None, 10]]
        assert len(asked) == 1


async def test_without_figures_the_page_says_so():
    async with gate() as gateway:
        answer = (await gateway.http.get("/operations")).json()
        assert answer["models"] == {} and "--triton-metrics" in answer["note"]
    async with gate(settings=Settings(triton_metrics=("127.0.0.1:1",))) as gateway:
        assert (await gateway.http.get("/operations")).status_code == 200
