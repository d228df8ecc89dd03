"""Compiles the native kernels into a wheel, for every instruction set of this kind of machine."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Without a compiler the wheel is pure Python, and the kernels are compiled or replaced when they first run."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        library = self._load_module(Path(self.root) / "kernels" / "flashserve_kernels" / "cpu" / "library.py")
        if library.find_compiler() is None:
            self.app.display_warning("no C++ compiler: the wheel comes without native kernels")
            return
        for isa in library.ISA_FLAGS if library.on_x86() else ("baseline",):
            name = library.library_name(isa)
            self.app.display_info(f"compiling {name}")
            library.build(isa, library.SHIPPED / name)
            build_data["force_include"][str(library.SHIPPED / name)] = f"flashserve_kernels/cpu/lib/{name}"
        build_data["pure_python"] = False
        # Nothing in it depends on the interpreter's version.
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"

    @staticmethod
    def _load_module(path: Path) -> Any:
        """The module alone: its package needs torch, which a build has not."""
        spec = importlib.util.spec_from_file_location("library", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
