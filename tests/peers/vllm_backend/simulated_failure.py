# Appended to the backend's model.py. The health suite simulates an engine's failure by adding a method check_health to
# a file of vLLM, which says so from its second call on. Here the same file makes the engine look dead the same way.
import itertools
import os
from pathlib import Path

from flashserve.ipc.supervisor import EngineSupervisor

_engine = Path(os.environ["VLLM_SUITE_INSTALL"], "v1", "engine", "async_llm.py").read_text(encoding="utf-8")
if "def check_health" in _engine:
    _checks = itertools.count(1)
    _alive = vars(EngineSupervisor)["ready"].fget
    EngineSupervisor.ready = property(lambda self: _alive(self) and next(_checks) == 1)  # type: ignore
