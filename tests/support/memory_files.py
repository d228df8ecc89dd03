"""A model that lies in no file."""

from __future__ import annotations

from pathlib import Path

import torch

from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WEIGHT_FORMATS
from flashserve.protocol import ModelCard


class MemoryWeights:
    """Implements WeightSource over a dictionary."""

    format = WEIGHT_FORMATS[None]

    def __init__(self, tensors, dtype, device, ops, ranks=None):
        self._tensors, self.dtype, self.device, self.ops = dict(tensors), dtype, device, ops
        self.ranks = ranks or Ranks()
        self._unused = set(tensors)

    def has(self, name):
        return name in self._tensors

    def grouped(self, name, shape):
        return None

    def read_into(self, name, out):
        self._unused.discard(name)
        out.copy_(self._tensors[name])

    def read(self, name, shape):
        out = torch.empty(shape, dtype=self.dtype)
        self.read_into(name, out)
        return out

    def scratch(self, shape):
        return torch.empty(shape, dtype=self.dtype)

    def mapped(self, name, shape):
        return None

    def finish(self, ignored):
        assert not self._unused


class MemoryFiles:
    """Implements ModelFiles without a file."""

    folder, dtype, card = Path("in memory"), "float32", ModelCard("", {}, {})

    def __init__(self, config, tensors):
        self.config, self._tensors = config, tensors

    def end_token_ids(self, vocab_size):
        return ()

    def has(self, name):
        return name in self._tensors

    def same(self, one, other):
        return torch.equal(self._tensors[one], self._tensors[other])

    def read_number(self, name):
        return None

    def num_elements(self, ignored):
        return sum(tensor.numel() for tensor in self._tensors.values())

    def weights(self, dtype, device, ops, format):
        return MemoryWeights(self._tensors, dtype, device, ops)

    def fingerprint(self, dtype, layout):
        return "in memory"
