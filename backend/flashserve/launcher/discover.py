"""Finds a tritonserver, its Python backend, and the stub for the Python that runs now."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from flashserve.launcher.errors import LauncherError
from flashserve.stub_processes import STUB_NAME

PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
CONTAINER_ROOT = Path("/opt/tritonserver")
# The release inside each nvidia-pytriton; the binary itself cannot be asked without starting it.
PYTRITON_RELEASES = {"0.7.0": "2.51.0"}


@dataclass(frozen=True)
class TritonInstall:
    """A tritonserver and what is needed to run Python backends with it."""

    server: Path
    """The executable."""
    backends: Path
    """Its own backends; ``python/`` is among them."""
    stub: Path | None
    """The Python backend's stub for this interpreter; None when it has none."""
    library_paths: tuple[Path, ...]
    """What LD_LIBRARY_PATH must hold besides libpython's folder."""
    origin: str
    """Where it comes from, in words."""
    version: str
    """Triton's version; empty if it is not known."""

    def __str__(self) -> str:
        return f"tritonserver {self.version}".rstrip() + f" ({self.origin})"


def find_triton() -> TritonInstall | None:
    """The tritonserver on PATH, else NVIDIA's container's, else the one in nvidia-pytriton."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return _installed(Path(on_path).resolve(), "found on PATH")
    if (CONTAINER_ROOT / "bin" / "tritonserver").is_file():
        return _installed(CONTAINER_ROOT / "bin" / "tritonserver", f"found in {CONTAINER_ROOT}")
    return _from_pytriton()


def require_triton() -> TritonInstall:
    """Like :func:`find_triton`, but everything a Python backend needs must be there."""
    install = find_triton()
    if install is None:
        raise LauncherError(
            "no tritonserver found: not on PATH, not in /opt/tritonserver, not from nvidia-pytriton",
            f"{sys.executable} -m pip install 'flashserve[server]', or run in NVIDIA's tritonserver container",
        )
    if install.stub is None:
        raise LauncherError(
            f"the tritonserver {install.origin} has no Python backend for Python {PYTHON_VERSION}",
            stub_advice(install),
        )
    if find_libpython() is None:
        raise LauncherError(f"{libpython_name()} is missing, which Triton's stub loads", libpython_advice())
    return install


def stub_advice(install: TritonInstall) -> str:
    """How to get a stub that fits this Python."""
    available = stub_version(install.backends / "python" / STUB_NAME)
    if available:
        return f"its stub is for Python {available}: install flashserve into that Python and start it there"
    return "use Python 3.10, 3.11 or 3.12"


def _installed(server: Path, origin: str) -> TritonInstall:
    root = server.parent.parent
    stub: Path | None = root / "backends" / "python" / STUB_NAME
    if stub is not None and stub_version(stub) not in (PYTHON_VERSION, None):
        stub = None
    version_file = root / "TRITON_VERSION"
    version = os.environ.get("TRITON_SERVER_VERSION", "")
    if version_file.is_file():
        version = version_file.read_text(encoding="utf-8").strip()
    return TritonInstall(
        server=server,
        backends=root / "backends",
        stub=stub if stub is not None and stub.is_file() else None,
        library_paths=(root / "lib",),
        origin=origin,
        version=version,
    )


def _from_pytriton() -> TritonInstall | None:
    spec = importlib.util.find_spec("pytriton")  # finds, does not import: importing takes 0.6 s
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent / "tritonserver"
    server = root / "bin" / "tritonserver"
    if not server.is_file():
        return None
    stub = root / "python_backend_stubs" / PYTHON_VERSION / STUB_NAME
    from importlib.metadata import version

    release = version("nvidia-pytriton")
    return TritonInstall(
        server=server,
        backends=root / "backends",
        stub=stub if stub.is_file() else None,
        library_paths=(Path(spec.origin).parent.parent / "nvidia_pytriton.libs",),
        origin=f"from nvidia-pytriton {release}",
        version=PYTRITON_RELEASES.get(release, ""),
    )


def stub_version(stub: Path) -> str | None:
    """The Python version a stub is linked against, e.g. "3.12"; None when there is no such file or no name."""
    if not stub.is_file():
        return None
    match = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    return match.group(1).decode() if match else None


def libpython_name() -> str:
    """The shared library of this interpreter that the stub is linked against."""
    return f"libpython{PYTHON_VERSION}.so.1.0"


def find_libpython() -> Path | None:
    """This interpreter's shared library; None when Python was built without one and none is installed."""
    folders = [
        sysconfig.get_config_var("LIBDIR"),
        os.path.join(sys.base_prefix, "lib"),
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    for folder in filter(None, folders):
        path = Path(folder) / libpython_name()
        if path.is_file():
            return path
    return None


def libpython_advice() -> str:
    """How to get libpython."""
    return (
        f"Debian and Ubuntu: apt install libpython{PYTHON_VERSION}; pyenv: "
        "PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install; conda and uv bring it along"
    )
