"""Parameters of a request that mean: greedy."""

from dataclasses import dataclass


@dataclass
class StructuredOutputsParams:
    """Only one of some given texts."""

    choice: list[str]


@dataclass
class SamplingParams:
    """Greedy; any other temperature or top_p is refused."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 16
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 or self.top_p != 1:
            raise NotImplementedError("this stand-in for vLLM is greedy only")
