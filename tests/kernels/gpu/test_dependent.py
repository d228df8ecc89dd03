"""Programmatic dependent launch: where it is on, and what the compiler makes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flashserve_kernels.gpu import norm
from flashserve_kernels.gpu.dependent import SWITCH
from flashserve_kernels.gpu.device import A100, B200, H200, MI300X
from flashserve_kernels.gpu.launch import record

SCRIPT = """
import torch
from flashserve_kernels.gpu import norm
from flashserve_kernels.gpu.device import H200
from flashserve_kernels.gpu.launch import record
x = torch.empty((2, 64), dtype=torch.bfloat16, device="meta")
[variant] = record(H200, lambda: norm.rms_norm(x, x[0], 1e-6))
compiled = variant.compile(H200)
print(compiled.metadata.launch_pdl)
print(compiled.asm["ptx"])
"""


@pytest.mark.parametrize("properties, has", [(H200, True), (B200, True), (A100, False), (MI300X, False)])
@pytest.mark.parametrize("switch", [None, "1"])
def test_on_where_the_switch_and_the_gpu_say_so(properties, has, switch, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    x = torch.empty((2, 64), device="meta")
    [variant] = record(properties, lambda: norm.rms_norm(x, x[0], 1e-6))
    assert dict(variant.constants)["DEPENDENT"] == (has and switch == "1")


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_kernel_waits_before_it_reads(switch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {SWITCH: switch, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    launch_pdl, ptx = done.stdout.split("\n", 1)
    assert launch_pdl == str(switch == "1")
    if switch == "1":
        assert 0 < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
        assert "griddepcontrol.launch_dependents" in ptx
    else:
        assert "griddepcontrol" not in ptx
