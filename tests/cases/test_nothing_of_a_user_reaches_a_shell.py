"""Nothing of a user's path or name reaches a shell: Triton's Python backend starts its stubs by a shell's command."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
from test_launcher import ask, flashserve, standin

from flashserve.launcher import shell_words
from flashserve.triton_http import ask as ask_triton
from harness import Server

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


def test_a_repository_of_any_path_is_served_and_so_is_a_folder_for_temporary_files() -> None:
    """From the second the stub itself would be started."""
    server = standin({"demo": {}})
    rename(server, f'it\'s a "blank" {EVIL}')
    temporary = server.folder / f"a blank {EVIL}"
    temporary.mkdir()
    server._env["TMPDIR"] = str(temporary)
    with server:
        assert ask(server) == ["one", "two", "three"]
        assert all(EVIL not in stub.model_path for stub in server.stubs())
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


def test_a_name_that_comes_later_does_not_reach_it_either(tmp_path: Path) -> None:
    server = standin({"demo": {}}).start()
    name = "m;touch${IFS}PWNED"
    try:
        server.add_model(name, {})
        with contextlib.suppress(TimeoutError):  # Triton waits for a stub that was not started
            address = server.http.removeprefix("http://")
            ask_triton(address, "POST", f"/v2/repository/models/{name}/load", "{}", timeout_s=1)
        server.wait_for_log("no plain word for a shell: exec", 10)
        assert not Path("PWNED").exists() and ask(server) == ["one", "two", "three"]
    finally:
        server.destroy()


def test_the_guard_lets_pass_what_is_plain_and_what_starts_no_stub(tmp_path: Path) -> None:
    (tmp_path / "stub").write_text("#!/bin/sh\necho $#")
    (tmp_path / "stub").chmod(0o700)
    guard = tmp_path / "bash"
    guard.write_text(shell_words.guard_script("/bin/sh", "stub"))
    guard.chmod(0o700)

    def run(*words: str) -> str:
        return subprocess.run([guard, *words], capture_output=True, text=True).stdout.strip()

    plain = f" exec {tmp_path}/stub /模型/1/model.py a 1 1 7 /b 3 m_0 /c"
    assert run("-c", plain) == "9"
    assert run("-c", "echo $(echo 'a b')") == "a b"
    for special in ("$(x)", "a b", "a\tb", "a\nb", *(f"a{character}b" for character in "$`\"'\\;&|<>(){}[]*?!#~^")):
        assert run("-c", plain.replace("m_0", special)) == "", special


@pytest.mark.parametrize("word", ["demo", "Qwen3-0.6B", "a_b.c@d%e+f=g:h,i", "模型", "हिन्दी", "/a/b/1"])
def test_plain_words_are_taken_as_they_are(word: str) -> None:
    assert shell_words.is_plain(word)
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True).stdout == word.encode()


@pytest.mark.parametrize("character", " \t\n\u00a0\u3000$`\"'\\;&|<>(){}[]*?!#~^")
def test_nothing_else_is(character: str) -> None:
    assert not shell_words.is_plain(f"a{character}b")
