"""flashserve through Triton's gRPC."""

from __future__ import annotations

from benchmarks.common.protocol import Run, serve
from benchmarks.common.served_engine import Served


class FlashserveServed(Served):
    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        return self.stream(self.work.options["users"], prompts, [output_tokens] * len(prompts))


if __name__ == "__main__":
    serve(FlashserveServed())
