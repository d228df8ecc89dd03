"""Blocks: who holds them, which are evicted first, and by what content they are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from flashserve.scheduling.block_manager import BlockHash, BlockManager, chain_hash, root_hash

ROOT = root_hash("model", "")


def chain(tokens: Sequence[int], block_size: int = 4, root: BlockHash = ROOT) -> list[BlockHash]:
    """Hashes of the full blocks of a sequence."""
    hashes: list[BlockHash] = []
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        hashes.append(chain_hash(hashes[-1] if hashes else root, tokens[start : start + block_size]))
    return hashes


def filled(manager: BlockManager, tokens: Sequence[int]) -> list[int]:
    """Blocks allocated, filled with a sequence and registered; still held."""
    hashes = chain(tokens, manager.block_size)
    blocks = manager.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        manager.register(block, block_hash)
    return blocks


# --- holding and releasing ----------------------------------------------------------------------------------


def test_allocated_blocks_are_distinct_and_leave_the_free_list() -> None:
    manager = BlockManager(8, 4)
    first, second = manager.allocate(3), manager.allocate(5)
    assert sorted(first + second) == list(range(8))
    assert manager.num_free == 0
    manager.check_integrity([first, second])


def test_allocating_more_than_is_free_is_refused_and_changes_nothing() -> None:
    manager = BlockManager(4, 4)
    held = manager.allocate(3)
    with pytest.raises(RuntimeError, match="2 blocks asked for, 1 are free"):
        manager.allocate(2)
    manager.check_integrity([held])


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go() -> None:
    manager = BlockManager(4, 4)
    blocks = filled(manager, range(8))
    manager.acquire(blocks)
    manager.check_integrity([blocks, blocks])
    manager.release(blocks)
    assert manager.num_free == 2
    manager.release(blocks)
    assert manager.num_free == 4
    manager.check_integrity([])


def test_releasing_what_nobody_holds_is_an_error() -> None:
    manager = BlockManager(4, 4)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(RuntimeError, match="released more often than held"):
        manager.release(blocks)


def test_a_held_block_is_never_handed_out() -> None:
    manager = BlockManager(4, 4)
    held = filled(manager, range(8))
    assert not set(held) & set(manager.allocate(2))
    assert manager.num_free == 0
    assert manager.find_prefix(chain(range(8))) == held  # and it stays known


def test_acquiring_a_free_block_takes_it_off_the_free_list() -> None:
    manager = BlockManager(4, 4)
    blocks = filled(manager, range(8))
    manager.release(blocks)
    assert manager.count_free(blocks) == 2
    manager.acquire(blocks)
    assert manager.count_free(blocks) == 0
    assert not set(blocks) & set(manager.allocate(2))


# --- the prefix cache ---------------------------------------------------------------------------------------


def test_the_longest_cached_prefix_is_found_up_to_the_first_difference() -> None:
    manager = BlockManager(8, 4)
    blocks = filled(manager, range(12))
    assert manager.find_prefix(chain(range(12))) == blocks
    assert manager.find_prefix(chain(range(20))) == blocks
    assert manager.find_prefix(chain([0, 1, 2, 3, 4, 99, 6, 7, 8, 9, 10, 11])) == blocks[:1]
    assert manager.find_prefix(chain([99, *range(1, 12)])) == []


def test_the_same_tokens_behind_another_prefix_are_another_block() -> None:
    manager = BlockManager(8, 4)
    filled(manager, [1, 1, 1, 1, 5, 6, 7, 8])
    assert manager.find_prefix(chain([2, 2, 2, 2, 5, 6, 7, 8])) == []
    assert manager.find_prefix(chain([5, 6, 7, 8])) == []


def test_a_gap_ends_the_prefix_although_later_blocks_are_cached() -> None:
    manager = BlockManager(3, 4)
    blocks = filled(manager, range(12))
    manager.release(blocks[1:2])
    manager.allocate(1)  # evicts the middle block
    assert manager.find_prefix(chain(range(12))) == blocks[:1]


def test_content_that_two_blocks_have_is_known_by_the_first() -> None:
    manager = BlockManager(4, 4)
    first = filled(manager, range(4))
    second = filled(manager, range(4))
    assert manager.find_prefix(chain(range(4))) == first
    manager.check_integrity([first, second])
    manager.release(second)
    assert manager.find_prefix(chain(range(4))) == first
    assert manager.allocate(1) == second  # the duplicate holds nothing worth keeping
    manager.check_integrity([first, second])


def test_without_caching_nothing_is_found() -> None:
    manager = BlockManager(4, 4, enable_prefix_caching=False)
    filled(manager, range(8))
    assert manager.find_prefix(chain(range(8))) == []


def test_forgetting_all_keeps_the_holders_and_empties_the_cache() -> None:
    manager = BlockManager(4, 4)
    held, freed = filled(manager, range(4)), filled(manager, range(100, 104))
    manager.release(freed)
    manager.forget_all()
    assert manager.find_prefix(chain(range(4))) == manager.find_prefix(chain(range(100, 104))) == []
    manager.check_integrity([held])


# --- eviction -----------------------------------------------------------------------------------------------


def test_the_least_recently_released_content_is_evicted_first() -> None:
    manager = BlockManager(3, 4)
    sequences = [range(10 * i, 10 * i + 4) for i in range(3)]
    blocks = [filled(manager, tokens) for tokens in sequences]
    for index in (1, 0, 2):
        manager.release(blocks[index])
    for evicted in (1, 0, 2):
        assert manager.allocate(1) == blocks[evicted]
        assert manager.find_prefix(chain(sequences[evicted])) == []


def test_using_content_again_makes_it_recent() -> None:
    manager = BlockManager(3, 4)
    sequences = [range(10 * i, 10 * i + 4) for i in range(3)]
    blocks = [filled(manager, tokens) for tokens in sequences]
    for held in blocks:
        manager.release(held)
    manager.acquire(blocks[0])
    manager.release(blocks[0])
    assert [manager.allocate(1) for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]


def test_of_one_sequence_the_tail_is_evicted_before_the_prefix() -> None:
    manager = BlockManager(3, 4)
    blocks = filled(manager, range(12))
    manager.release(blocks)
    assert [manager.allocate(1)[0] for _ in range(3)] == blocks[::-1]


def test_blocks_without_known_content_are_handed_out_before_any_is_evicted() -> None:
    manager = BlockManager(4, 4)
    known = filled(manager, range(8))
    manager.release(known)
    partial = manager.allocate(2)
    manager.release(partial)
    assert sorted(manager.allocate(2)) == sorted(partial)
    assert manager.find_prefix(chain(range(8))) == known


def test_an_evicted_block_is_known_by_its_new_content_only() -> None:
    manager = BlockManager(1, 4)
    manager.release(filled(manager, range(4)))
    block = filled(manager, range(50, 54))
    assert manager.find_prefix(chain(range(4))) == []
    assert manager.find_prefix(chain(range(50, 54))) == block
    manager.check_integrity([block])


# --- hashes -------------------------------------------------------------------------------------------------


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    """KV may be shared between processes and outlive them: a change here must be deliberate."""
    first = chain_hash(root_hash("model", "salt"), [1, 2, 3, 2**40])
    assert root_hash("model", "salt").hex() == "05aebf57380e215bd0a04582277ce887"
    assert first.hex() == "3efda94920980a9dd5c935cd5694eff5"
    program = (
        "from flashserve.scheduling.block_manager import chain_hash, root_hash\n"
        "print(chain_hash(root_hash('model', 'salt'), [1, 2, 3, 2**40]).hex())"
    )
    paths = [path for path in sys.path if path]
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(paths)}
        printed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        assert printed.stdout.decode().strip() == first.hex()


def test_root_separates_model_and_salt() -> None:
    roots = [root_hash("a", ""), root_hash("b", ""), root_hash("a", "x"), root_hash("ax", ""), root_hash("", "ax")]
    assert len(set(roots)) == len(roots)


def test_any_text_can_be_a_salt() -> None:
    assert root_hash("model", "\ud800") != root_hash("model", "\ud801")


# --- the books ----------------------------------------------------------------------------------------------


def test_integrity_check_notices_lost_doubled_and_foreign_blocks() -> None:
    manager = BlockManager(4, 4)
    blocks = manager.allocate(2)
    for wrong in ([], [blocks, blocks], [blocks[:1]], [[*blocks, 3]], [[blocks[0], blocks[0], blocks[1]]]):
        with pytest.raises(RuntimeError):
            manager.check_integrity(wrong)
    manager.check_integrity([blocks])
    manager._free[blocks[0]] = None
    with pytest.raises(RuntimeError, match="free list"):
        manager.check_integrity([blocks])
