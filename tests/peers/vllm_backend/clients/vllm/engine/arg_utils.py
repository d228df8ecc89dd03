"""What an engine is made from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AsyncEngineArgs:
    """The model is the runner's, under the name that the suite gives it; the memory share concerns a GPU."""

    model: str
    gpu_memory_utilization: float
