"""Paged KV memory: reference-counted blocks, an LRU free list, and prefix caching by chained hash.

The manager deals in block ids; what is in a block is the runner's business. A full block is known by the hash of
everything up to its end, so that two prompts share the blocks of their common prefix. A block that nobody holds
stays findable until the free list hands it out again: the cache is the free list, and eviction is its order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes


def root_hash(*parts: str) -> BlockHash:
    """The parent of every first block: what KV depends on besides tokens (model, dtype, layout, adapter, salt).

    Stable across processes and machines (never Python's ``hash``), so that KV can be shared between them. A salt is
    a client's text: a lone surrogate in it must not raise in the engine.
    """
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of a full block, given its predecessor's: about 1 µs for 16 tokens."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    """Owns every KV block of one engine.

    Invariant: a block is in the free list if and only if its reference count is 0.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._cached: dict[BlockHash, int] = {}
        # Least recently used first. An OrderedDict removes from its middle in O(1), which a hit on a free block needs.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no request holds; cached ones count, since they can be evicted."""
        return len(self._free)

    def find_prefix(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest cached prefix. They are not held: acquire them before allocating."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are in the free list: acquiring them takes that many from it."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold blocks found by :meth:`find_prefix`."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def fork(self, blocks: Sequence[int]) -> list[int]:
        """Hold another's blocks, too. Who writes to one that has several holders makes a copy of it first."""
        self.acquire(blocks)
        return list(blocks)

    def num_holders(self, block: int) -> int:
        """How many hold the block."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks off the free list, evicting what they cached. Ask ``num_free`` first."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked for, {len(self._free)} are free: the scheduler did not check")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Make a full block findable. If another block already has this content, that one stays the known one."""
        if self.enable_prefix_caching and block_hash not in self._cached:
            self._cached[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in its order.

        The tail goes first into the LRU order: a prefix is useful to more requests than what follows it. Blocks
        without known content go to the front: handing them out loses nothing.
        """
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            if count < 0:
                raise RuntimeError(f"block {block} was released more often than held")
            self._ref_counts[block] = count
            if count == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Empty the prefix cache (after a failed step, whose blocks may hold anything)."""
        for block in list(self._cached.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hash_of[block] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless the books balance against ``held``, the block lists of all live sequences."""
        counts = [0] * self.num_blocks
        for blocks in held:
            if len(set(blocks)) != len(blocks):
                raise RuntimeError(f"a sequence holds a block twice: {blocks}")
            for block in blocks:
                counts[block] += 1
        if counts != self._ref_counts:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._ref_counts[b]]
            raise RuntimeError(f"reference counts of blocks {wrong} differ from what sequences hold")
        if set(self._free) != {b for b in range(self.num_blocks) if counts[b] == 0}:
            raise RuntimeError("the free list is not the set of unreferenced blocks")
        if {h: b for b, h in enumerate(self._hash_of) if h is not None} != self._cached:
            raise RuntimeError("the prefix cache and the blocks' hashes disagree")
