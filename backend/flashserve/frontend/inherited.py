"""What a stub inherits from tritonserver and must not keep."""

from __future__ import annotations

import os
import stat

STANDARD = (0, 1, 2)  # a log may be a socket


def close_sockets() -> int:
    """Close every socket of this process but its standard streams; returns how many. To be called before it opens one.

    Triton starts a stub by fork, and its sockets are not closed on exec. A model that is loaded later would hold the
    clients' connections and the ports themselves: a client would not see that its connection was closed, and a
    tritonserver that is started anew would find its ports taken for as long as a stub of the old one lives.
    """
    closed = 0
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if descriptor not in STANDARD and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                closed += 1
        except OSError:  # the one by which the folder was read
            continue
    return closed
