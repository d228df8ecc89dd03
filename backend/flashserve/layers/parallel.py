"""Ranks: processes that share a model, each with a part of its large weights (Shoeybi et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flashserve.errors import ConfigError


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the model. All call the same layers in the same order; what they
    hand to one another is what the two functions do. Alone they are never called."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _alone
    """The sum over all ranks of a tensor that each has; it may be overwritten."""
    all_gather: Callable[[Tensor], Tensor] = _alone
    """[N, columns] of each rank → [N, size * columns], in the order of the ranks."""

    def share(self, count: int, what: str) -> int:
        """What each rank has of ``count``. Raises ConfigError where that is no whole number; what: for the message."""
        if count % self.size:
            raise ConfigError(f"{count} {what} cannot be shared by {self.size} ranks")
        return count // self.size
