"""Every test of the native kernels runs on every instruction set that this processor has."""

from __future__ import annotations

import contextlib
import os

import pytest

from flashserve_kernels.cpu.library import NativeUnavailable, load_library, supported_isas
from flashserve_kernels.cpu.program import Pool

SANITIZE = os.environ.get("FLASHSERVE_TEST_SANITIZE") == "1"
"""Set by test_sanitizers.py, which also preloads the sanitizers' runtime."""
ISAS = os.environ["FLASHSERVE_TEST_ISAS"].split(",") if "FLASHSERVE_TEST_ISAS" in os.environ else supported_isas()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile before the first test, whose timeout is not made for that."""
    needed = any("pool" in getattr(item, "fixturenames", ()) for item in session.items)
    if session.config.option.collectonly or not needed:
        return
    for isa in ISAS:
        with contextlib.suppress(NativeUnavailable):  # the fixture meets it again, as a failure
            load_library(isa, SANITIZE)


@pytest.fixture(scope="session", params=ISAS)
def pool(request: pytest.FixtureRequest) -> Pool:
    """Two threads that run the kernels compiled for one instruction set. A set that cannot be built is a failure."""
    pool = Pool(request.param, 2, sanitize=SANITIZE)
    assert pool.library.fs_isa().decode() in (request.param, "neon")
    return pool


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The end of the log says which instruction sets ran."""
    if "pool" in getattr(item, "fixturenames", ()):
        sanitized = " (with sanitizers)" if SANITIZE else ""
        item.user_properties.append(("native kernels", f"{item.callspec.params['pool']}{sanitized}"))
