"""Memory that the system gives back on demand is free: file pages that nobody uses any more, in every control group."""

import pytest

from flashserve.launcher import doctor
from flashserve.memory import free_memory

GIB = 1 << 30
LIMIT, USED, INACTIVE = 4 * GIB, 4 * GIB - 100 * 2**20, int(3.5 * GIB)


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def meminfo(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {32 * GIB // 1024} kB\n")
    return file


def version_2(folder):
    return write(
        folder,
        memory_dot_max=str(LIMIT),
        memory_dot_current=str(USED),
        memory_dot_stat=f"anon 1\ninactive_file {INACTIVE}\n",
    )


def version_1(folder):
    return write(folder, memory__memory_dot_limit_in_bytes=str(LIMIT), memory__memory_dot_usage_in_bytes=str(USED),
                 memory__memory_dot_stat=f"cache 1\ntotal_inactive_file {INACTIVE}\ninactive_file 0\n")  # fmt: skip


@pytest.mark.parametrize("groups", [version_1, version_2])
def test_a_containers_inactive_file_pages_are_free(tmp_path, meminfo, groups):
    total, free = free_memory(groups(tmp_path / "cgroup"), meminfo)
    assert total == LIMIT
    assert free == LIMIT - USED + INACTIVE


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(tmp_path, meminfo):
    groups = write(tmp_path / "cgroup", memory_dot_max="1000", memory_dot_current="2500")
    assert free_memory(groups, meminfo) == (1000, 0)


def test_never_more_than_the_machine_has(tmp_path, meminfo):
    meminfo.write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {GIB // 1024} kB\n")
    assert free_memory(version_2(tmp_path / "cgroup"), meminfo) == (LIMIT, GIB)


def test_without_a_limit_it_is_the_machines(tmp_path, meminfo):
    unlimited = write(tmp_path / "cgroup", memory_dot_max="max", memory_dot_current="5")
    for folder in (unlimited, tmp_path / "none"):
        assert free_memory(folder, meminfo) == (64 * GIB, 32 * GIB)


def test_the_doctor_asks_the_same(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: (4 * GIB, 3 * GIB))
    (check,) = [check for check in doctor.examine(None) if check.name == "memory"]
    assert check.value == "3.0 GB available"
