"""The sequences that run, and what they hold: slots of the runner, and blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.output import ScheduledRow
from flashserve.scheduling.sequence import Sequence

NO_IDS: list[int] = []  # shared by all decode rows; rows are frozen, nobody appends


class RunningSequences:
    """Who runs is in ``prefilling`` or ``decoding``, by slot, in the order of coming there. A sequence that is to fork
    off another has a slot and nothing else until then."""

    def __init__(self, num_slots: int, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.prefilling: dict[int, Sequence] = {}
        self.decoding: dict[int, Sequence] = {}
        self._num_slots = num_slots
        self._free_slots = list(reversed(range(num_slots)))
        self._freed_slots: list[int] = []
        self._block_copies: list[tuple[int, int]] = []

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.prefilling.values(), self.decoding.values())

    # --- coming and going ---------------------------------------------------------------------------------

    def reserve(self, sequence: Sequence) -> None:
        """Give it a slot."""
        sequence.slot = self._free_slots.pop()

    def start(self, sequence: Sequence, cached: list[int], missing: int) -> None:
        """Give it a slot, the blocks that are held for it, and ``missing`` more: all that its known tokens need, so
        that a prefill never waits for memory half-way."""
        self.reserve(sequence)
        assert sequence.slot is not None
        sequence.block_ids = cached + self.blocks.allocate(missing)
        sequence.unsent_block_ids = list(sequence.block_ids)
        sequence.num_computed_tokens = len(cached) * self.blocks.block_size
        sequence.writable_end = len(sequence.block_ids) * self.blocks.block_size
        sequence.passed_over = 1  # in this step, unless it gets a row
        self.prefilling[sequence.slot] = sequence

    def release(self, sequence: Sequence) -> None:
        """Take back its slot and its blocks; nothing of it is computed any more."""
        slot = sequence.slot
        assert slot is not None
        self.prefilling.pop(slot, None)
        self.decoding.pop(slot, None)
        self.blocks.release(sequence.block_ids)
        sequence.block_ids, sequence.unsent_block_ids = [], NO_IDS
        sequence.num_computed_tokens = sequence.writable_end = sequence.passed_over = 0
        sequence.slot = None
        self._free_slots.append(slot)
        self._freed_slots.append(slot)

    def take_changes(self) -> tuple[list[int], list[tuple[int, int]]]:
        """(Slots given back, blocks to copy) since the last call."""
        freed, self._freed_slots = self._freed_slots, []
        copies, self._block_copies = self._block_copies, []
        return freed, copies

    # --- sharing ------------------------------------------------------------------------------------------

    def find_cached(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its known tokens, short of the last token: its logits are needed. Whoever wants to know how
        probable its prompt is needs the logits of all (vLLM's rule)."""
        reads_cache = sequence.terms.reads_cache and not sequence.wants_scores
        if not self.blocks.enable_prefix_caching or not reads_cache:
            return []
        block_size = self.blocks.block_size
        return self.blocks.find_prefix(sequence.hash_blocks((len(sequence.token_ids) - 1) // block_size, block_size))

    def share_late(self, sequence: Sequence) -> int:
        """Before its first row: share what others computed since its admission. Returns the tokens gained.

        Requests that arrive together are admitted together; without this, a burst with one system prompt would
        compute it once for each prompt that is in work.
        """
        block_size = self.blocks.block_size
        first = sequence.num_computed_tokens // block_size
        found = self.find_cached(sequence)[first:]
        last = first + len(found)
        self.blocks.acquire(found)
        self.blocks.release(sequence.block_ids[first:last])
        sequence.block_ids[first:last] = found
        sequence.unsent_block_ids = list(sequence.block_ids)
        sequence.num_computed_tokens = last * block_size
        return len(found) * block_size

    def register(self, sequence: Sequence, start: int, end: int) -> None:
        """Make the blocks findable that computing tokens ``start .. end - 1`` fills.

        Done when the step is planned: a row of the same step may already read them, since the runner writes the
        KV of all rows before any row attends.
        """
        block_size = self.blocks.block_size
        first, last = start // block_size, end // block_size
        if not self.blocks.enable_prefix_caching or first == last:
            return
        hashes = sequence.hash_blocks(last, block_size)
        for index in range(first, last):
            self.blocks.register(sequence.block_ids[index], hashes[index])

    def fork(self, parent: Sequence, child: Sequence) -> ScheduledRow:
        """The child goes on where the parent's row ends that was planned last: with its tokens and its blocks.

        They share the block that is not full. Of those who share it, everyone but the last to write makes a copy
        (:meth:`grow`); the runner knows the parent's table, so children must come before their parent in ``decoding``.
        """
        assert child.slot is not None
        end = parent.num_computed_tokens
        full = end // self.blocks.block_size
        child.token_ids = list(parent.token_ids)
        child.block_hashes = list(parent.block_hashes)
        child.block_ids = self.blocks.fork(parent.block_ids)
        child.unsent_block_ids = child.block_ids[full:]
        child.num_computed_tokens = child.writable_end = parent.writable_end = end
        child.num_pending = 1
        self.decoding[child.slot] = child
        terms = child.terms
        return ScheduledRow(
            terms.request_id, child.slot, end, 0, NO_IDS, child.block_ids[:full], 1, child.index, parent.slot
        )

    # --- growing ------------------------------------------------------------------------------------------

    def num_missing(self, sequences: list[Sequence]) -> int:
        """Blocks that these need to write on, all of which are at their ``writable_end``."""
        block_size = self.blocks.block_size
        shared = Counter(s.block_ids[-1] for s in sequences if s.num_computed_tokens % block_size)
        in_place = sum(self.blocks.num_holders(block) == count for block, count in shared.items())
        return len(sequences) - in_place

    def grow(self, sequence: Sequence) -> list[int]:
        """Let a sequence at its ``writable_end`` write on. Returns what is to be appended to its table."""
        blocks, held = self.blocks, sequence.block_ids
        if sequence.num_computed_tokens % blocks.block_size == 0:
            new = blocks.allocate(1)
            held += new
        else:
            new, sequence.unsent_block_ids = sequence.unsent_block_ids, NO_IDS
            if blocks.num_holders(held[-1]) > 1:
                if not new:
                    raise RuntimeError(f"block {held[-1]} is still shared, and the runner knows it by its first holder")
                shared, new = new, blocks.allocate(1)
                self._block_copies.append((shared[0], new[0]))
                blocks.release(shared)
                held[-1] = new[0]
        sequence.writable_end = len(held) * blocks.block_size
        return new

    def bring_known(self, sequence: Sequence, max_tokens: int, max_blocks: int) -> tuple[list[int], list[int]]:
        """The known tokens that its next row computes, and what is to be appended to its table, if it may have so many
        blocks more for them. It can write at least one token."""
        start, known, new = sequence.num_computed_tokens, sequence.token_ids, NO_IDS
        if len(known) > sequence.writable_end and max_blocks > 0:
            block_size, held = self.blocks.block_size, sequence.block_ids
            new = self.blocks.allocate(min(max_blocks, -(-len(known) // block_size) - len(held)))
            held += new
            sequence.writable_end = len(held) * block_size
        end = min(len(known), sequence.writable_end, start + max_tokens)
        self.register(sequence, start, end)
        return known[start:end], new

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Raise RuntimeError if a slot or a block of the ``live`` sequences is lost or in two places."""
        holders = [sequence for sequence in live if sequence.slot is not None]
        slots = [sequence.slot for sequence in holders if sequence.slot is not None]
        if sorted([*slots, *self._free_slots]) != list(range(self._num_slots)):
            raise RuntimeError(f"slots {slots} are taken and {self._free_slots} are free")
        begun = sorted(s.slot for s in holders if s.token_ids and s.slot is not None)
        if begun != sorted([*self.prefilling, *self.decoding]):
            raise RuntimeError(f"slots {begun} hold tokens, {[*self.prefilling, *self.decoding]} run")
        self.blocks.check_integrity(sequence.block_ids for sequence in holders)
