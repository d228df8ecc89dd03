"""Imports go downwards only. The table below is the architecture; a module that needs more changes it knowingly."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("backend", "kernels", "client", "gateway", "loadtest")
OURS = ("flashserve", "flashserve_kernels", "flashserve_client", "flashserve_gateway", "loadtest")

# Layer: the layers that it may import. The longest name that fits a module is its layer.
ALLOWED: dict[str, tuple[str, ...]] = {
    "flashserve.errors": (),
    "flashserve.protocol": (),
    "flashserve.stub_processes": (),
    "flashserve.home": ("flashserve.errors",),
    "flashserve.triton_http": (),
    "flashserve.coercion": (),
    "flashserve.memory": (),
    "flashserve.paths": (),
    "flashserve.progress": (),
    "flashserve.load_notes": ("flashserve.paths",),
    "flashserve.model_json": ("flashserve.errors", "flashserve.coercion"),
    "flashserve.model_location": ("flashserve.errors", "flashserve.paths"),
    "flashserve.model_card": ("flashserve.errors", "flashserve.paths", "flashserve.protocol"),
    "flashserve.config": ("flashserve.errors", "flashserve.model_json", "flashserve.paths", "flashserve.protocol"),
    "flashserve.structured_outputs": ("flashserve.errors", "flashserve.protocol", "flashserve.coercion"),
    "flashserve.parameter_kinds": (
        "flashserve.errors",
        "flashserve.protocol",
        "flashserve.coercion",
        "flashserve.structured_outputs",
    ),
    "flashserve.sampling_params": (
        "flashserve.errors",
        "flashserve.protocol",
        "flashserve.coercion",
        "flashserve.parameter_kinds",
    ),
    "flashserve.pooling_params": ("flashserve.errors", "flashserve.protocol", "flashserve.coercion"),
    "flashserve_kernels": (),
    # The runner knows steps, never requests: of the scheduler it may see the output type alone.
    "flashserve.scheduling.output": ("flashserve.protocol",),
    "flashserve.scheduling": ("flashserve.errors", "flashserve.protocol", "flashserve.scheduling.output"),
    "flashserve.layers": ("flashserve_kernels", "flashserve.errors"),
    "flashserve.models": (
        "flashserve.layers",
        "flashserve_kernels",
        "flashserve.model_card",
        "flashserve.model_location",
        "flashserve.paths",
        "flashserve.protocol",
        "flashserve.config",
        "flashserve.errors",
    ),
    "flashserve.runner": (
        "flashserve.memory",
        "flashserve.models",
        "flashserve_kernels",
        "flashserve.scheduling.output",
        "flashserve.config",
        "flashserve.protocol",
        "flashserve.errors",
    ),
    "flashserve.ipc": (
        "flashserve",
        "flashserve.home",
        "flashserve.memory",
        "flashserve.progress",
        "flashserve.config",
        "flashserve.protocol",
        "flashserve.errors",
    ),
    "flashserve.engine": (
        "flashserve.stub_processes",
        "flashserve.scheduling",
        "flashserve.scheduling.output",
        "flashserve.runner",
        "flashserve.models",
        "flashserve.text",
        "flashserve.ipc",
        "flashserve.config",
        "flashserve.protocol",
        "flashserve.errors",
    ),
    "flashserve.text": ("flashserve.protocol", "flashserve.paths", "flashserve.errors"),
    "flashserve.frontend": (
        "flashserve.text",
        "flashserve.ipc",
        "flashserve.coercion",
        "flashserve.load_notes",
        "flashserve.paths",
        "flashserve.pooling_params",
        "flashserve.sampling_params",
        "flashserve.stub_processes",
        "flashserve.triton_http",
        "flashserve.config",
        "flashserve.protocol",
        "flashserve.errors",
    ),
    "flashserve.launcher": (
        "flashserve",
        "flashserve.home",
        "flashserve.load_notes",
        "flashserve.progress",
        "flashserve.stub_processes",
        "flashserve.triton_http",
        "flashserve.memory",
        "flashserve.model_location",
        "flashserve.config",
        "flashserve.errors",
    ),
    "flashserve.llm": (
        "flashserve.engine",
        "flashserve.text",
        "flashserve.pooling_params",
        "flashserve.sampling_params",
        "flashserve.config",
        "flashserve.protocol",
        "flashserve.errors",
    ),
    "flashserve.warm": (
        "flashserve.runner",
        "flashserve.models",
        "flashserve_kernels",
        "flashserve.config",
        "flashserve.errors",
    ),
    # The package itself exports lazily, and is imported with each of its modules: at module level nothing of ours.
    "flashserve": (),
    "model": ("flashserve.frontend",),  # backend/model.py, Triton's entry
    "flashserve_client": (),
    "flashserve_gateway": ("flashserve_client",),
    "loadtest": ("flashserve_client",),
}
ALLOWED["flashserve.cli"] = tuple(ALLOWED)  # sits on top of everything

# Library: the only layers that may import it, also inside a function.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": ("flashserve_kernels", "flashserve.layers", "flashserve.models", "flashserve.runner"),
    "triton": ("flashserve_kernels",),
    "transformers": ("flashserve.models",),
    "triton_python_backend_utils": ("flashserve.frontend",),
    "tritonclient": ("flashserve_client", "loadtest"),
}
LAZY = ("transformers",)  # seconds to import: inside a function only

# What runs in the stub, the launcher or a client's process: importing it must never bring torch, however indirectly.
WITHOUT_TORCH = (
    "flashserve.errors",
    "flashserve.protocol",
    "flashserve.config",
    "flashserve.model_location",
    "flashserve.sampling_params",
    "flashserve.scheduling",
    "flashserve.ipc",
    "flashserve.text",
    "flashserve.frontend",
    "flashserve.launcher",
    "flashserve.cli",
    "flashserve",
)


@dataclass(frozen=True)
class Import:
    module: str
    """Who imports."""
    target: str
    line: int
    lazy: bool
    """Inside a function, or for type checkers only."""

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def layer_of(module: str) -> str | None:
    """The longest entry of the table that is the module or a package above it."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    found = next((name for name in names if name in ALLOWED), None)
    # "flashserve" is the package's own file, not a home for modules that nobody placed.
    return None if found == "flashserve" != module else found


