"""Mistakes to plant that the tests must catch, and what ``internlm verify`` must say of them.

``mutate.py`` plants them, and those of ``mistakes_in_layers.py`` and ``mistakes_around_layers.py``, on which only
``internlm verify`` is tried.
"""

from __future__ import annotations

from dataclasses import dataclass

PIPELINE = ("tests/dist/test_pipeline.py",)
PARALLEL = ("tests/dist/test_parallel.py", "-k", "test_every_layout or test_every_case")
#: Sections whose keys are written without ``parallel.``.
PARALLEL_SECTIONS = ("tensor.", "weight.", "pipeline.", "zero1.")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """``old`` (which occurs once in ``file``, below ``internlm/``) becomes ``new``; ``tests`` must then fail.

    With ``verify``, ``internlm verify`` must then name the module and the phase of the step that ``module`` matches,
    and say what ``says`` matches. Both were written down from what the code does, before the command was tried.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = PARALLEL
    verify: tuple[str, ...] = ()
    """Layout: overrides of the config, where ``parallel.`` is left out, and ``world=N`` or ``steps=N``."""
    config: str = "configs/debug/internlm2.py"
    module: str = ""
    says: str = ""

    def arguments(self) -> list[str]:
        """Return the arguments of ``internlm verify`` after the config."""
        words: list[str] = []
        for each in self.verify:
            key, _, value = each.partition("=")
            short = key.startswith(PARALLEL_SECTIONS)
            words += [f"--{key}", value] if key in ("world", "steps") else ["--set", f"{'parallel.' * short}{each}"]
        return words


#: Layouts; all but the first have two ranks.
SPLIT = ("tensor.size=2",)
DATA = ("world=2",)
MTP = ("world=2", *SPLIT)
MSP = (*MTP, "tensor.mode=msp")
FSP = (*MTP, "tensor.mode=fsp")
ISP = (*MTP, "tensor.mode=isp", "weight.size=2")
STAGES = ("world=2", "pipeline.size=2")
CHUNKS = (*STAGES, "model.num_chunks=2", "model.num_layers=4")

TESTED: tuple[Mistake, ...] = (
    Mistake(
        name="mtp: the output of a row is not summed",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(y, self.group)",
        new="return y",
        verify=MTP,
        module="layers.0.attention.wo, forward",
        says="all-reduce over tensor is missing",
    ),
    Mistake(
        name="mtp: the gradient of a column's input is not summed",
        file="core/parallel/tensor_parallel.py",
        old=(
            "        # It overlaps with the matmul for the weight's gradient.\n"
            "        return begin_all_reduce(dx, self.group)"
        ),
        new="        return Pending(dx)",
        verify=MTP,
        module=r"layers.\d.feed_forward.w13, backward",
        says="all-reduce over tensor is missing",
    ),
    Mistake(
        name="partial gradients of norms are not summed",
        file="solver/optimizer/grad_reduce.py",
        old="if mode is not None and self._shard.numel()",
        new="if False",
        verify=MSP,
        module=r"(norm|layers.\d.\w+_norm), gradients",
        says="not summed over tensor",
    ),
    Mistake(
        name="fully sharded: partial gradients of norms are not summed",
        file="solver/optimizer/grad_reduce.py",
        old="if group.key.partial_over is not None",
        new="if False",
        tests=("tests/dist/test_fsdp.py", "-k", "test_every_row"),
        verify=("world=4", *SPLIT, "tensor.mode=msp", "zero1.size=2", "zero1.fsdp=True"),
        module=r"(norm|layers.\d.\w+_norm), gradients",
        says="not summed over tensor",
    ),
    Mistake(
        name="the norm counts whole parameters on every rank",
        file="solver/optimizer/zero_optimizer.py",
        old="squares[modes.index(group.key.split_over)] +=",
        new="squares[-1] +=",
        verify=MTP,
        module="the gradient norm, norm",
    ),
    Mistake(
        name="the norm leaves split parameters unsummed",
        file="solver/optimizer/zero_optimizer.py",
        old="all_reduce(square.add_(squares[0] * 0), self.process_groups.by_split[mode])",
        new="pass",
        verify=MTP,
        module="the gradient norm, norm",
    ),
    Mistake(
        name="the loss is divided by this rank's valid tokens",
        file="core/scheduler/loss.py",
        old="all_reduce(valid_tokens.sum(), data_group).clamp",
        new="valid_tokens.sum().clamp",
        verify=DATA,
        module="the loss, loss",
    ),
    Mistake(
        name="isp: the mean of a micro-batch is that of this rank's tokens",
        file="core/scheduler/loss.py",
        old="whole = all_reduce(valid_tokens.clone(), micro_batch_group)",
        new="whole = valid_tokens",
        tests=("tests/dist/test_parallel.py", "-k", "means_of_micro_batches"),
        verify=(*ISP, "loss.average='micro_batch'"),
        module="the loss, loss",
    ),
    Mistake(
        name="the last micro-batch is dropped",
        file="core/scheduler/micro_batches.py",
        old="return len(self._labels)\n",
        new="return max(len(self._labels) - 1, 1)\n",
    ),
    Mistake(
        name="isp: rotary positions begin anew on every rank",
        file="core/parallel/isp.py",
        old="return all_gather(positions, self.group)",
        new="return positions.repeat(self.group.size)",
        verify=ISP,
        module="(the model|layers.0.attention), forward",
    ),
    Mistake(
        name="isp: gradients of a repeated kv head are not summed",
        file="core/parallel/isp.py",
        old="dqkv[:, :, :, -2:].sum(2)",
        new="dqkv[:, :, 0, -2:]",
        tests=("tests/dist/test_parallel.py", "-k", "fewer_kv_heads"),
        verify=(*ISP, "model.num_kv_attention_heads=1"),
        module=r"layers.\d.attention, backward",
    ),
    Mistake(
        name="isp: heads come back in the wrong order",
        file="core/parallel/isp.py",
        old="all_to_all(heads.view(self.group.size, tokens, -1), self.group).transpose(0, 1).flatten(1)",
        new="all_to_all(heads.view(self.group.size, tokens, -1), self.group).flip(0).transpose(0, 1).flatten(1)",
        verify=ISP,
        module="layers.0.attention(.wo)?, forward",
    ),
    Mistake(
        name="isp: the gradient of the embedding is not summed",
        file="core/parallel/isp.py",
        old="return reduce_scatter(pad_rows(dw, self.group), self.group)",
        new="return pad_rows(dw, self.group).chunk(self.group.size)[self.group.rank]",
        verify=ISP,
        module="embedding, gradients",
    ),
    Mistake(
        name="isp: with overlap the last gradient is never delivered",
        file="core/parallel/weight_gatherer.py",
        old=(
            "        # Registered several times per backward pass; all calls but the first are no-ops.\n"
            "        self._deliver()\n"
        ),
        new="",
        tests=("tests/dist/test_parallel.py", "-k", "overlap"),
        verify=(*ISP, "weight.overlap=True"),
        module=r"layers.\d.attention.wqkv, gradients",
    ),
    Mistake(
        name="isp: with overlap a weight is read before it has arrived",
        file="core/parallel/weight_gatherer.py",
        old="whole = self._gathers.pop(index).wait()",
        new="whole = self._gathers.pop(index)._result",
        tests=("tests/dist/test_parallel.py", "-k", "overlap or every_layout"),
    ),
    Mistake(
        name="isp: every rank reads the first shard of the sequence",
        file="data/loader.py",
        old=".chunk(sequence_shard.size, 1)[sequence_shard.rank]",
        new=".chunk(sequence_shard.size, 1)[0]",
        verify=ISP,
        module="the batch, batch",
    ),
    Mistake(
        name="msp, fsp: the gradient of a row's bias is that of all tokens",
        file="core/parallel/linear.py",
        old=(
            "        dbs = _grad_biases(dy, ctx.biases, outputs, needs_biases)\n"
            "        dy = outputs.comms[0].gather_grad_output(dy)  # [T, O]\n"
        ),
        new=(
            "        dy = outputs.comms[0].gather_grad_output(dy)  # [T, O]\n"
            "        dbs = _grad_biases(dy, ctx.biases, outputs, needs_biases)\n"
        ),
        verify=MSP,
        module=r"layers.\d.attention.wo, gradients",
        says="summed over tensor once more|multiplied by 2",
        config="configs/debug/internlm.py",
    ),
    Mistake(
        name="msp, fsp: the gradient of the head's input is sliced, not summed",
        file="core/parallel/tensor_parallel.py",
        old="lambda dx: reduce_scatter(dx, self.group))",
        new="lambda dx: dx.chunk(self.group.size)[self.group.rank].contiguous())",
        verify=FSP,
        module="output, backward",
    ),
    Mistake(
        name="msp, fsp: hidden slices go to the wrong tokens",
        file="core/parallel/tensor_parallel.py",
        old="return received.transpose(0, 1).flatten(1)",
        new="return received.flip(0).transpose(0, 1).flatten(1)",
        verify=MSP,
        module="embedding, forward",
    ),
    Mistake(
        name="an embedding split by vocabulary looks up the first rank's entries",
        file="core/parallel/tensor_parallel.py",
        old="self.first = group.rank * placement.local_shape[0]",
        new="self.first = 0",
        verify=(*MTP, "model.embed_split_hidden=False"),
        module="embedding, forward",
    ),
    Mistake(
        name="an embedding split by hidden size takes the first rank's gradient",
        file="core/parallel/tensor_parallel.py",
        old="dx.chunk(group.size, 1)[group.rank]",
        new="dx.chunk(group.size, 1)[0]",
        verify=MTP,
        module="embedding, (backward|gradients)",
    ),
    Mistake(
        name="padding of the vocabulary is counted as entries",
        file="core/parallel/tensor_parallel.py",
        old="self.columns = min(self.first + rows, self.total) - self.first",
        new="self.columns = rows",
        verify=MTP,
        module="output, forward",
    ),
    Mistake(
        name="label smoothing spreads over this rank's entries alone",
        file="core/parallel/tensor_parallel.py",
        old="self.total = placement.local_shape[0], placement.global_shape[0]",
        new="self.total = placement.local_shape[0], placement.local_shape[0]",
        verify=(*MTP, "loss.label_smoothing=0.1"),
        module="output, forward",
    ),
    Mistake(
        name="gate and up projection are split at the wrong axis",
        file="model/blocks.py",
        old="split_axis=1",
        new="split_axis=0",
    ),
    Mistake(
        name="a padded shard is filled from the wrong rows",
        file="core/parallel/placement.py",
        old="first = min(self.shard.index * size, total)",
        new="first = min(self.shard.index * size // 2, total)",
        verify=MTP,
        module="(embedding|output), initial values",
    ),
    Mistake(
        name="replicated parameters of isp are called complete",
        file="core/parallel/sharding.py",
        old='"isp": ParallelMode.WEIGHT}',
        new='"isp": None}',
        verify=ISP,
        module=r"(norm|layers.\d.\w+_norm), gradients",
        says="not summed over (weight|tensor)",
    ),
    Mistake(
        name="the ledger forgets the second half of an all-reduce",
        file="core/parallel/collectives.py",
        old="2 * (group.size - 1) * tensor.nbytes // group.size",
        new="(group.size - 1) * tensor.nbytes // group.size",
        tests=("tests/dist/test_traffic.py",),
    ),
    Mistake(
        name="fsp keeps what it gathered",
        file="core/parallel/tensor_parallel.py",
        old=('class FspColumn(Communicator):\n    """'),
        new=('class FspColumn(Communicator):\n    keeps_gathered_input = True\n    """'),
        tests=("tests/dist/test_traffic.py",),
        verify=FSP,
        module=r"layers.\d.(attention.wqkv|feed_forward.w13), communication",
    ),
    Mistake(
        name="a pipeline's norm is that of one stage",
        file="solver/optimizer/zero_optimizer.py",
        old="all_reduce(squares.sum(), self.process_groups.pipeline)",
        new="squares.sum()",
        tests=PIPELINE,
        verify=STAGES,
        module="the gradient norm, norm",
    ),
    Mistake(
        name="the norm counts a tied embedding twice",
        file="solver/optimizer/zero_optimizer.py",
        old="[] if self._is_copy(group) else row_norms(group.grad_shards)",
        new="row_norms(group.grad_shards)",
        tests=PIPELINE,
        verify=(*STAGES, "model.tie_word_embeddings=True"),
        module="the gradient norm, norm",
        says="embedding.weight counts 2 times",
    ),
    Mistake(
        name="gradients of a tied embedding are not summed",
        file="model/decoder.py",
        old="if c.tie_word_embeddings and stage_layers.has_embedding != stage_layers.has_head:",
        new="if False:",
        tests=PIPELINE,
        verify=(*STAGES, "model.tie_word_embeddings=True"),
        module="embedding, gradients",
        says="not summed over pipeline",
    ),
    Mistake(
        name="the loss stays on the last stage",
        file="core/scheduler/schedulers.py",
        old="all_reduce(all_reduce(compute.sums, self.data_group), self.pipeline.group)",
        new="all_reduce(compute.sums, self.data_group)",
        tests=PIPELINE,
        verify=STAGES,
        module="the loss, loss",
    ),
    Mistake(
        name="a deferred weight gradient is dropped",
        file="core/scheduler/compute.py",
        old="state.tasks.pop(0)()",
        new="state.tasks.pop(0)",
        tests=PIPELINE,
        verify=(*STAGES, "pipeline.mode=ZBH1"),
        module=r"layers.\d.feed_forward.w2, gradients",
        says="zero",
    ),
    Mistake(
        name="hidden states of one micro-batch are taken for another's",
        file="core/scheduler/plan.py",
        old="receives[bisect_left(ends, time)].append(receive)",
        new="receives[bisect_left(ends, time)].insert(0, receive)",
        tests=PIPELINE,
        verify=(*CHUNKS, "data.micro_num=4"),
        module=r"(the pipeline between layers.\d and layers.\d|the schedule), forward",
    ),
    Mistake(
        name="chunks of a V are assigned as if interleaved",
        file="costs/stages.py",
        old="layout.virtual(stage, chunk) for chunk",
        new="chunk * layout.stages + stage for chunk",
        tests=PIPELINE,
    ),
    Mistake(
        name="isp: a weight of the next chunk is prefetched in vain",
        file="core/parallel/weight_gatherer.py",
        old="return 0 <= other < len(self.linears) and self.linears[index].chunk == self.linears[other].chunk",
        new="return 0 <= other < len(self.linears)",
        tests=("tests/dist/test_traffic.py",),
        verify=("world=4", *CHUNKS[1:], "tensor.mode=isp", "weight.size=2", "weight.overlap=True"),
        module=r"layers.\d.feed_forward.w2, communication",
    ),
    Mistake(
        name="fp16: gradients are clipped before they are unscaled",
        file="solver/optimizer/zero_optimizer.py",
        old="((norm + 1e-6) / clip)",
        new="((norm * scale + 1e-6) / clip)",
        tests=("tests/unit/solver/test_zero_optimizer.py",),
    ),
    Mistake(
        name="AdamW decays a group with its own learning rate twice",
        file="solver/optimizer/update_rules.py",
        old="            if double:\n",
        new=(
            '            options["weight_decay"] = group.key.weight_decay * (1 if group.key.lr_scale == 1 else 2)\n'
            "            if double:\n"
        ),
        tests=("tests/unit/solver/test_update_rules.py",),
    ),
    Mistake(
        name="a resumed run draws dropout masks as from its first step",
        file="core/trainer.py",
        old="step=self.state.step, loss_scale=",
        new='step=next(vars(self).setdefault("_steps", iter(range(10**9)))), loss_scale=',
        tests=("tests/dist/test_resume.py", "-k", "data-mid-epoch"),
    ),
    Mistake(
        name="gradients are taken for complete as with the first number of micro-batches",
        file="solver/optimizer/grad_reduce.py",
        old="self._learned.get(micro_batches, {})",
        new="next(iter(self._learned.values()), {})",
        tests=("tests/unit/solver/test_zero_optimizer.py",),
    ),
    Mistake(
        name="dropout of the embedding is not rescaled",
        file="model/decoder.py",
        old='drop_in(None)("embedding", self._embed(input_ids))',
        new='drop_in(None)("embedding", self._embed(input_ids) * (1 - self.spec.config.drop_rate))',
        tests=("tests/unit/model/test_decoder.py",),
    ),
)
