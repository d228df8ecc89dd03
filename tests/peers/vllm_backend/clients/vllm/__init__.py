"""A stand-in, not vLLM: the few names that the suite's accuracy test imports, answered by transformers.

It computes what vLLM would be the baseline for, greedy text in float32, and refuses every parameter beyond that.
"""

from vllm.sampling_params import SamplingParams

__all__ = ["SamplingParams"]
