"""The steps of a check, in one table. Imports nothing that a bare machine lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGE_LIMITS_S = {1: 300, 2: 400}
"""What a stage may take in all, installing included: two leases of a quarter of an hour together with their starts."""

_PYTEST = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.outcomes")
_FIGURES = ("{python}", "-m", "benchmarks.gpu", "--resume", "{figures}")
_WARM = ("{python}", "-m", "benchmarks.gpu_check.warm", "--cache", "{cache}")
_TINY = ("--device", "cpu", "--tiny")
_GREEDY = "tests/gpu/test_greedy.py"


@dataclass(frozen=True)
class Step:
    """One process of a check. Whatever becomes of it, the others run."""

    name: str
    stage: int
    limit_s: int
    """After which its whole process group is killed. Those of a stage fit into the stage together."""
    command: tuple[str, ...]
    """{python}: the interpreter; {site}, {wheels}: where wheels are installed, and whence; {figures}: the file of
    benchmarks.gpu; {machine}: the file of the machine's facts; {cache}: compiled kernels,
    a folder of {work}; {archive}: where they are packed, without the suffix; {scratch}: for whatever is not kept."""
    dry: tuple[str, ...] | None = None
    """The same without a GPU, in seconds; None: left out."""
    needs: str | None = None
    """A placeholder without which there is nothing to do."""

    def words(self, values: Mapping[str, str], dry: bool) -> list[str] | None:
        """Its command line, or None where it has none."""
        command = self.dry if dry else self.command
        if command is None or (self.needs is not None and self.needs not in values):
            return None
        return [word.format_map(values) for word in command]


def _bench(sections: str, seconds: int) -> tuple[str, ...]:
    return (*_FIGURES, "--budget-s", str(seconds), "--sections", *sections.split())


def _tiny(sections: str) -> tuple[str, ...]:
    return (*_FIGURES, *_TINY, "--sections", *sections.split())


_INSTALL = (
    "{python}", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade",
    "--disable-pip-version-check", "--find-links", "{wheels}", "--target", "{site}",
    "--requirement", "{wheels}/list.txt",
)  # fmt: skip
_MACHINE = ("{python}", "-m", "benchmarks.gpu_check.machine", "{machine}")
_PACK = (
    "{python}", "-c", "import shutil, sys; shutil.make_archive(*sys.argv[1:])", "{archive}", "gztar", "{work}", "cache",
)  # fmt: skip

STEPS = (
    # Stage 1: is it right, and what does the 8B shape reach?
    Step("wheels", 1, 20, _INSTALL, _INSTALL, needs="wheels"),
    Step("machine", 1, 15, _MACHINE, _MACHINE),
    Step("compile", 1, 45, (*_WARM, "qwen3-8b", "llama", "qwen3"), (*_WARM, "tiny", "--gpu", "H200", "--most", "2")),
    Step("parity: llama, qwen3", 1, 75, (*_PYTEST, _GREEDY, "-k", "(llama or qwen3) and not wide"),
         (*_PYTEST, "tests/kernels/gpu/test_engine.py", "-k", "gpt2")),
    Step("ceilings", 1, 20, _bench("ceilings", 15), _tiny("ceilings")),
    Step("8B", 1, 100, _bench("qwen3-8b", 90), _tiny("qwen3-8b")),
    Step("pack the cache", 1, 20, _PACK, _PACK),
    # Stage 2: with what stage 1 taught, and its cache.
    Step("wheels", 2, 15, _INSTALL, needs="wheels"),
    Step("machine", 2, 10, _MACHINE, _MACHINE),
    Step("compile", 2, 30, (*_WARM, "qwen3-8b", "gemma3", "gpt2", "mistral", "qwen2")),
    Step("ceilings", 2, 15, _bench("ceilings", 10), _tiny("ceilings")),
    Step("attention", 2, 60, _bench("attention yardsticks", 55), _tiny("yardsticks")),
    Step("8B", 2, 80, _bench("qwen3-8b", 70)),
    Step("parity: all families", 2, 60, (*_PYTEST, _GREEDY, "-k", "test_float32 or test_16_bits")),
    Step("graphs, late compiles", 2, 40, (*_PYTEST, "tests/gpu/test_engine.py", "-k", "graphs or compil or chunks")),
    Step("kernels", 2, 30, _bench("kernels products", 25), _tiny("products")),
    Step("memory checker", 2, 20, (
        "compute-sanitizer", "--error-exitcode", "9", "{python}", "-m", "benchmarks.gpu", "--tiny",
        "--output", "{scratch}", "--sections", "attention",
    )),
    Step("1B and 135M", 2, 40, _bench("llama-3.2-1b smollm2-135m", 35)),
)  # fmt: skip
"""Stage by stage, the most valuable first."""
