"""When a missing stub counts as dead: the model is ready, and it has been missing twice."""

from __future__ import annotations

from typing import Any

import pytest

from flashserve.launcher import stubs
from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.stubs import StubWatch
from flashserve.stub_processes import Stub, parse_stub


class FakeControl(TritonControl):
    """A server with models: name → (state, number of instances, backend)."""

    def __init__(self, **models: tuple[str, int, str]) -> None:
        super().__init__("nowhere:0")
        self.models = models
        self.asked = 0

    def index(self) -> list[dict[str, str]]:
        self.asked += 1
        if not self.models:
            raise ControlError("no answer")
        return [{"name": name, "version": "1", "state": state} for name, (state, _, _) in self.models.items()]

    def config(self, name: str) -> dict[str, Any]:
        _, count, backend = self.models[name]
        return {"backend": backend, "instance_group": [{"count": count, "gpus": []}]}


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    """The stubs that live; a test adds and removes."""
    found: list[Stub] = []
    monkeypatch.setattr(stubs, "list_stubs", lambda server: list(found))
    return found


def stub(pid: int, model: str, index: int = 0) -> Stub:
    return Stub(pid, f"/models/{model}/1/model.py", f"{model}_{index}")


def test_a_stub_is_known_by_its_command_line() -> None:
    line = "/b/python/triton_python_backend_stub /repo/demo/1/model.py region 1 1 77 /b/python 336 demo_0 /b/flashserve"
    found = parse_stub(5, line.split())
    assert found == Stub(5, "/repo/demo/1/model.py", "demo_0")
    assert found.belongs_to("demo")
    assert not found.belongs_to("dem")
    assert parse_stub(6, ["/usr/bin/python3", "-m", "x"]) is None
    assert parse_stub(7, [""]) is None  # a zombie


def test_similar_names_are_told_apart_by_the_folder() -> None:
    assert stub(1, "a_0").belongs_to("a_0")
    assert not stub(1, "a_0").belongs_to("a")


def test_a_reload_replaces_the_same_instance_that_started_before() -> None:
    def started(ticks: int, path: str = "/models/a/1/model.py", instance: str = "a_0") -> Stub:
        return Stub(ticks, path, instance, ticks)

    assert started(2).replaces(started(1))
    assert not started(1).replaces(started(2))
    assert not started(2).replaces(started(1, instance="a_1"))
    assert not started(2).replaces(started(1, path="/models/a/2/model.py"))
    assert started(2, "/tmp/folderAbCdEf/1/model.py").replaces(started(1, "/tmp/folderGhIjKl/1/model.py"))


def test_a_stub_of_a_bucket_s_model_is_known_by_its_instance() -> None:
    assert Stub(1, "/tmp/folderXy12Ab/1/model.py", "demo_0").belongs_to("demo")


def test_a_stub_counts_as_dead_at_the_second_look(living: list[Stub]) -> None:
    watch = StubWatch(1, FakeControl(a=("READY", 1, "flashserve"), b=("READY", 1, "flashserve")))
    living += [stub(10, "a"), stub(11, "b")]
    assert watch.dead_models() == []
    del living[0]
    assert watch.dead_models() == []
    assert watch.dead_models() == ["a"]


def test_one_of_two_instances_is_enough_to_reload(living: list[Stub]) -> None:
    watch = StubWatch(1, FakeControl(a=("READY", 2, "flashserve")))
    living += [stub(10, "a"), stub(11, "a", 1)]
    assert watch.dead_models() == []
    del living[1]
    assert [watch.dead_models(), watch.dead_models()] == [[], ["a"]]


def test_an_unloaded_model_is_not_dead(living: list[Stub]) -> None:
    control = FakeControl(a=("READY", 1, "flashserve"))
    watch = StubWatch(1, control)
    living.append(stub(10, "a"))
    assert watch.dead_models() == []
    living.clear()
    assert watch.dead_models() == []  # the stub ended a moment before the state changed
    control.models["a"] = ("UNAVAILABLE", 1, "flashserve")
    assert watch.dead_models() == []
    assert watch.dead_models() == []


def test_a_model_of_the_vllm_backend_has_stubs_too(living: list[Stub]) -> None:
    watch = StubWatch(1, FakeControl(a=("READY", 1, "vllm")))
    assert [watch.dead_models(), watch.dead_models()] == [[], ["a"]]


def test_models_without_stubs_are_left_alone(living: list[Stub]) -> None:
    watch = StubWatch(1, FakeControl(onnx=("READY", 1, "onnxruntime")))
    assert [watch.dead_models() for _ in range(3)] == [[], [], []]


def test_a_server_that_does_not_answer_says_nothing_about_stubs(living: list[Stub]) -> None:
    watch = StubWatch(1, FakeControl())
    assert [watch.dead_models() for _ in range(3)] == [[], [], []]


def test_while_nothing_changes_the_server_is_not_asked(living: list[Stub]) -> None:
    control = FakeControl(a=("READY", 1, "flashserve"))
    watch = StubWatch(1, control)
    living.append(stub(10, "a"))
    for _ in range(10):
        watch.dead_models()
    assert control.asked == 1
