"""Small inputs in the spirit of filed reports, one test for each.

Each file is a kind: what it says must hold everywhere, and its tests are the places where it once did not.

| kind | file |
|---|---|
| weights and configs mean what transformers makes of them | test_weights_and_configs.py |
| a tokenizer is what transformers makes of its folder | test_tokenizer_files.py |
| an empty list or a null is as good as nothing | test_empty_values.py |
| nobody waits for ever | test_waiting.py |
| any path that the system takes is served | test_paths.py |
| nothing of a user's path or name reaches a shell | test_nothing_of_a_user_reaches_a_shell.py |
| a process is healthy when it answers, not when it exists | test_a_process_is_healthy_when_it_answers.py |
| a reload serves what was loaded | test_a_reload_serves_what_was_loaded.py |
| a deadline holds whoever keeps it | test_a_deadline_holds.py |
| each stream is told its end | test_every_stream_is_told_its_end.py |
| what was inherited stays, what died is reaped | test_what_was_inherited_stays.py, test_nothing_dead_stays.py |
| a refusal gives the true reason, never a traceback | test_the_true_reason.py, test_no_traceback.py |
| a flood stays a trickle | test_a_flood_stays_a_trickle.py |
| a bare environment is served, or told what it lacks | test_a_bare_environment.py |
| a process holds what is its own | test_processes.py |
| memory that the system gives back on demand is free | test_free_memory.py |
| what is needed no more is given back | test_memory_is_given_back.py |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edit = Callable[..., None]


@pytest.fixture
def edit() -> Edit:
    """``edit(file, key=value, …)`` changes keys of a JSON file; None as a value is written as null."""

    def change(file: Path, **values: Any) -> None:
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**content, **values}))

    return change
