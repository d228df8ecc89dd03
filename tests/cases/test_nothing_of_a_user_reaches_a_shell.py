"""Nothing of a user's path or name reaches a shell: Triton's Python backend starts its stubs by a shell's command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import Server
from test_launcher import ask, flashserve, standin

from flashserve.launcher import shell_words

EVIL = "$(touch PWNED)"


def rename(server: Server, folder: str) -> Path:
    """Give a server's repository another path."""
    target = server.folder / folder / "repository"
    target.parent.mkdir(parents=True)
    server.repository.rename(target)
    server.repository = target
    return target


def refused(repository: Path) -> str:
    """What is said of a repository that is not served."""
    result = flashserve("serve", "--backend-module", "standin_backend", "--model-repository", str(repository))
    assert result.returncode == 1
    assert not Path("PWNED").exists()
    return result.stderr


@pytest.mark.parametrize("folder", [f'it\'s a "blank" {EVIL}'], ids=["blank, quotes, command"])
def test_a_repository_of_any_path_is_served(folder: str) -> None:
    server = standin({"demo": {}})
    rename(server, folder)
    with server:
        assert ask(server) == ["one", "two", "three"]
        assert all(EVIL not in stub.model_path for stub in server.stubs())
    assert not Path("PWNED").exists()


def test_a_folder_for_temporary_files_of_any_path() -> None:
    """The stub itself would be started from it."""
    server = standin({"demo": {}})
    temporary = server.folder / f"a blank {EVIL}"
    temporary.mkdir()
    server._env["TMPDIR"] = str(temporary)
    with server:
        assert ask(server) == ["one", "two", "three"]
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", [f"m{EVIL}", "a model", "m;true", "it's"])
def test_a_model_whose_name_is_no_plain_word_is_refused_at_once(name: str) -> None:
    server = standin({name: {}})
    try:
        told = refused(server.repository)
        assert repr(name) in told and "shell" in told and "rename the folder" in told
    finally:
        server.destroy()


def test_an_instance_s_name_is_refused_likewise() -> None:
    server = standin({"demo": {}}, config=f'instance_group [ {{ name: "x" "{EVIL}" kind: KIND_CPU }} ]')
    try:
        assert f"the name 'x{EVIL}'" in refused(server.repository)
    finally:
        server.destroy()


@pytest.mark.parametrize("word", ["demo", "Qwen3-0.6B", "a_b.c@d%e+f=g:h,i", "模型", "हिन्दी", "/a/b/1"])
def test_plain_words_are_taken_as_they_are(word: str) -> None:
    assert shell_words.is_plain(word)
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True).stdout == word.encode()


@pytest.mark.parametrize("character", " \t\n\u00a0\u3000$`\"'\\;&|<>(){}[]*?!#~^")
def test_nothing_else_is(character: str) -> None:
    assert not shell_words.is_plain(f"a{character}b")
