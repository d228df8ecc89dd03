"""Collects what a bare GPU machine lacks, where there is a network: ``python -m benchmarks.gpu_check.wheels FOLDER``.

The machine has what machine.txt says; everything else that the engine, the tests and the benchmarks import comes along,
in the versions that pyproject.toml allows, for the machine's Python and not for this one. FOLDER/list.txt names it all.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.results import ROOT

MACHINE = Path(__file__).with_name("machine.txt")
NEEDED = (
    "msgspec", "psutil", "llguidance", "tokenizers", "transformers", "jinja2", "safetensors",
    "pytest", "pytest-timeout", "pytest-asyncio", "pytest-xdist",
)  # fmt: skip
"""Of pyproject.toml's requirements: what an engine imports, and what its tests do."""
GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34)
"""Minor versions of glibc 2 that wheels of Linux are built for, up to Ubuntu 22.04's."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the machine's")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.glob("*.whl")):
        parser.error(f"{args.folder} holds wheels already: two versions of one package stop an installation")
    there = machine_packages()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(there.values()))
        command = download_command(args.folder, args.python, constraints, requirements())
        if code := subprocess.run(command, check=False).returncode:
            return code
    wheels = sorted(args.folder.glob("*.whl"))
    for wheel in wheels:
        if package_of(wheel) in there:
            wheel.unlink()  # it was only to say that the others fit to it
    kept = [wheel for wheel in wheels if wheel.exists()]
    Path(args.folder, "list.txt").write_text("".join(f"{package_of(wheel)}\n" for wheel in kept))
    size = sum(wheel.stat().st_size for wheel in kept)
    print(f"{len(kept)} wheels, {size / 2**20:.0f} MiB, for Python {args.python}: {args.folder}")
    return 0


def download_command(folder: Path, python: str, constraints: Path, wanted: list[str]) -> list[str]:
    """pip's, for another machine than this one."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC)] + ["manylinux2014_x86_64"]
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", python, "--constraint", str(constraints), "--dest", str(folder),
        *(word for platform in platforms for word in ("--platform", platform)), *wanted,
    ]  # fmt: skip


def requirements() -> list[str]:
    """The lines of pyproject.toml that name what is needed."""
    lines = re.findall(r'^\s*"([^"]+)",', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    found = {_name(line): line for line in lines if _name(line) in NEEDED}
    return [found[name] for name in NEEDED]


def machine_packages() -> dict[str, str]:
    """Requirement by package, of what the machine has."""
    lines = [line.partition("#")[0].strip() for line in MACHINE.read_text(encoding="utf-8").splitlines()]
    return {_name(line): line for line in lines if line}


def package_of(wheel: Path) -> str:
    return _normal(wheel.name.split("-")[0])


def _name(requirement: str) -> str:
    return _normal(re.split(r"[^\w.-]", requirement)[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
