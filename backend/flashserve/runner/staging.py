"""Where a step's numbers lie: one buffer on the host, one on the device, cut into the same fields.

All fields of a step lie in one piece of memory, so a step needs one copy to the device. The places of the fields depend
on the step's sizes alone: a captured step, whose sizes are those of its bucket, finds them at the same addresses again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16


@dataclass(frozen=True)
class StepSizes:
    """How much a step holds, or has room for."""

    tokens: int
    """T: tokens to compute."""
    seqs: int
    """R: sequences they belong to."""
    logits: int
    """N: rows that are sampled."""
    new_blocks: int = 0
    """Entries of block tables that changed since the last step."""
    pooled: int = 0
    """P: tokens whose hidden states go into embeddings."""


@dataclass(frozen=True)
class StepFields:
    """A step's numbers: numpy arrays on the host, tensors on the device. Comments give shapes and dtypes."""

    token_ids: Any
    """[T] int64; -1: the slot's last sample."""
    token_slots: Any
    """[T] int64: each token's slot."""
    positions: Any
    """[T] int64."""
    slot_mapping: Any
    """[T] int64: where the token's key and value go; -1: nowhere."""
    slots: Any
    """[R] int64."""
    logits_rows: Any
    """[N] int64: the tokens whose logits are wanted."""
    sample_slots: Any
    """[N] int64."""
    sample_positions: Any
    """[N] int64: positions of those tokens."""
    query_start_loc: Any
    """[R + 1] int32."""
    seq_lens: Any
    """[R] int32."""
    table_index: Any
    """[new_blocks] int64: flat places in the block table."""
    table_blocks: Any
    """[new_blocks] int32: what they hold now."""
    pooled_rows: Any
    """[P] int64: the tokens whose hidden states are pooled; last, for most steps have none."""


_PER_SEQ = {"slots", "seq_lens"}
_PER_LOGITS = {"logits_rows", "sample_slots", "sample_positions"}
_PER_NEW_BLOCK = {"table_index", "table_blocks"}
_INT32 = {"query_start_loc", "seq_lens", "table_blocks"}


def _count(name: str, sizes: StepSizes) -> int:
    if name == "query_start_loc":
        return sizes.seqs + 1
    if name in _PER_SEQ:
        return sizes.seqs
    if name in _PER_LOGITS:
        return sizes.logits
    if name == "pooled_rows":
        return sizes.pooled
    return sizes.new_blocks if name in _PER_NEW_BLOCK else sizes.tokens


def _dtype(name: str) -> torch.dtype:
    return torch.int32 if name in _INT32 else torch.int64


def layout(sizes: StepSizes) -> tuple[dict[str, tuple[int, int, torch.dtype]], int]:
    """(field → (first byte, number of elements, dtype), bytes in all)."""
    places, end = {}, 0
    for name in (f.name for f in fields(StepFields)):
        count, dtype = _count(name, sizes), _dtype(name)
        places[name] = (end, count, dtype)
        end = -(-(end + count * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
    return places, end


def tensor_fields(buffer: Tensor, sizes: StepSizes) -> StepFields:
    """Views of a byte buffer."""
    places, _ = layout(sizes)
    return StepFields(
        **{
            name: buffer[first : first + count * dtype.itemsize].view(dtype)
            for name, (first, count, dtype) in places.items()
        }
    )


def array_fields(buffer: Tensor, sizes: StepSizes) -> StepFields:
    """The same as numpy arrays; the buffer lies on the host."""
    views = tensor_fields(buffer, sizes)
    return StepFields(**{f.name: getattr(views, f.name).numpy() for f in fields(StepFields)})


def num_bytes(sizes: StepSizes) -> int:
    """What a buffer for steps of up to these sizes needs."""
    return layout(sizes)[1]


def fill_padding(host: StepFields, used: StepSizes, spare_slot: int) -> None:
    """Give a captured step's unused rows harmless numbers: sequences without a token. Unused tokens belong to no
    sequence and are stored nowhere. Unused rows of logits, which are more where a prompt's single token does not
    sample, are the first token's, and their samples go to a slot that nobody reads."""
    tokens, seqs, rows = slice(used.tokens, None), slice(used.seqs, None), slice(used.logits, None)
    host.token_ids[tokens] = 0
    host.token_slots[tokens] = spare_slot
    host.positions[tokens] = 0
    host.slot_mapping[tokens] = -1
    host.slots[seqs] = spare_slot
    host.seq_lens[seqs] = 0
    host.query_start_loc[used.seqs :] = used.tokens
    host.logits_rows[rows] = 0
    host.sample_slots[rows] = spare_slot
    host.sample_positions[rows] = 0
