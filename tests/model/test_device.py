"""What the runner finds out about the machine."""

from __future__ import annotations

import os

import pytest

from flashserve.errors import ConfigError
from flashserve.runner.device import cpu, open_device


def test_facts_of_the_cpu():
    facts = open_device("cpu").read_facts()
    assert facts.kind == "cpu"
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert 1 <= cpu.available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", "cuda:99", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(ConfigError, match="device"):
        open_device(name)


@pytest.mark.parametrize("files, expected", [
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ({}, None),
])  # fmt: skip
def test_a_containers_cpu_quota(files, expected, tmp_path, monkeypatch):
    write(tmp_path, files)
    assert cpu._cpu_quota(tmp_path) == expected


def test_a_quota_below_one_core_still_gives_one_thread(monkeypatch):
    monkeypatch.setattr(cpu, "_cpu_quota", lambda: 0.3)
    assert cpu.available_cores() == 1


def write(folder, files) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
