"""Deficit round robin: what waits of several keys, in an order that gives each its share however much it asks for."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_QUANTUM = 1024
"""Tokens that a key of weight 1 gets in each round: about those of one request."""


@dataclass(frozen=True)
class Share:
    """Whose a request is, and how much of a full engine that key gets beside others."""

    name: str = ""
    weight: int = 1


@dataclass(eq=False)
class Entry(Generic[T]):
    """A request that waits."""

    item: T
    share: Share
    cost: int
    """Tokens that it will probably be charged."""
    priority: int = 0
    """Lower ones go first, always."""


@dataclass
class _Flow(Generic[T]):
    """What waits of one key in one priority."""

    weight: int
    entries: deque[Entry[T]] = field(default_factory=deque)
    deficit: float = 0.0
    """Tokens that it may use before others get theirs."""


class FairQueue(Generic[T]):
    """One writer: whoever makes it."""

    def __init__(self) -> None:
        self._flows: dict[int, OrderedDict[str, _Flow[T]]] = {}
        """By priority and key; the key that is to be asked first comes first."""
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total() if self._counts else 0

    def count(self, name: str) -> int:
        """How many wait of a key."""
        return self._counts[name]

    def push(self, entry: Entry[T]) -> None:
        """As the last of its key."""
        self._flow(entry).entries.append(entry)
        self._counts[entry.share.name] += 1

    def push_back(self, entry: Entry[T]) -> None:
        """Of an entry that was popped in vain: it is the next again, and nothing is charged for it."""
        flow = self._flow(entry)
        flow.entries.appendleft(entry)
        flow.deficit += entry.cost
        self._flows[entry.priority].move_to_end(entry.share.name, last=False)
        self._counts[entry.share.name] += 1

    def pop(self) -> Entry[T]:
        """The next one. Raises IndexError if there is none."""
        if not self._flows:
            raise IndexError("nobody waits")
        flows = self._flows[min(self._flows)]
        rounds = min(map(_rounds, flows.values()))
        for flow in flows.values():
            flow.deficit += rounds * _QUANTUM * flow.weight
        name = next(name for name, flow in flows.items() if not _rounds(flow))
        flow = flows[name]
        flow.deficit -= flow.entries[0].cost
        flows.move_to_end(name)
        entry = flow.entries[0]
        self.remove(entry)
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Takes one out, wherever it is. Raises ValueError if it is not in the queue."""
        flows = self._flows.get(entry.priority, OrderedDict())
        flow = flows.get(entry.share.name)
        if flow is None:
            raise ValueError("not in the queue")
        flow.entries.remove(entry)
        if not flow.entries:  # what it saved up is lost: a key that is away does not gather a right to a burst
            del flows[entry.share.name]
            if not flows:
                del self._flows[entry.priority]
        self._counts[entry.share.name] -= 1
        if not self._counts[entry.share.name]:
            del self._counts[entry.share.name]

    def last_of_greediest(self) -> Entry[T]:
        """Of the key with the most that waits, the one that would come last. Raises IndexError if nobody waits."""
        if not self._counts:
            raise IndexError("nobody waits")
        ((name, _),) = self._counts.most_common(1)
        worst = max(priority for priority, flows in self._flows.items() if name in flows)
        return self._flows[worst][name].entries[-1]

    def _flow(self, entry: Entry[T]) -> _Flow[T]:
        flows = self._flows.setdefault(entry.priority, OrderedDict())
        return flows.setdefault(entry.share.name, _Flow(entry.share.weight))


def _rounds(flow: _Flow[T]) -> int:
    """The quanta that a key lacks for its next request."""
    return max(0, math.ceil((flow.entries[0].cost - flow.deficit) / (_QUANTUM * flow.weight)))