def find_modules() -> dict[str, Path]:
    """Every module of the product by its import name, as far as the folders exist."""
    modules: dict[str, Path] = {}
    for source in SOURCES:
        base = ROOT if source == "loadtest" else ROOT / source  # loadtest's files are not in a package
        for path in sorted((ROOT / source).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def imports_of(module: str, path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import name` imports a module if there is one of that name
                full = f"{base}.{alias.name}"
                # What the package itself exports comes from above, except __version__ and the like.
                exported = base == "flashserve" and not alias.name.startswith("__")
                yield Import(module, full if full in MODULES or exported else base, node.lineno, lazy)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), lazy=False)


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path)]


def layers_of_ours(name: str) -> str | None:
    """The layer of an imported name; None if it is not ours."""
    if name.split(".")[0] not in OURS:
        return None
    return layer_of(name) or name


def test_every_module_has_a_layer() -> None:
    homeless = [module for module in MODULES if layer_of(module) is None]
    assert not homeless, f"place these in ALLOWED: {homeless}"
    assert "flashserve.scheduling.scheduler" in MODULES  # the search itself works


def test_the_table_has_no_cycles() -> None:
    graph = {layer: [name for name in names if name != "flashserve"] for layer, names in ALLOWED.items()}
    TopologicalSorter(graph).prepare()
    assert {name for names in ALLOWED.values() for name in names} <= set(ALLOWED)


def test_no_permission_is_unused() -> None:
    used = {(layer_of(found.module), layers_of_ours(found.target)) for found in IMPORTS}
    granted = {(layer, name) for layer, names in ALLOWED.items() for name in names if layer != "flashserve.cli"}
    assert not granted - used, f"take these out of ALLOWED: {sorted(granted - used)}"


def test_no_two_modules_import_each_other() -> None:
    """Not even lazily, and not over others."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        if found.target in MODULES and found.target != found.module:
            graph[found.module].add(found.target)
    TopologicalSorter(graph).prepare()


def test_a_class_name_means_one_thing_within_a_package() -> None:
    homes: dict[tuple[str, str], list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault((module.split(".")[0], node.name), []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def layer_table() -> str:
    """ALLOWED as docs/architecture.md shows it."""

    def short(name: str) -> str:
        return name.removeprefix("flashserve.").removeprefix("flashserve_")

    shown = {name: targets for name, targets in ALLOWED.items() if name not in ("flashserve", "flashserve.cli")}
    ground = [short(name) for name, targets in shown.items() if not targets]
    above = [
        f"    {short(name)} → {', '.join(short(target) for target in targets if target != 'flashserve')}"
        for name, targets in shown.items()
        if targets
    ]
    lines = textwrap.wrap(f"{', '.join(ground)} → nothing of ours", 112, subsequent_indent="    ")
    return "\n".join([*(f"    {line}" for line in lines), *above, "    cli → all of them"])


def test_the_architecture_page_shows_this_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert layer_table() in page, f"docs/architecture.md must hold:\n\n{layer_table()}"


def test_imports_go_downwards_only() -> None:
    wrong = []
    for found in IMPORTS:
        target, layer = layers_of_ours(found.target), layer_of(found.module)
        if target is None or target == layer or target in ALLOWED.get(layer or "", ()):
            continue
        if layer == "flashserve" and found.lazy:
            continue
        wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_layers(library: str) -> None:
    users = [found for found in IMPORTS if found.target.split(".")[0] == library]
    wrong = [str(found) for found in users if layer_of(found.module) not in ONLY_IN[library]]
    wrong += [f"{found} at module level" for found in users if library in LAZY and not found.lazy]
    assert not wrong, "\n".join(wrong)


PROGRAM = """
import importlib, sys, types
from unittest.mock import MagicMock

sys.modules["triton_python_backend_utils"] = MagicMock()  # exists inside Triton only
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "transformers", "triton"} & set(sys.modules)
    assert not heavy, f"importing {name} brought {heavy}"
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def import_all(modules: list[str]) -> set[str]:
    """Import the modules in a fresh interpreter; returns the top-level names that this brought."""
    paths = [str(ROOT / source) for source in SOURCES]
    setup = f"import sys; sys.path[:0] = {paths!r}\n"
    command = [sys.executable, "-c", setup + PROGRAM, *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_stub_and_launcher_never_brings_torch() -> None:
    modules = [m for m in MODULES if layer_of(m) in WITHOUT_TORCH and not m.endswith("__main__")]
    assert "flashserve.scheduling.scheduler" in modules
    import_all(modules)


def test_the_client_brings_neither_torch_nor_the_server() -> None:
    modules = [m for m in MODULES if layer_of(m) == "flashserve_client" and not m.endswith("__main__")]
    brought = import_all(modules) if modules else set()
    assert not brought & {"flashserve", "flashserve_kernels", "msgspec", "tokenizers"}
