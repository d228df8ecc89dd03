"""What a GGUF file says of itself: metadata and the places of tensors, each number checked before it is used.

The layout, little-endian: "GGUF", version u32, tensors u64, values u64; then each value as key, type u32, value; then
each tensor as name, dimensions u32, the sizes u64 (fastest first), type u32, offset u64; then, aligned, the data. A
string is its length u64 and UTF-8. transformers has a reader as well, which takes lengths and counts as they come: a
file of 200 bytes that claims 2^60 strings would keep it busy for ever.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashserve.errors import ConfigError
from flashserve.models.file_weights import map_file
from flashserve.models.gguf.block_types import BlockType, find_block_type

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_COUNT = 1 << 21
"""Of an array's values: eight times the largest vocabulary that is known. What lies is found within a second."""
MAX_VALUES = 1 << 16
"""Of metadata values, and of tensors."""
MAX_DIMENSIONS = 4
MAX_FILES = 99_999
"""Of a split model: its files' names have five digits."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""struct's code of each type of number; a truth value (7) is checked apart."""
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufArray:
    """Where an array of metadata lies; its values are made when somebody asks (``GgufHeader.values``)."""

    kind: int
    """GGUF's type of the values."""
    count: int
    begin: int
    """Byte of the first value."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    file: Path
    name: str
    type: BlockType
    type_number: int
    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    begin: int
    """Bytes from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the last dimension."""
        return self.shape[-1] // self.type.elements * self.type.num_bytes

    @property
    def num_rows(self) -> int:
        """Product of all dimensions but the last."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.shape[-1]


class GgufHeader:
    """The header of one file. The file stays mapped: arrays and tensors are read from there."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError that names the file and the field that is wrong."""
        self.file = file
        self.memory = _map(file)
        reader = _Reader(self.memory, file.name)
        self.version, num_tensors, num_values = reader.start()
        self.values: dict[str, Any] = {}
        """By key: numbers, bools and strings as they are, arrays as GgufArray."""
        self.spans: dict[str, tuple[int, int]] = {}
        """By key: the bytes [begin, end) of key, type and value."""
        for index in range(num_values):
            begin = reader.at
            key = reader.string(f"key {index} of the metadata")
            if key in self.values:
                raise reader.error(key, "is there twice")
            self.values[key] = reader.value(key)
            self.spans[key] = (begin, reader.at)
        alignment = self.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise reader.error("general.alignment", f"is {alignment!r}, not a power of two")
        self.tensors = _read_tensors(reader, file, num_tensors, alignment)
        self.num_bytes = reader.at
        """Of the header."""

    def array(self, key: str) -> list[Any]:
        """The values of an array, which were checked to lie in the file. Raises ConfigError for broken text."""
        found = self.values[key]
        reader = _Reader(self.memory, self.file.name, found.begin)
        if found.kind == _STRING:
            return [reader.string(f"{key}[{index}]") for index in range(found.count)]
        return list(reader.numbers(found.kind, found.count, key))


def read_headers(file: Path) -> list[GgufHeader]:
    """Of a file, or of all files of a split model, first to last; ``file`` may be any of them. Raises ConfigError."""
    header = GgufHeader(file)
    count = _split_value(header, "split.count", 1)
    if count <= 1:
        return [header]
    if count > MAX_FILES:
        raise ConfigError(f"{file.name}: split.count is {count}, more than {MAX_FILES}")
    number = _split_value(header, "split.no", 0)
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not file.name.endswith(ending):
        raise ConfigError(f"{file.name}: split.no and split.count say that its name ends with {ending}")
    names = [f"{file.name.removesuffix(ending)}-{part + 1:05d}-of-{count:05d}.gguf" for part in range(count)]
    missing = next((name for name in names if not (file.parent / name).is_file()), None)
    if missing is not None:
        raise ConfigError(f"{file.name} is one of {count} files (split.count), and {missing} is missing")
    headers = [header if name == file.name else GgufHeader(file.parent / name) for name in names]
    for part, other in enumerate(headers):
        said = _split_value(other, "split.no", -1), _split_value(other, "split.count", -1)
        if said != (part, count):
            raise ConfigError(
                f"{other.file.name}: split.no and split.count are {said[0]} and {said[1]}, not {part} and {count}"
            )
    total = header.values.get("split.tensors.count")
    found = sum(len(other.tensors) for other in headers)
    if total is not None and total != found:
        raise ConfigError(f"{file.name}: split.tensors.count is {total!r}, the files hold {found}")
    return headers


def _split_value(header: GgufHeader, key: str, default: int) -> int:
    value = header.values.get(key, default)
    if type(value) is not int:
        raise ConfigError(f"{header.file.name}: {key} must be an integer, not {value!r}")
    return value


def _map(file: Path) -> mmap.mmap:
    try:
        return map_file(file)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ConfigError(f"cannot read {file.name}: {error}") from error


