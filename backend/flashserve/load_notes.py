"""With what a model was loaded, as its stub has noted it for the launcher.

A client may load a model with a configuration and files of its own. Triton keeps both to itself, and the files in a
folder of its own: whoever loads the model again without them gets what the repository holds.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from flashserve.paths import native, portable

# Names the folder for notes, one file per model.
NOTES_VARIABLE = "FLASHSERVE_LOAD_NOTES"


@dataclass(frozen=True)
class LoadNote:
    """What Triton told an instance that became ready."""

    config: str
    """The model's whole configuration, as JSON: what the repository or the client says, completed."""
    folder: str
    """Where the model's version folders are."""

    def write(self, notes: Path, model: str) -> None:
        """At once or not at all. Raises OSError."""
        file = _file(notes, model)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps({"config": self.config, "folder": portable(self.folder)}), encoding="utf-8")
        new.replace(file)

    @classmethod
    def read(cls, notes: Path, model: str) -> LoadNote | None:
        """None if there is none: the model is of another backend, or was never ready."""
        try:
            values = json.loads(_file(notes, model).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cls(values["config"], values["folder"])

    @staticmethod
    def names(notes: Path) -> list[str]:
        """The models of which there is one."""
        return [portable(file.stem) for file in notes.glob("*.json")]


def _file(notes: Path, model: str) -> Path:
    return native(notes / f"{model}.json")
