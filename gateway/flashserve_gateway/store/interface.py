"""What every store can do. `memory.py` is one gateway's own; `redis_store.py` is that of all that name a Redis."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from ..keys import Admission, Caller


class StoreAway(Exception):
    """A shared store does not answer now. It was asked for half a second at most, or not at all: it was away before."""


@dataclass(frozen=True)
class Asked:
    """One HTTP request that wants to be let in.

    Args:
        request_id: of no other request, of whichever gateway.
        places: requests to engines that it becomes; 0 in the background.
        tokens, in_background: as `Caller.admit` takes them.
    """

    request_id: str
    model: str
    places: int = 1
    tokens: int = 0
    in_background: bool = False


class Shelf(Protocol):
    """Values by owner and name. Each is kept for the shelf's lifetime at most, and never changed."""

    async def get(self, owner: str, names: Sequence[str]) -> list[bytes | None]:
        """Several at once. None: not there, or not the owner's. Raises StoreAway."""

    async def put(self, owner: str, name: str, value: bytes) -> bool:
        """False: it is too large for the shelf, and not kept. Raises StoreAway."""

    async def remove(self, owner: str, name: str) -> None:
        """Raises StoreAway."""


class Quotas(Protocol):
    """How much each key uses."""

    def admit(self, caller: Caller, asked: Asked) -> AbstractAsyncContextManager[Admission]:
        """Lets a request in until the block ends. Raises ApiError if its key may not, or not now; never StoreAway."""


class Store(Protocol):
    """All of it."""

    responses: Shelf
    """Of /v1/responses."""
    answers: Shelf
    """Of the answer cache."""
    quotas: Quotas

    @property
    def state(self) -> str:
        """For /health: "connected" or "away"; empty for a store that cannot be away."""

    async def start(self) -> None:
        """Within a second, whether or not it answers."""

    async def aclose(self) -> None: ...
