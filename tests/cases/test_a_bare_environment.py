"""A user without a home, and folders from which nothing can be started: served, or refused with what helps."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashserve.errors import ConfigError
from flashserve.home import with_home
from flashserve.launcher import workspace
from flashserve.launcher.errors import LauncherError
from flashserve_kernels.cpu import library
from harness import SOURCES, Server
from null_models import null_model, write_null_model
from requests_helper import generate

# As on a machine whose list of users lacks this one's number.
NOT_LISTED = """
import pwd

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
"""
HOMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME")


@pytest.fixture
def nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for PYTHONPATH, which makes this user one without an entry; the variables are unset."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NOT_LISTED)
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)
    return folder


def test_a_user_without_a_home_is_served(nameless: Path, tmp_path: Path) -> None:
    model = null_model(write_null_model(tmp_path / "null"))
    server = Server({"demo": model}, python_path=[nameless])
    home = server.folder / "tmp" / f"flashserve-home-{os.getuid()}"
    try:
        server.start()
        assert generate(server, model="demo", text_input="hello", max_tokens=3)["text_output"]
        environ = Path(f"/proc/{server.tritonserver_pids()[0]}/environ").read_bytes().split(b"\0")
        assert b"HOME=" + os.fsencode(home) in environ
        assert home.stat().st_mode & 0o777 == 0o700
        server.stop()
        assert server.leftovers() == [str(home)]  # it holds what is compiled and downloaded once
    finally:
        server.destroy()


@pytest.mark.parametrize("words", [("serve", "--model", "~/m"), ("serve", "--model-repository", "~/m")])
def test_a_path_in_a_home_that_is_not_known(nameless: Path, words: tuple[str, ...]) -> None:
    env = {**os.environ, "PYTHONPATH": ":".join([str(nameless), *SOURCES])}
    command = [sys.executable, "-m", "flashserve.cli", *words]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "~/m: no home folder is known for ~" in result.stderr and "set HOME" in result.stderr


def test_a_home_that_others_can_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flashserve.home._is_listed", lambda: False)
    (tmp_path / f"flashserve-home-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"flashserve-home-{os.getuid()}").chmod(0o777)
    with pytest.raises(ConfigError, match="open to others; set HOME"):
        with_home({"TMPDIR": str(tmp_path)})
    assert with_home({"HOME": "/h"}) == {"HOME": "/h"}


def test_temporary_folders_on_which_nothing_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    noexec = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda folder: noexec)
    with pytest.raises(LauncherError, match="/tmp is mounted noexec") as caught:
        workspace.create()
    assert "set TMPDIR" in caught.value.advice


def test_the_next_folder_is_taken_where_the_first_will_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = {"/tmp": os.ST_NOEXEC, "/var/tmp": os.ST_NOEXEC, str(tmp_path): 0}
    monkeypatch.setattr(workspace, "OTHER_FOLDERS", ("/var/tmp", str(tmp_path)))
    monkeypatch.setattr(workspace.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=folders[folder]))
    assert workspace.create().folder.parent == tmp_path


def test_compiled_kernels_that_cannot_be_loaded_say_which_variable_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reason goes to the log, and torch's ops serve."""

    def refuse(name: str) -> None:
        raise OSError(f"{name}: failed to map segment from shared object")

    monkeypatch.setattr(library, "find_library", lambda isa, sanitize: tmp_path / "library.so")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    library.load_library.cache_clear()
    with pytest.raises(library.NativeUnavailable, match=r"failed to map segment.*set XDG_CACHE_HOME"):
        library.load_library("avx2")
