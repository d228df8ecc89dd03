"""What the arguments behind ``--`` mean for a start: which models it loads, and what tritonserver is told."""

from __future__ import annotations

import pytest

from flashserve.launcher.errors import LauncherError
from flashserve.launcher.triton_arguments import ALL, TritonArguments

EXPLICIT = "--model-control-mode=explicit"


@pytest.mark.parametrize(
    ("words", "load"),
    [
        ([], ALL),
        (["--log-verbose=1"], ALL),
        (["--load-model=a"], ("a",)),
        (["--load-model", "a"], ("a",)),
        ([EXPLICIT, "--load-model=a", "--load-model", "b", "--load-model=a"], ("a", "b")),
        ([EXPLICIT, "--load-model=*"], ALL),
        ([EXPLICIT], ()),
        (["--model-control-mode", "explicit"], ()),
    ],
)
def test_which_models_are_loaded(words: list[str], load: tuple[str, ...]) -> None:
    assert TritonArguments.parse(words).load == load


@pytest.mark.parametrize(("words", "says"), [([], False), (["--log-verbose=1"], False), ([EXPLICIT], True)])
def test_whether_somebody_chose_what_is_loaded(words: list[str], says: bool) -> None:
    assert TritonArguments.parse(words).says_load is says
    assert TritonArguments.parse([*words, "--load-model=*"]).says_load  # as its advice says: everything


def test_what_is_not_about_loading_is_passed_on_in_its_order() -> None:
    words = ["--log-verbose", "1", EXPLICIT, "--load-model", "a", "--exit-timeout-secs=3"]
    assert TritonArguments.parse(words).others == ("--log-verbose", "1", "--exit-timeout-secs=3")


@pytest.mark.parametrize("words", [["--http-port", "1"], ["--http-port=1"], ["--backend-directory=/x"]])
def test_the_launcher_s_own_options_cannot_be_given_twice(words: list[str]) -> None:
    with pytest.raises(LauncherError, match=f"{words[0].split('=')[0]} is set by flashserve"):
        TritonArguments.parse(words)


@pytest.mark.parametrize("words", [["--model-control-mode=poll"], ["--model-control-mode", "none"]])
def test_another_control_mode_is_refused(words: list[str]) -> None:
    with pytest.raises(LauncherError, match="--model-control-mode is set by flashserve to explicit") as caught:
        TritonArguments.parse(words)
    assert "--load-model=NAME" in caught.value.advice


def test_all_and_one_is_refused_as_triton_does() -> None:
    with pytest.raises(LauncherError, match=r"--load-model=\* goes with no other"):
        TritonArguments.parse(["--load-model=*", "--load-model=a"])


@pytest.mark.parametrize("option", ["--load-model", "--model-control-mode"])
def test_an_option_without_its_value_is_refused(option: str) -> None:
    with pytest.raises(LauncherError, match=f"{option} needs a value"):
        TritonArguments.parse(["--log-verbose=1", option])
