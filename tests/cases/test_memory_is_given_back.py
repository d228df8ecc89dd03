"""What large requests took is given back. Only Triton's pool of shared memory keeps its size, which none can change."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from async_requests import engine_of
from flashserve.memory import RETURNING
from harness import HTTP, Server
from null_models import null_model, write_null_model

LARGE_MB, AT_ONCE, TIMES = 40, 4, 3
ALLOWED_MB = 24


@pytest.mark.slow
def test_tritonserver_and_stub_give_back_what_large_requests_took(tmp_path: Path) -> None:
    with Server({"demo": null_model(write_null_model(tmp_path / "null"))}) as server:
        processes = [psutil.Process(pid) for pid in (*server.tritonserver_pids(), server.stubs("demo")[0].pid)]

        def refused(megabytes: int) -> bool:
            body = json.dumps({"text_input": "word " * (megabytes * 200_000)})
            return HTTP.post(f"{server.http}/v2/models/demo/generate", content=body, timeout=60).status_code == 400

        def private_mb() -> list[int]:
            return [process.memory_full_info().uss >> 20 for process in processes]

        assert refused(1)
        before = private_mb()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            assert all(pool.map(refused, [LARGE_MB, LARGE_MB // 2] * AT_ONCE * TIMES))
        after = private_mb()
        assert all(new <= old + ALLOWED_MB for old, new in zip(before, after, strict=True)), (before, after)
        # An engine's tensors come and go with each step: it keeps what it has.
        assert not set(RETURNING) & set(engine_of(server, "demo").environ())
