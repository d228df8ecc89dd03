"""Builds the native library for this processor, once, and loads it.

One library per instruction set, all from the same sources. A wheel brings them ready-made; elsewhere the one that is
needed is compiled at first use (some seconds) into a cache that is keyed by sources, flags and compiler.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
SHIPPED = Path(__file__).parent / "lib"

_X86_64_V3 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_X86_64_V3, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")

ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _X86_64_V3,
    "baseline": (),
}
"""Compiler flags of each instruction set, best first. On aarch64 only "baseline" applies, which has NEON."""

_CPU_FLAGS: dict[str, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"}),
    "avx512bf16": frozenset({"avx512_bf16", "avx512_vnni", "avx512bw", "avx512vl", "avx512dq"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi2"}),
    "baseline": frozenset(),
}

_COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
)
_SANITIZERS = (
    "-fsanitize=address,undefined",
    # The address sanitizer ends at each of them, too, and they take a fifth of the time to compile.
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
    "-g1",  # functions and lines; variables would double what is written
    "-O1",  # halves the time to compile; it comes after -O3, so it counts
)
_COMPILE_TIMEOUT_S = 300
_LOCK_POLL_S = 0.2


class NativeUnavailable(Exception):
    """There is no library for this machine and none can be built; the message says why."""


def supported_isas() -> list[str]:
    """Instruction sets that this processor can run, best first."""
    if not on_x86():
        return ["baseline"]
    flags = _cpu_flags()
    return [isa for isa, needed in _CPU_FLAGS.items() if needed <= flags]


def on_x86() -> bool:
    """Whether the processor is a 64-bit x86."""
    return platform.machine() in ("x86_64", "AMD64")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


@functools.cache
def load_library(isa: str, sanitize: bool = False) -> ctypes.CDLL:
    """The library for an instruction set, compiled if need be.

    sanitize: with the address and undefined-behaviour sanitizers (their runtime must be preloaded).
    Raises NativeUnavailable.
    """
    file = find_library(isa, sanitize)
    if file is None:
        file = cache_folder() / library_name(isa, sanitize)
        build(isa, file, sanitize)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:  # a folder that is mounted noexec: "failed to map segment from shared object"
        advice = "if its folder is mounted noexec, set XDG_CACHE_HOME to one that is not"
        raise NativeUnavailable(f"{error} ({advice})") from error
    library.fs_isa.restype = ctypes.c_char_p
    refused = library.fs_request_instructions()
    if refused:
        raise NativeUnavailable(f"the operating system refuses {isa}: {os.strerror(refused)}")
    library.fs_op_size.restype = ctypes.c_int64
    library.fs_pool_new.restype = ctypes.c_void_p
    library.fs_pool_new.argtypes = (ctypes.c_int32, ctypes.c_void_p)
    library.fs_pool_free.restype = None
    library.fs_pool_free.argtypes = (ctypes.c_void_p,)
    library.fs_run.restype = None
    library.fs_run.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    return library


def find_library(isa: str, sanitize: bool = False) -> Path | None:
    """The library that a wheel brought, or one that was compiled here before."""
    name = library_name(isa, sanitize)
    return next((folder / name for folder in (SHIPPED, cache_folder()) if (folder / name).is_file()), None)


def library_name(isa: str, sanitize: bool = False) -> str:
    """File name that changes with the sources and the flags, so that an old library is never loaded."""
    digest = hashlib.sha256(" ".join(_flags(isa, sanitize)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"flashserve_cpu-{isa}{'-sanitize' if sanitize else ''}-{platform.machine()}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where libraries are kept that were compiled at first use."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flashserve" / "native"


def find_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, g++ or clang++."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def build(isa: str, file: Path, sanitize: bool = False) -> None:
    """Compile the library into ``file``, unless another process does: then wait for it. Raises NativeUnavailable with
    the compiler's words."""
    compiler = find_compiler()
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found (install g++, or set CXX)")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Engines that start together would each take all cores for what one of them needs to do.
        with file.with_suffix(".lock").open("w") as lock:
            if not _take(lock):
                log.info("another process compiles the native kernels for %s: waiting for it", isa)
            while not _take(lock):
                time.sleep(_LOCK_POLL_S)  # and not in the system: a process that does not run at all counts as stopped
            if not file.is_file():
                log.info("compiling the native kernels for %s (once, some seconds)", isa)
                _compile(compiler, _flags(isa, sanitize), file)
    except OSError as error:
        raise NativeUnavailable(f"the native kernels could not be written to {file.parent}: {error}") from error


def _take(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: then several compile, and whoever is first wins
        log.info("%s cannot be locked: %s", lock.name, error)
    return True


def _compile(compiler: str, flags: tuple[str, ...], file: Path) -> None:
    # The largest first: it takes as long as all the others together.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        library = str(Path(folder) / "library.so")
        _run([compiler, *flags, "-shared", *objects, "-o", library])
        os.replace(library, file)


def _flags(isa: str, sanitize: bool) -> tuple[str, ...]:
    return (*_COMMON_FLAGS, *(ISA_FLAGS[isa] if on_x86() else ()), *(_SANITIZERS if sanitize else ()))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{command[0]} took longer than {_COMPILE_TIMEOUT_S} s") from error
    if done.returncode:
        raise NativeUnavailable(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
