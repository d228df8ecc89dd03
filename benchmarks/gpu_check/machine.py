"""The facts of this machine's GPU and libraries, as JSON: ``python -m benchmarks.gpu_check.machine FILE``."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from benchmarks.common.results import rounded, write_json
from benchmarks.common.timing import device_facts


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(Path(sys.argv[1]), {"python": platform.python_version(), **rounded(device_facts(device))})


if __name__ == "__main__":
    main()
