"""Settings of the compute threads that must be made before torch is imported. Imports nothing."""

from __future__ import annotations

import os

SPIN_COUNT = 2000


def limit_spinning() -> None:
    """Let OpenMP threads sleep after waiting about 0.1 ms for each other, unless the environment says otherwise.

    GNU OpenMP's default of 300,000 rounds is about 16 ms on a recent Xeon. Where other processes want the cores
    (the stub, tritonserver, a load generator), a thread that spins keeps the one it waits for from running: with
    two busy neighbours on two cores a decode step of a 135M model took 1,590 ms, and 200 ms with this limit.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
