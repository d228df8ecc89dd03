"""transformers: `generate` one request after the other, `generate` with a static batch, and continuous batching."""

from __future__ import annotations

from benchmarks.common.protocol import Run, Workload, serve
from benchmarks.common.transformers_engine import Transformers


class TransformersPeer(Transformers):
    def load(self, work: Workload) -> None:
        super().load(work)
        self.mode = work.options["mode"]
        self.settings["mode"] = self.mode

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        count, one = len(prompts), self.mode == "one by one"
        mode, batch = ("static", 1) if one else (self.mode, count)
        return self.generate(mode, batch, prompts, [output_tokens] * count, [0.0] * count)


if __name__ == "__main__":
    serve(TransformersPeer())
