"""Every setting of an engine: ``model.json`` as a frozen EngineConfig, then resolved against model and device.

Names are vLLM's engine arguments where the meaning is the same, so a vLLM backend's ``model.json`` just works
(:mod:`flashserve.model_json` has its spellings); what flashserve cannot honour is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from flashserve import model_json
from flashserve.errors import ConfigError
from flashserve.paths import absolute, native, portable
from flashserve.protocol import ModelCard

QUANTIZATIONS = ("dense", "int8", "int4")
"""What linear weights can become while they load (``layers.weight_format``)."""


@dataclass(frozen=True)
class EngineConfig:
    """Every setting of one model's engine. None means: chosen by :func:`resolve`."""

    model: str
    """A folder or a .gguf file (relative ones are resolved against the model's version folder), a Hugging Face id,
    ``id:Q4_K_M`` for one of the GGUF files there, or ``package:NAME`` for what an installed Python package brings
    (``package:NAME/FILE.gguf`` where it brings several)."""
    tokenizer: str | None = None
    """Another folder or id with the tokenizer; default: the model's own."""
    revision: str | None = None
    """Git revision of a Hugging Face id."""
    download_dir: str | None = None
    """Where Hugging Face ids are downloaded to and looked for (a relative folder as for ``model``); default: the cache
    that HF_HOME and HF_HUB_CACHE name."""
    dtype: str = "auto"
    """auto (the checkpoint's; float16 becomes bfloat16 on a CPU), float32, bfloat16, float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N; null or null:MS computes nothing (for measuring what surrounds a model)."""
    max_model_len: int | None = None
    """Prompt plus output tokens of one request; default: the model's context, or what the KV cache holds."""
    max_num_seqs: int | None = None
    """Requests that run at once; default 256 on a GPU, 128 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step; default 8192 on a GPU, 512 on a CPU (about 0.1 s of a 135M model there)."""
    block_size: int = 16
    """Tokens per KV block."""
    num_gpu_blocks_override: int | None = None
    """KV blocks, on any device; default: what the memory allows."""
    kv_cache_memory_bytes: int | None = None
    """KV cache size in bytes; default: a share of the device's memory."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that this engine may use, weights included. On a CPU it does not apply."""
    enable_prefix_caching: bool = True
    max_waiting_requests: int = 1024
    """Beyond it a new request gets UNAVAILABLE with a retry-after."""
    max_waiting_tokens: int = 4_194_304
    """Prompt tokens that may wait in all."""
    watermark: float = 0.01
    """Share of the KV blocks that admission leaves free, so that it does not cause a preemption at once."""
    seed: int = 0
    """Of the seeds that requests without their own get."""
    generation_config: str = "auto"
    """auto: sampling defaults from the model's generation_config.json; vllm: vLLM's neutral defaults."""
    stream_interval: int | None = None
    """Tokens of a request that one response may hold while the server is busy; 1: each token alone. Default: 2 where
    the engine computes on the cores that send, else 1."""
    drain_timeout_s: float = 5.0
    """What running requests get to finish after an unload or a shutdown."""
    num_threads: int | None = None
    """CPU threads of the engine; default: all cores this process may use."""
    enforce_eager: bool = False
    """No CUDA graphs and no recorded steps: slower, for finding faults."""
    quantization: str | None = None
    """Of linear weights. Default: as the model's files hold them; on a CPU without the native kernels in full. dense:
    in full. int8 (on a CPU with the native kernels), int4 (there, or on a GPU): weights in 8 or 4 bits; activations in
    8, but for int4 on a GPU."""
    kv_cache_dtype: str = "auto"
    """auto (the model's), int8 (on a CPU with the native kernels), fp8 (E4M3, on a GPU): half the memory."""
    calculate_kv_scales: bool = False
    """fp8 has a scale per layer for keys and for values: calibrate them at the start even where the checkpoint has its
    own. Without: only where it has none (vLLM: then 1)."""
    disable_log_stats: bool = False
    """No metrics of this model in Triton's /metrics (vLLM's name)."""
    enable_log_requests: bool = False
    """A line of log for each request that ends: its id, why it ended, its tokens and times; no text."""
    batch_invariant: bool = False
    """On a GPU: a request's tokens and log-probabilities are the same to the bit whatever else runs, however its prompt
    is cut and whatever of it was cached. Slower, and with weights in full. A mean of hidden states follows the cuts."""
    pin_threads: bool = False
    """Bind each of a CPU engine's threads to a core of its own; for machines that serve nothing else."""
    override_generation_config: dict[str, Any] | None = None
    """Values that come before those of the model's generation_config.json, under its names."""
    triton_http: str | None = None
    """host:port of this tritonserver's HTTP endpoint, polled to notice an unload; default: the launcher's
    FLASHSERVE_TRITON_HTTP, else what tritonserver's command line says."""
    no_effect: tuple[str, ...] = ()
    """Keys of model.json that were accepted and change nothing here."""

    @classmethod
    def from_file(cls, path: Path) -> EngineConfig:
        """Read ``model.json``. Raises ConfigError that names the file or the key."""
        return cls.from_mapping(model_json.read(path), path.parent)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], base: Path | None = None) -> EngineConfig:
        """Check keys and types; resolve a relative model folder against ``base``. Raises ConfigError."""
        types = get_type_hints(cls)
        del types["no_effect"]
        accepted, no_effect = model_json.settings(values, types)
        if "model" not in accepted:
            raise ConfigError('model.json needs "model": a folder, a .gguf file or a Hugging Face id')
        config = cls(**accepted, no_effect=no_effect)
        config._check_ranges()
        if base is not None and (path := base / native(config.model)).exists():
            config = replace(config, model=portable(absolute(path)))
        if config.download_dir:
            download_dir = (base or Path.cwd()) / os.path.expanduser(native(config.download_dir))
            config = replace(config, download_dir=portable(download_dir.resolve()))
        return config

    def _check_ranges(self) -> None:
        positive = (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_threads",
            "stream_interval",
            "num_gpu_blocks_override",
            "kv_cache_memory_bytes",
            "max_waiting_requests",
            "max_waiting_tokens",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.quantization is not None:
            _one_of("quantization", self.quantization, QUANTIZATIONS)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", "int8", "fp8"))
        if self.calculate_kv_scales and self.kv_cache_dtype != "fp8":
            raise ConfigError(f"calculate_kv_scales needs kv_cache_dtype fp8, not {self.kv_cache_dtype}")
        _one_of("generation_config", self.generation_config, ("auto", "vllm"))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be in [0, 1), not {self.watermark}")
        if not 0 <= self.drain_timeout_s <= 3600:
            raise ConfigError(f"drain_timeout_s must be in [0, 3600], not {self.drain_timeout_s}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


# --- resolution: facts in, one frozen value out -------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What the model's own files say (``models.registry`` reads them)."""

    architecture: str
    context_len: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """In which it runs here (:func:`resolve_dtype`)."""
    weight_bytes: int
    """Size of the weights in that dtype."""
    eos_token_ids: tuple[int, ...]
    card: ModelCard
    hidden_size: int = 0


@dataclass(frozen=True)
class DeviceFacts:
    """What the machine says (``runner.device`` asks it)."""

    kind: str
    """cpu or cuda."""
    name: str
    total_bytes: int
    free_bytes: int
    """What this engine may still take; on a GPU after its weights and a step's activations have their room."""
    used_bytes: int = 0
    """On a GPU: what this engine takes for weights and a step's activations."""
    supports_bfloat16: bool = True
    computes_on_cpu: bool = False
    """Steps take the cores that also send responses."""


@dataclass(frozen=True)
class ResolvedConfig:
    """What the engine really uses; printed once at start."""

    config: EngineConfig
    model: ModelFacts
    device: DeviceFacts
    block_bytes: int
    """Of one KV block over all layers."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    kv_scales: tuple[tuple[float, float], ...] = ()
    """Of an FP8 cache: each layer's, of keys and of values."""
    notes: tuple[str, ...] = field(default=())
    """What resolution changed against the defaults, in words, for the log."""

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def stream_interval(self) -> int:
        return self.config.stream_interval or (2 if self.device.computes_on_cpu else 1)

    def summary(self) -> str:
        """One line for the log."""
        line = (
            f"{self.model.architecture} on {self.device.name} ({self.dtype}), context {self.max_model_len}, "
            f"{self.max_num_seqs} requests at once, {self.max_num_batched_tokens} tokens per step, "
            f"{self.num_blocks} KV blocks of {self.block_size} tokens ({self.kv_cache_bytes / 2**20:.0f} MiB)"
        )
        return "; ".join((line, *self.notes))


DEFAULT_SEQS = {"cpu": 128, "cuda": 256}
DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
CPU_KV_SHARE = 0.15  # of the free memory: a server's machine has other users, and pages cost nothing until touched


def resolve_dtype(config: EngineConfig, checkpoint_dtype: str, device: DeviceFacts) -> str:
    """float16 checkpoints run in bfloat16 on a CPU, where float16 matrix products are slow or missing; bfloat16 ones
    in float16 on a GPU without bfloat16 (before Ampere). Raises ConfigError for bfloat16 asked of such a GPU."""
    if config.dtype == "bfloat16" and not device.supports_bfloat16:
        raise ConfigError("this GPU has no bfloat16; use dtype float16 or auto")
    if config.dtype != "auto":
        return config.dtype
    if checkpoint_dtype == "bfloat16" and not device.supports_bfloat16:
        return "float16"
    if device.kind == "cpu" and checkpoint_dtype == "float16":
        return "bfloat16"
    return checkpoint_dtype


def resolve(config: EngineConfig, model: ModelFacts, device: DeviceFacts, block_bytes: int) -> ResolvedConfig:
    """Fill in every open setting, in this order: context, batch, blocks; each may depend on the former.

    block_bytes: what the ops say that a KV block takes. Raises ConfigError when the settings contradict each other or
    the memory.
    """
    notes: list[str] = []
    if config.max_model_len is not None and config.max_model_len > model.context_len:
        raise ConfigError(f"max_model_len={config.max_model_len} exceeds the model's context of {model.context_len}")
    max_model_len = config.max_model_len or model.context_len
    max_num_seqs = config.max_num_seqs or DEFAULT_SEQS[device.kind]
    budget = config.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS[device.kind], max_num_seqs)
    if budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={budget} must be at least max_num_seqs={max_num_seqs}: "
            "each running request needs one token per step"
        )
    num_blocks = _num_blocks(config, device, block_bytes, max_num_seqs * max_model_len)
    capacity = num_blocks * config.block_size
    if capacity < max_model_len:
        if config.max_model_len is not None or capacity < config.block_size * 2:
            raise ConfigError(
                f"max_model_len={max_model_len} needs {-(-max_model_len // config.block_size)} KV blocks, "
                f"there are {num_blocks}: lower max_model_len or raise kv_cache_memory_bytes"
            )
        notes.append(f"context cut from {max_model_len} to {capacity} tokens, which is what the KV cache holds")
        max_model_len = capacity
    if config.no_effect:
        notes.append(f"no effect here: {', '.join(config.no_effect)}")
    return ResolvedConfig(
        config, model, device, block_bytes, max_model_len, max_num_seqs, budget, num_blocks, notes=tuple(notes)
    )


def _num_blocks(config: EngineConfig, device: DeviceFacts, block_bytes: int, useful_tokens: int) -> int:
    """KV blocks: as configured, else what fits, and never more than all requests at full length can use."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    budget = config.kv_cache_memory_bytes
    if budget is None:
        if device.kind == "cpu":
            budget = int(device.free_bytes * CPU_KV_SHARE)
        else:
            allowed = int(device.total_bytes * config.gpu_memory_utilization)
            budget = min(allowed - device.used_bytes, device.free_bytes)
    if budget < block_bytes * 2:
        raise ConfigError(
            f"no memory for the KV cache: {max(0, budget) / 2**20:.0f} MiB are left, one block takes "
            f"{block_bytes / 2**20:.1f} MiB; raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    return min(budget // block_bytes, -(-useful_tokens // config.block_size))
