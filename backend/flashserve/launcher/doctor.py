"""``flashserve doctor``: what serving needs, what is there, and how to get the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from flashserve.errors import ConfigError
from flashserve.home import with_home
from flashserve.launcher import discover, loadable, ports, repository
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.gateway import gateway_lacks
from flashserve.launcher.loadable import VllmServer
from flashserve.launcher.repository import RepositoryModel
from flashserve.memory import free_memory

INSTALL = f"{sys.executable} -m pip install 'flashserve[server]' (in a source checkout: pip install -e '.[server]')"
PACKAGES = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "msgspec", "llguidance", "psutil")
# One stub's region starts at 1 MB and grows with what is in flight; a container without --shm-size has 64 MB.
SHARED_MEMORY_MIN = 32 << 20
MEMORY_MIN = 2 << 30
TORCH_PROBE = """
import json, torch
from flashserve_kernels.cpu import library
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
isa = library.supported_isas()[0]
print(json.dumps([torch.__version__, names, isa, bool(library.find_library(isa)), library.find_compiler()]))
"""


@dataclass(frozen=True)
class Check:
    """One row. ``status`` is ok, warn (serving works, perhaps not as wanted) or fail."""

    name: str
    status: str
    value: str
    fix: str = ""


def examine(model_repository: str | None = None) -> list[Check]:
    """Run every check; takes about three seconds, most of it importing torch in another process."""
    groups: list[Callable[[], Iterable[Check]]] = [
        _python,
        _triton,
        _numpy,
        _packages,
        _torch,
        _gateway,
        _ports,
        _machine,
        lambda: _models(model_repository),
    ]
    return [check for group in groups for check in group()]


def _python() -> Iterable[Check]:
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    value = f"{sys.version.split()[0]} ({sys.executable})"
    yield Check("Python", "ok" if fits else "fail", value, "" if fits else "use Python 3.10, 3.11 or 3.12")
    library = discover.find_libpython()
    if library:
        yield Check("libpython", "ok", str(library))
    else:
        yield Check("libpython", "fail", f"no {discover.libpython_name()}", discover.libpython_advice())


def _triton() -> Iterable[Check]:
    install = discover.find_triton()
    if install is None:
        yield Check("tritonserver", "fail", "not found", f"{INSTALL}, or use NVIDIA's tritonserver container")
        return
    yield Check("tritonserver", "ok", f"{install.version or 'version unknown'}, {install.origin} ({install.server})")
    if install.stub:
        yield Check("Python backend", "ok", f"stub for Python {discover.PYTHON_VERSION}")
    else:
        value = f"no stub for Python {discover.PYTHON_VERSION}"
        yield Check("Python backend", "fail", value, discover.stub_advice(install))


def _numpy() -> Iterable[Check]:
    version = _version("numpy")
    if version is None:
        yield Check("numpy", "fail", "not installed", INSTALL)
        return
    install = discover.find_triton()
    # The stub of 2.51 fails at the first request ("unpack_from requires a buffer"); NVIDIA's containers are newer.
    if install is not None and "pytriton" in install.origin and int(version.split(".")[0]) >= 2:
        fix = f"{sys.executable} -m pip install 'numpy>=1.26,<2'"
        yield Check("numpy", "fail", f"{version}, but this tritonserver needs numpy 1", fix)
    else:
        yield Check("numpy", "ok", version)


def _packages() -> Iterable[Check]:
    for name in PACKAGES:
        version = _version(name)
        yield Check(name, "ok", version) if version else Check(name, "fail", "not installed", INSTALL)


def _torch() -> Iterable[Check]:
    # In a process of its own: a broken installation may end it, and the launcher never imports torch.
    try:
        env = with_home(os.environ)
        probe = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE], env=env, capture_output=True, text=True, timeout=120
        )
    except ConfigError as error:
        yield Check("home folder", "fail", str(error), "set HOME to a folder of yours")
        return
    except subprocess.TimeoutExpired:
        yield Check("torch", "fail", "importing it takes more than two minutes", "reinstall torch")
        return
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("torch", "fail", reason, INSTALL if "No module" in reason else "reinstall torch")
        return
    version, gpus, isa, is_built, compiler = json.loads(probe.stdout.splitlines()[-1])
    yield Check("torch", "ok", version)
    if gpus:
        yield Check("GPU", "ok", ", ".join(gpus))
    elif shutil.which("nvidia-smi"):
        yield Check("GPU", "warn", "there is one, but this torch cannot use it", "install a CUDA build of torch")
    else:
        yield Check("GPU", "ok", "none; the CPU will do the work")
    if is_built or compiler:
        yield Check(
            "CPU kernels", "ok", f"{isa}, {'ready' if is_built else f'to be compiled by {compiler} at first use'}"
        )
    elif not gpus:
        fix = "Debian and Ubuntu: apt install g++; or set CXX"
        yield Check("CPU kernels", "warn", "no C++ compiler: torch's ops serve, at a third of the speed", fix)
    triton_lang = _version("triton")
    if triton_lang or not gpus:
        yield Check("Triton-lang", "ok", triton_lang or "not installed; only GPUs need it")
    else:
        yield Check("Triton-lang", "fail", "not installed", f"{sys.executable} -m pip install 'flashserve[kernels]'")


def _gateway() -> Iterable[Check]:
    if lacking := gateway_lacks():
        fix = f"{sys.executable} -m pip install 'flashserve[gateway]'"
        yield Check("OpenAI's API", "warn", f"not served: no {', '.join(lacking)}", fix)
    else:
        yield Check("OpenAI's API", "ok", "served on port 9000")


def _ports() -> Iterable[Check]:
    served = (("--http-port", 8000), ("--grpc-port", 8001), ("--metrics-port", 8002), (ports.GATEWAY_OPTION, 9000))
    for option, port in served:
        error = ports.refusal("127.0.0.1", port)
        if error is None:
            yield Check(f"port {port}", "ok", "free")
        else:
            value = "taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
            yield Check(f"port {port}", "warn", value, f"flashserve serve {option} 0 takes a free one")


def _machine() -> Iterable[Check]:
    size = _free_shared_memory()
    if size >= SHARED_MEMORY_MIN:
        yield Check("/dev/shm", "ok", f"{_size(size)} free")
    else:
        yield Check("/dev/shm", "fail", f"{_size(size)} free", "in a container: docker run --shm-size=1g …")
    _, memory = free_memory()
    low = memory < MEMORY_MIN
    fix = "a model needs its weights' size and some more" if low else ""
    yield Check("memory", "warn" if low else "ok", f"{_size(memory)} available", fix)


def _models(model_repository: str | None) -> Iterable[Check]:
    try:
        folders = repository.choose_repositories(model_repository, [])
    except LauncherError as error:
        yield Check("models", "fail" if model_repository else "warn", str(error), error.advice)
        return
    for folder in folders:
        if repository.REMOTE.match(folder):
            yield Check("models", "ok", f"{folder} (not looked into)")
            continue
        vllm = loadable.vllm_server(discover.find_triton(), asked=False)
        loaded = None if model_repository else repository.default_load(Path(folder))[0]
        for model in repository.read_repository(Path(folder)):
            yield _model(model, vllm, is_needed=loaded is None or model.name in loaded)


def _model(model: RepositoryModel, vllm: VllmServer, is_needed: bool) -> Check:
    name = f"model {model.name}"
    problem = loadable.file_problem(model, vllm)
    if problem and not is_needed:
        return Check(name, "warn", problem, f"until then the model {repository.DEMO_MODEL} is served")
    if problem:
        fix = f"correct {model.folder}/, or serve another: flashserve serve --model PATH_OR_HF_ID"
        return Check(name, "fail", problem, fix)
    if model.backend != repository.VLLM_NAME:
        return Check(name, "ok", str(model.folder))
    if vllm is VllmServer.NOBODY:
        return Check(name, "warn", loadable.says_vllm(model), loadable.VLLM_ADVICE)
    return Check(name, "ok", f"{model.folder} (served by {vllm.value})")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free_shared_memory() -> int:
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return stats.f_bavail * stats.f_frsize


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MB"


def as_json(checks: Iterable[Check]) -> str:
    """A JSON list of objects with name, status, value, fix."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def as_table(checks: list[Check], color: bool = False) -> str:
    """Rows for a person; a row that is not ok is followed by what to do."""
    marks = {"ok": ("✓", "32"), "warn": ("!", "33"), "fail": ("✗", "31")}
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark, code = marks[check.status]
        mark = f"\x1b[{code}m{mark}\x1b[0m" if color else mark
        lines.append(f"{mark} {check.name:<{width}}  {check.value}")
        if check.fix:
            lines.append(f"  {'':<{width}}  → {check.fix}")
    failed = sum(check.status == "fail" for check in checks)
    lines.append("")
    lines.append(f"{failed} of {len(checks)} checks failed: serving cannot work." if failed else "Ready to serve.")
    return "\n".join(lines)