class _Reader:
    """Goes through a header; every step is checked against the end of the file."""

    def __init__(self, memory: mmap.mmap, name: str, at: int = 0) -> None:
        self._memory = memory
        self._name = name
        self.end = len(memory)
        self.at = at

    def error(self, field: str, reason: str) -> ConfigError:
        """For a field that cannot be true."""
        return ConfigError(f"{self._name}: {field} {reason}; the file is damaged or its download is incomplete")

    def start(self) -> tuple[int, int, int]:
        """Version, and counts of tensors and of values."""
        if self._memory[:4] != b"GGUF":
            raise ConfigError(f"{self._name} is no GGUF file: it begins with {self._memory[:4]!r}")
        self.at = 4
        version = self.u32("version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise ConfigError(f"{self._name} is a big-endian GGUF file, which is not supported")
            raise ConfigError(f"{self._name} is GGUF version {version}; supported: 2 and 3")
        counts = self.u64("the number of tensors"), self.u64("the number of metadata values")
        for count, field in zip(counts, ("the number of tensors", "the number of metadata values"), strict=True):
            if count > MAX_VALUES:
                raise self.error(field, f"is {count}, more than {MAX_VALUES}")
        return version, *counts

    def u32(self, field: str) -> int:
        return self._number(_U32, field)

    def u64(self, field: str) -> int:
        return self._number(_U64, field)

    def _number(self, form: struct.Struct, field: str) -> Any:
        if form.size > self.end - self.at:
            raise self.error(field, "lies beyond the end of the file")
        (value,) = form.unpack_from(self._memory, self.at)
        self.at += form.size
        return value

    def _bytes(self, field: str) -> bytes:
        length = self.u64(f"the length of {field}")
        if length > self.end - self.at:
            raise self.error(f"the length of {field}", f"is {length}, more than what is left of the file")
        self.at += length
        return self._memory[self.at - length : self.at]

    def string(self, field: str) -> str:
        try:
            return self._bytes(field).decode()
        except UnicodeDecodeError:
            raise self.error(field, "is not UTF-8") from None

    def value(self, key: str) -> Any:
        """A value after its key."""
        kind = self.u32(f"the type of {key}")
        if kind in _NUMBERS:
            return self._checked(kind, self._number(struct.Struct("<" + _NUMBERS[kind]), key), key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        raise self.error(f"the type of {key}", f"is {kind}, which there is not")

    def _checked(self, kind: int, value: Any, key: str) -> Any:
        if kind != _BOOL:
            return value
        if value not in (0, 1):
            raise self.error(key, f"is {value}, neither true nor false")
        return bool(value)

    def _array(self, key: str) -> GgufArray:
        kind = self.u32(f"the type of the values of {key}")
        count = self.u64(f"the number of values of {key}")
        if kind != _STRING and kind not in _NUMBERS:
            raise self.error(f"the type of the values of {key}", f"is {kind}, which is not supported")
        size = 8 if kind == _STRING else struct.calcsize("<" + _NUMBERS[kind])
        if count > MAX_COUNT or count * size > self.end - self.at:
            raise self.error(f"the number of values of {key}", f"is {count}, more than the file can hold")
        array = GgufArray(kind, count, self.at)
        if kind == _STRING:
            self._pass_strings(count, key)
        else:
            self.at += count * size
        return array

    def _pass_strings(self, count: int, key: str) -> None:
        """150,000 of them, as Qwen's files hold twice, take 30 ms."""
        memory, at, last, unpack = self._memory, self.at, self.end - 8, _U64.unpack_from
        for index in range(count):
            if at > last:
                raise self.error(f"{key}[{index}]", "lies beyond the end of the file")
            (length,) = unpack(memory, at)
            at += 8 + length
            if at > self.end:
                raise self.error(f"the length of {key}[{index}]", f"is {length}, more than what is left of the file")
        self.at = at

    def numbers(self, kind: int, count: int, key: str) -> Iterator[Any]:
        """Values of an array of numbers, which lies in the file."""
        for value in struct.unpack_from(f"<{count}{_NUMBERS[kind]}", self._memory, self.at):
            yield self._checked(kind, value, key)


def _read_tensors(reader: _Reader, file: Path, count: int, alignment: int) -> dict[str, TensorInfo]:
    """By name. Tensors lie one after the other, each aligned, in the order of the table: llama.cpp reads no others."""
    table: dict[str, tuple[BlockType, int, tuple[int, ...]]] = {}
    expected = 0
    offsets = []
    for index in range(count):
        name = reader.string(f"the name of tensor {index}")
        if name in table:
            raise reader.error(f"tensor {name}", "is there twice")
        shape = _read_shape(reader, name)
        number = reader.u32(f"the type of tensor {name}")
        try:
            kind = find_block_type(number)
        except ConfigError as error:
            raise ConfigError(f"{file.name}: tensor {name}: {error}") from error
        if shape[-1] % kind.elements:
            raise reader.error(f"tensor {name}", f"has rows of {shape[-1]}, which are no whole blocks of {kind.name}")
        offset = reader.u64(f"the offset of tensor {name}")
        if offset != expected:
            raise reader.error(
                f"the offset of tensor {name}", f"is {offset}, and the tensors before it end at {expected}"
            )
        table[name] = (kind, number, shape)
        offsets.append(offset)
        info = TensorInfo(file, name, kind, number, shape, 0)
        expected += -(-info.num_bytes // alignment) * alignment
    data = -(-reader.at // alignment) * alignment
    tensors = {
        name: TensorInfo(file, name, *entry, data + offset)
        for (name, entry), offset in zip(table.items(), offsets, strict=True)
    }
    for info in tensors.values():
        if info.begin + info.num_bytes > reader.end:
            raise reader.error(f"tensor {info.name}", f"ends at byte {info.begin + info.num_bytes} of {reader.end}")
    return tensors


def _read_shape(reader: _Reader, name: str) -> tuple[int, ...]:
    dimensions = reader.u32(f"the number of dimensions of tensor {name}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise reader.error(f"the number of dimensions of tensor {name}", f"is {dimensions}, not 1 to {MAX_DIMENSIONS}")
    sizes = [reader.u64(f"size {axis} of tensor {name}") for axis in range(dimensions)]
    if 0 in sizes:
        raise reader.error(f"tensor {name}", "has a dimension of size 0")
    return tuple(reversed(sizes))
