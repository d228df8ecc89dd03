"""The types of GGUF's tensors: how many numbers a block holds, and in how many bytes."""

from __future__ import annotations

from dataclasses import dataclass

from flashserve.errors import ConfigError


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types of stored numbers."""

    name: str
    elements: int
    """Numbers in a block; a row is whole blocks."""
    num_bytes: int
    """Of a block."""


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
}
"""By ggml's number."""

UNSUPPORTED = {28: "F64", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
"""Others that files are known to hold, for a message that names them."""


def find_block_type(number: int) -> BlockType:
    """Raises ConfigError for a type that is not read here."""
    found = BLOCK_TYPES.get(number)
    if found is None:
        name = f"{UNSUPPORTED[number]} ({number})" if number in UNSUPPORTED else str(number)
        known = ", ".join(one.name for one in BLOCK_TYPES.values())
        raise ConfigError(f"type {name} is not supported; supported: {known}")
    return found
