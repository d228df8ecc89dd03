"""What becomes of a linear's weights while they load: the one place that knows what formats ops take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flashserve.errors import ConfigError
from flashserve_kernels import LinearWeight, Ops
from flashserve_kernels.grouped import INT4, INT8, GroupedFormat, QuantizedRows

Packing = Callable[[Ops, Tensor, bool], LinearWeight]
"""(ops, full weight, gated) → what the ops multiply with."""


def _dense(ops: Ops, weight: Tensor, gated: bool) -> LinearWeight:
    return ops.pack_linear(weight, gated=gated)


def _int8(ops: Ops, weight: Tensor, gated: bool) -> LinearWeight:
    return ops.pack_linear(weight, gated=gated, int8=True)


def _into_groups(format: GroupedFormat) -> Packing:
    def pack(ops: Ops, weight: Tensor, gated: bool) -> LinearWeight:
        try:
            return ops.pack_linear(QuantizedRows(weight, format), gated=gated)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return pack


@dataclass(frozen=True)
class WeightFormat:
    """A value of the setting ``quantization``."""

    pack: Packing = _dense
    """Of full weights."""
    pack_head: Packing = _dense
    """Of the head's, which decides alone what a token is."""
    needs: str | None = None
    """Which of ``Ops.weight_formats``; None: nothing but full weights."""
    keeps_groups: bool = False
    """Whether weights that are stored in groups stay so, where the ops take that; else they become full weights."""

    def keeps(self, ops: Ops) -> bool:
        """Whether weights that are stored in groups go to the ops as they are."""
        return self.keeps_groups and "grouped" in ops.weight_formats


WEIGHT_FORMATS: dict[str | None, WeightFormat] = {
    None: WeightFormat(keeps_groups=True),
    "dense": WeightFormat(),
    "int8": WeightFormat(_int8, _int8, needs="int8"),
    "int4": WeightFormat(_into_groups(INT4), _into_groups(INT8), needs="grouped"),
}
"""By the values of ``quantization`` (``config.QUANTIZATIONS``)."""
