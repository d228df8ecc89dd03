"""What Locust's process and those that start it agree on."""

FAILED, BAD_OPTIONS, MISSED = 1, 2, 3
"""Exit codes: no load could be made, options that cannot be, an objective was missed. 0: all are met."""
INTERRUPTED = 130  # 128 + SIGINT, as shells count
VIEW_FD = "FLASHSERVE_BENCH_VIEW_FD"
"""Environment: a file descriptor that gets a line of JSON per second, for a view in the terminal."""
DEFAULT_TARGET = "grpc://localhost:8001"
