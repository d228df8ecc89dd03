"""The tests of this folder once more, with the address and undefined-behaviour sanitizers inside the native library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashserve_kernels.cpu.library import find_compiler, supported_isas

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# Its intrinsics, and the portable vectors: the two sources of memory accesses.
ISAS = dict.fromkeys((supported_isas()[0], "baseline"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.environ.get("FLASHSERVE_TEST_SANITIZE") == "1", reason="this is the inner run")
@pytest.mark.parametrize("isa", ISAS)
def test_no_invalid_access_and_no_undefined_behaviour(isa: str) -> None:
    compiler = find_compiler()
    assert compiler is not None, "the native kernels need a C++ compiler"
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "FLASHSERVE_TEST_SANITIZE": "1",
        "FLASHSERVE_TEST_ISAS": isa,
        # Python itself is not instrumented: the runtime must be there before it, and its leaks are not ours.
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=500", str(HERE)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"native kernels ran for: {isa} (with sanitizers)" in done.stdout
