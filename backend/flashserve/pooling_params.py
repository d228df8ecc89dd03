"""What a request for an embedding may ask: names, types, ranges, and the only place where they are checked.

The request parser and the offline API share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

from flashserve.coercion import bool_of, integer_of, shorten
from flashserve.errors import InvalidArgument
from flashserve.protocol import Pooling, PoolingParams, SamplingParams

EMBEDDING_PARAMS = SamplingParams(max_tokens=0)
"""Of a request that makes no tokens."""

_POOLINGS = get_args(Pooling)


def parse_pooling_params(values: Mapping[str, Any], hidden_size: int) -> PoolingParams:
    """``hidden_size``: the dimensions that the model has. null leaves a parameter at its default. Raises
    InvalidArgument, naming the parameter and what it takes."""
    for name in values:
        if name not in PoolingParams.__struct_fields__:
            known = ", ".join(PoolingParams.__struct_fields__)
            raise InvalidArgument(f"unknown key {shorten(name)} in pooling_params, which takes {known}")
    checks: dict[str, Callable[[Any], Any]] = {
        "pooling": _pooling,
        "dimensions": lambda value: _dimensions(value, hidden_size),
        "normalize": _normalize,
    }
    return PoolingParams(**{name: checks[name](value) for name, value in values.items() if value is not None})


def _pooling(value: Any) -> Pooling:
    name = value.lower() if isinstance(value, str) else value  # vLLM writes LAST
    if name not in _POOLINGS:
        raise InvalidArgument(f"pooling_params.pooling must be {', '.join(_POOLINGS)}, not {shorten(value)}")
    return cast(Pooling, name)


def _dimensions(value: Any, hidden_size: int) -> int:
    single = value[0] if isinstance(value, list) and len(value) == 1 else value  # Triton's vLLM backend takes [n]
    number = integer_of(single)
    if number is None or not 1 <= number <= hidden_size:
        raise InvalidArgument(
            f"pooling_params.dimensions must be an integer in [1, {hidden_size}], the model's hidden size, "
            f"not {shorten(value)}"
        )
    return number


def _normalize(value: Any) -> bool:
    flag = bool_of(value)
    if flag is None:
        raise InvalidArgument(f"pooling_params.normalize must be true or false, not {shorten(value)}")
    return flag
