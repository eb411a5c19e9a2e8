"""Mistakes around the layers of which ``internlm verify`` must name the module: data, loss, optimizer, pipeline.

They are of kinds that public trackers of such frameworks record. What ``mistakes.py`` has is not repeated here.
"""

from __future__ import annotations

from tools.mistakes import CHUNKS, DATA, MTP, SPLIT, STAGES, Mistake

FULLY_SHARDED = (*DATA, "zero1.size=2", "zero1.fsdp=True")
REPLICAS = (*DATA, "zero1.size=1")
DROPOUT = "model.drop_rate=0.25"

AROUND_LAYERS: tuple[Mistake, ...] = (
    # -- data
    Mistake(
        name="every data rank reads the rows of the first",
        file="data/batch_plan.py",
        old="for rank in (data_rank, data_rank + 1))",
        new="for rank in (0, 1))",
        verify=DATA,
        module="the batch, batch",
        says="that of micro-batch 0",
    ),
    Mistake(
        name="the loss is the mean of the means of the data ranks",
        file="core/scheduler/loss.py",
        old="total = all_reduce(valid_tokens.sum(), data_group).clamp(min=1).double()",
        new="total = valid_tokens.sum().clamp(min=1).double() * data_group.size",
        verify=(*DATA, "data.micro_bsz=2"),
        module="the loss, loss",
    ),
    Mistake(
        name="the loss of the log is that of one data rank",
        file="core/scheduler/schedulers.py",
        old="all_reduce(all_reduce(compute.sums, self.data_group), self.pipeline.group)",
        new="all_reduce(compute.sums, self.pipeline.group)",
        verify=DATA,
        module="the loss, loss",
    ),
    Mistake(
        name="all data ranks drop the same elements",
        file="core/parallel/dropout.py",
        old="return self.data_rank * self.micro_num + self.micro_index",
        new="return self.micro_index",
        verify=(*DATA, DROPOUT),
        module="the model, forward",
    ),
    Mistake(
        name="initial values differ between the shards of a parameter and the whole",
        file="core/parallel/initialization.py",
        old='key = derived_seed(seed, "parameter", name)',
        new='key = derived_seed(seed, "parameter", name) + (placement.shard.index if placement.shard else 0)',
        verify=MTP,
        module="embedding, initial values",
    ),
    # -- optimizer
    Mistake(
        name="ZeRO: gradients are averaged over the data ranks",
        file="solver/optimizer/grad_reduce.py",
        old="self._pending = [begin_reduce_scatter(sent, process_groups.zero, self._sent_shard)]",
        new=(
            "sent.div_(process_groups.zero.size)\n"
            "            self._pending = [begin_reduce_scatter(sent, process_groups.zero, self._sent_shard)]"
        ),
        verify=DATA,
        module=r"[\w.]+, gradients",
        says="averaged over data",
    ),
    Mistake(
        name="ZeRO: the gradients of replicas of a shard are not summed",
        file="solver/optimizer/grad_reduce.py",
        old="            self._pending = [begin_all_reduce(self._sent_shard, self.process_groups.replica)]",
        new="            pass",
        verify=REPLICAS,
        module=r"[\w.]+, gradients",
        says="sum over data is missing|not summed over data",
    ),
    Mistake(
        name="ZeRO: a rank takes the shard of its rank in the world",
        file="solver/optimizer/flat_buffers.py",
        old="self.key, self.rank = key, zero.rank",
        new="self.key, self.rank = key, torch.distributed.get_rank() % zero.size",
        verify=("world=4", *SPLIT, "zero1.size=2"),
        module=r"[\w.]+, (gradients|update)",
    ),
    Mistake(
        name="ZeRO: updated parameters are gathered into a temporary tensor",
        file="solver/optimizer/param_gather.py",
        old="begin_all_gather(values[bounds.shard(zero.rank)], zero, values[bounds.start : bounds.stop])",
        new="begin_all_gather(values[bounds.shard(zero.rank)], zero)",
        verify=DATA,
        module=r"[\w.]+, update",
        says="all-gather is missing",
    ),
    Mistake(
        name="ZeRO: the learning rate is multiplied by the number of data ranks",
        file="solver/optimizer/zero_optimizer.py",
        old="rule.update(lr, beta2, divisor, skip)",
        new="rule.update(lr * self.process_groups.zero.size, beta2, divisor, skip)",
        verify=DATA,
        module=r"[\w.]+, update",
        says="multiplied by 2",
    ),
    Mistake(
        name="ZeRO: each rank clips by the norm of its shard",
        file="solver/optimizer/zero_optimizer.py",
        old="        all_reduce(squares, self.process_groups.zero)\n",
        new="",
        verify=DATA,
        module="the gradient norm, norm",
    ),
    Mistake(
        name="Muon orthogonalises the shard of a rank",
        file="solver/optimizer/muon.py",
        old=(
            "whole = orthogonal("
            "self._gather_matrix(direction[matrix.index][where], placement), o.ns_steps, o.ns_dtype)\n"
            "            own = placement.shard_of(whole.contiguous().view(placement.global_shape)).reshape(-1)"
        ),
        new=(
            "part = direction[matrix.index][where].view(-1, placement.local_shape[-1])\n"
            "            own = orthogonal(part, o.ns_steps, o.ns_dtype).reshape(-1)"
        ),
        verify=(*MTP, "optimizer.type=Muon"),
        module=r"layers.0.attention.wqkv, update",
    ),
    Mistake(
        name="fully sharded: gradients are averaged over the data ranks",
        file="core/parallel/fully_sharded.py",
        old="unit.set_gradient_divide_factor(1.0)",
        new="unit.set_gradient_divide_factor(float(group.size))",
        verify=FULLY_SHARDED,
        module=r"[\w.]+, gradients",
        says="averaged over data",
    ),
    Mistake(
        name="fully sharded: the gradients of replicas of a shard are not summed",
        file="solver/optimizer/grad_reduce.py",
        old="if self.process_groups.replica.size > 1:",
        new="if self.process_groups.replica.size > self.process_groups.zero.size:",
        verify=("world=4", *FULLY_SHARDED[1:]),
        module=r"[\w.]+, gradients",
        says="missing|not summed over data",
    ),
    # -- pipelines
    Mistake(
        name="interleaved: a stage has consecutive chunks",
        file="costs/stages.py",
        old="layout.virtual(stage, chunk) for chunk",
        new="stage * layout.chunks + chunk for chunk",
        verify=CHUNKS,
        module=r"(the model|the pipeline between layers.0 and layers.\d), forward",
    ),
    Mistake(
        name="the gradient sent to the stage before is divided by the number of stages",
        file="core/scheduler/compute.py",
        old="return None if hidden is None else hidden.grad",
        new="return None if hidden is None or hidden.grad is None else hidden.grad / 2",
        verify=STAGES,
        module="the pipeline between layers.0 and layers.1, backward",
        says="multiplied by 0.5",
    ),
    Mistake(
        name="later stages have the inputs of the first micro-batch",
        file="core/scheduler/compute.py",
        old="self.micro_batches.inputs(index)",
        new="self.micro_batches.inputs(index if hidden is None else 0)",
        verify=STAGES,
        module="the batch, batch",
    ),
    Mistake(
        name="a deferred weight gradient is added twice",
        file="core/scheduler/compute.py",
        old="state.tasks.pop(0)()",
        new="state.tasks[0]()\n        state.tasks.pop(0)()",
        verify=(*CHUNKS, "pipeline.mode=ZBV"),
        module=r"layers.\d.feed_forward.w2, gradients",
        says="multiplied by 2",
    ),
    Mistake(
        name="the layers of every chunk drop as those of the first",
        file="model/decoder.py",
        old="x = block(x, table, sequences, drop_in(index), layer_cache)",
        new="x = block(x, table, sequences, drop_in(index - self.stage_layers.chunks[chunk].start), layer_cache)",
        verify=(*CHUNKS, DROPOUT),
        module=r"layers.1, forward",
    ),
    Mistake(
        name="initial values depend on the index of a layer in its stage",
        file="model/decoder.py",
        old="str(index): Block(spec, index, chunk)",
        new="str(index): Block(spec, index - run.start, chunk)",
        verify=STAGES,
        config="configs/debug/internlm.py",
        module=r"layers.1.(attention.wo|feed_forward.w2), initial values",
    ),
    Mistake(
        name="windows depend on the index of a layer in its stage",
        file="model/decoder.py",
        old="str(index): Block(spec, index, chunk)",
        new="str(index): Block(spec, index - run.start, chunk)",
        verify=STAGES,
        config="configs/debug/gemma3.py",
        module=r"layers.1.attention(.wo)?, forward",
    ),
    Mistake(
        name="a pipeline does not run its last micro-batch",
        file="core/scheduler/schedulers.py",
        old="executor = Executor(self._plan(len(micro_batches), backward)",
        new="count = max(len(micro_batches) - (self.pipeline.group.size > 1), 1)\n"
        "        executor = Executor(self._plan(count, backward)",
        verify=STAGES,
        module="the schedule, forward",
    ),
)
