"""How a model is loaded again so that it is what it was: also one that a client gave a configuration or files."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from flashserve.load_notes import LoadNote
from flashserve.stub_processes import COPY


class Loads:
    """What the models of a run were loaded with. Read by the launcher's main thread and those that load models."""

    def __init__(self, notes: Path, remote: bool) -> None:
        """``notes`` is the folder that stubs write to. ``remote``: models come from a bucket, of which Triton makes
        copies that look like a client's files; then these are not known."""
        self._notes = notes
        self._remote = remote
        self._at_start: dict[str, str] = {}
        """Configurations that tritonserver read from its repositories."""

    def started(self, names: Iterable[str]) -> None:
        """Tritonserver has loaded these by itself, so that they are what the repositories hold."""
        for name in names:
            note = LoadNote.read(self._notes, name)
            if note is not None:
                self._at_start[name] = note.config

    def names(self) -> list[str]:
        """Models that were ready at some time of the run."""
        return LoadNote.names(self._notes)

    def are_a_clients(self, name: str) -> bool:
        """True unless a start of tritonserver is known to have given the same model."""
        note = LoadNote.read(self._notes, name)
        return note is not None and (self._files(name, note) is not None or note.config != self._at_start.get(name))

    def parameters(self, name: str) -> dict[str, str]:
        """Triton's parameters of a load that gives the same model again; empty where the repository does. Raises
        OSError if a client's files are gone."""
        note = LoadNote.read(self._notes, name)
        if note is None or not self.are_a_clients(name):
            return {}
        files = self._files(name, note)
        parameters = {"config": note.config}
        if files is not None:
            found = [path for path in sorted(files.rglob("*")) if path.is_file()]
            if not found:
                raise FileNotFoundError(f"{files} is empty")
            for path in found:
                parameters[f"file:{path.relative_to(files)}"] = base64.b64encode(path.read_bytes()).decode("ascii")
        return parameters

    def keep_files(self, names: Iterable[str]) -> None:
        """Take the files that clients gave from a tritonserver that is to be ended, or has ended and left them."""
        for name in names:
            note = LoadNote.read(self._notes, name)
            files = self._files(name, note) if note is not None else None
            if note is not None and files is not None and files.parent != self._notes:
                kept = self._notes / f"{name}.files"
                shutil.rmtree(kept, ignore_errors=True)
                try:
                    shutil.move(files, kept)
                    replace(note, folder=str(kept)).write(self._notes, name)
                except OSError:  # gone, or no room for them: the load will say so
                    shutil.rmtree(kept, ignore_errors=True)

    def _files(self, name: str, note: LoadNote) -> Path | None:
        """The folder with what a client gave in place of the repository's files."""
        folder = Path(note.folder)
        is_copy = folder.name != name and COPY.fullmatch(folder.name) is not None
        return folder if folder.parent == self._notes or (is_copy and not self._remote) else None
