"""ENABLE_VLLM_HEALTH_CHECK: when a model leaves, and what happens if Triton will not let it."""

from __future__ import annotations

import logging

import pytest

from flashserve.errors import Unavailable
from flashserve.frontend.health_check import HealthCheck


class Model:
    """Whose engine lives or not, and whose unload is refused or not."""

    def __init__(self, refusal: str | None = None) -> None:
        self.ready, self.draining, self.unloads, self.refusal = True, False, 0, refusal
        self.check = HealthCheck(lambda: self.ready, lambda: self.draining, self._unload)

    def _unload(self) -> None:
        self.unloads += 1
        if self.refusal:
            raise RuntimeError(self.refusal)

    def answers(self) -> bool:
        try:
            self.check.check()
        except Unavailable as error:
            assert error.message == "Model is unavailable due to unhealthy vLLM engine"
            return False
        return True


def test_a_model_whose_engine_died_leaves_once_and_for_all() -> None:
    model = Model()
    assert model.answers()
    model.ready = False
    assert [model.answers() for _ in range(3)] == [False] * 3
    model.ready = True  # the new engine was quicker than the unload
    assert not model.answers()
    assert model.unloads == 1


def test_a_model_that_may_not_leave_serves_again_with_its_new_engine(caplog: pytest.LogCaptureFixture) -> None:
    model = Model("explicit model load / unload is not allowed")
    model.ready = False
    with caplog.at_level(logging.ERROR):
        assert [model.answers() for _ in range(100)] == [False] * 100
    assert model.unloads == 1  # not with every request, each of which would be a line of log
    assert "cannot be unloaded (explicit model load / unload is not allowed)" in caplog.text
    model.ready = True
    assert model.answers()
    model.ready = False
    assert not model.answers()
    assert model.unloads == 2


def test_the_end_of_an_engine_that_is_being_unloaded_is_no_fault() -> None:
    model = Model()
    model.ready, model.draining = False, True
    assert not model.answers()
    assert model.unloads == 0
