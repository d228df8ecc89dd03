"""A step as a function of its tensors: the same code whether it runs at once, is captured, or is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve.models.model_input import CausalLM, ModelInput
from flashserve.runner.row_lengths import RowLengths
from flashserve.runner.slots import SlotTable
from flashserve.runner.staging import StepFields
from flashserve_kernels import AttentionBatch, CacheLayer, KVCacheSpec, Ops, SamplerColumns, Stage


@dataclass(frozen=True)
class StepModel:
    """The model with everything that lives on the device between steps."""

    model: CausalLM
    ops: Ops
    kv_cache: Sequence[CacheLayer]
    block_size: int
    block_table: Tensor
    """[slots, blocks] int32."""
    last_tokens: Tensor
    """[slots] int64."""
    sampler: SamplerColumns
    every_stage: Stage
    """Of the sampler."""

    @classmethod
    def build(cls, model: CausalLM, ops: Ops, spec: KVCacheSpec, num_blocks: int, slots: SlotTable) -> StepModel:
        """With a KV cache of its own."""
        return cls(
            model=model,
            ops=ops,
            kv_cache=ops.allocate_kv_cache(spec, num_blocks),
            block_size=spec.block_size,
            block_table=slots.device_block_table,
            last_tokens=slots.last_tokens,
            sampler=slots.sampler.columns,
            every_stage=slots.sampler.every_stage,
        )

    def logits(self, step: StepFields, lengths: RowLengths) -> Tensor:
        """Run the model. Returns [N, V]."""
        return self.model.logits(self._forward(step, step.logits_rows, lengths))

    def logits_and_pooled(
        self, step: StepFields, pooled_lens: Sequence[int], lengths: RowLengths
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`logits`, and the sums of hidden states: (logits [N, V], [len(pooled_lens), hidden] float32).

        pooled_lens: how many of ``pooled_rows`` each sum takes. Neither captured nor recorded.
        """
        rows = torch.cat((step.logits_rows, step.pooled_rows))
        hidden = self._forward(step, rows, lengths)
        sampled, pooled = hidden.split((len(step.logits_rows), len(step.pooled_rows)))
        sums = torch.stack([part.sum(0, dtype=torch.float32) for part in pooled.split(list(pooled_lens))])
        return self.model.logits(sampled) if len(sampled) else sampled, sums

    def _forward(self, step: StepFields, rows: Tensor, lengths: RowLengths) -> Tensor:
        """Hidden states of these of the step's tokens, [len(rows), hidden]."""
        ops = self.ops
        inputs = ModelInput(
            token_ids=ops.gather_tokens(step.token_ids, self.last_tokens, step.token_slots),
            positions=step.positions,
            attention=AttentionBatch(
                query_start_loc=step.query_start_loc,
                seq_lens=step.seq_lens,
                block_tables=ops.embedding(self.block_table, step.slots),
                slot_mapping=step.slot_mapping,
                block_size=self.block_size,
                max_query_len=lengths.longest,
                min_singles=lengths.min_singles,
                max_singles=lengths.max_singles,
                host_query_lens=lengths.query_lens,
                host_seq_lens=lengths.seq_lens,
            ),
            logits_rows=rows,
        )
        return self.model.forward(inputs, self.kv_cache)

    def sample(self, step: StepFields, logits: Tensor, stages: Stage) -> Tensor:
        """Choose tokens and keep them as their slots' last ones. Returns [N] int64."""
        tokens = self.ops.sample(logits, step.sample_slots, step.sample_positions, self.sampler, stages)
        self.ops.scatter_tokens_(self.last_tokens, step.sample_slots, tokens)
        return tokens

    def copy_blocks(self, pairs: Tensor) -> None:
        """Copy blocks of the KV cache. pairs: [N, 2] int64, (from, to)."""
        self.ops.copy_blocks(self.kv_cache, pairs)

    def update_block_table(self, step: StepFields) -> None:
        """Apply the changes since the last step to the device's copy."""
        self.block_table.view(-1).index_copy_(0, step.table_index, step.table_blocks)
