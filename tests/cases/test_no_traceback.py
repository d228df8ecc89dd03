"""Nothing that a user can cause ends in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import SOURCES


def run(*words: str, shell: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command of flashserve; ``shell`` is put behind it."""
    command = ["bash", "-c", f'"$@" {shell}', "-", sys.executable, "-m", "flashserve.cli", *words]
    whole = {**os.environ, "PYTHONPATH": ":".join(SOURCES), **env}
    result = subprocess.run(command, env=whole, capture_output=True, timeout=60)
    assert b"Traceback" not in result.stderr, result.stderr.decode(errors="replace")
    return result


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters_gets_others(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "模型" / "1").mkdir(parents=True)
    result = run("models", "--model-repository", str(tmp_path), "--url", "localhost:1", PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert b"??  on disk" in result.stdout


def test_an_error_too(tmp_path: Path) -> None:
    result = run("serve", "--model", str(tmp_path / "模型"), PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert b"does not exist" in result.stderr and b"??" in result.stderr


def test_a_folder_name_that_is_no_text(tmp_path: Path) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/\xff\xfe/1")
    assert run("models", "--model-repository", str(tmp_path), "--url", "localhost:1").returncode == 0


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    for number in range(3000):  # more than a pipe holds
        (tmp_path / f"model-with-a-long-name-{number:05}" / "1").mkdir(parents=True)
    run("models", "--model-repository", str(tmp_path), "--url", "localhost:1", shell="| head -1")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream(tmp_path: Path, closed: str) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    arguments = ("models", "--model-repository", str(tmp_path), "--url", "localhost:1")
    assert run(*arguments, shell=closed).returncode == 0


def test_a_repository_that_is_a_file_or_holds_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text('backend: "flashserve"')
    (tmp_path / "m" / "1" / "model.json").write_bytes(b"\xff\xfe")
    for folder in ("file", "nowhere", "."):
        assert run("serve", "--model-repository", str(tmp_path / folder), "--http-port", "0").returncode == 1


def test_a_text_to_continue_that_is_no_utf_8() -> None:
    result = run("generate", "--url", "http://localhost:1", shell="< <(printf '\\xff')")
    assert result.returncode == 1 and b"no server" in result.stderr
