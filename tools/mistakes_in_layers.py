"""Mistakes in the layers of a model of which ``internlm verify`` must name the module.

They are of kinds that public trackers of such frameworks record. What ``mistakes.py`` has is not repeated here.
"""

from __future__ import annotations

from tools.mistakes import FSP, ISP, MSP, MTP, SPLIT, Mistake

WHOLE_VOCABULARY = "model.embed_split_hidden=False"
DROPOUT = "model.drop_rate=0.25"
LORA = "model.lora={'rank': 4, 'alpha': 8.0}"

IN_LAYERS: tuple[Mistake, ...] = (
    # -- tensor parallelism
    Mistake(
        name="mtp: the bias of a row is added by each rank before the sum",
        file="core/parallel/linear.py",
        old=(
            "    y, gathered = products.output(before(x) if before else x, weights, outputs)\n"
            "    # After the communication: an all-reduce of the output would add a bias once for each rank.\n"
            "    for own, bias in zip(outputs.split(y), biases, strict=True):\n"
            "        if bias is not None:\n"
            "            own += bias.view(own.shape[1:])\n"
        ),
        new=(
            "    comm, bias = outputs.comms[0], biases[0]\n"
            "    gathered = comm.gather_input(before(x) if before else x).wait()\n"
            "    matrix = comm.gather_weight(weights[0])\n"
            "    product = products.gemm.linear(gathered, matrix)\n"
            "    y = comm.reduce_output(product if bias is None else product + bias.view(-1))\n"
            "    comm.release_weight(matrix)\n"
        ),
        verify=MTP,
        config="configs/debug/internlm.py",
        module="layers.0.attention.wo, forward",
    ),
    Mistake(
        name="mtp: the output of a row is summed over the data ranks",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(y, self.group)",
        new=(
            "from internlm.core.context import ParallelMode, global_context\n\n"
            "        return all_reduce(y, global_context.group(ParallelMode.DATA))"
        ),
        verify=("world=4", *SPLIT),
        module="layers.0.attention.wo, forward",
        says="over data",
    ),
    Mistake(
        name="mtp: the output of a row is summed twice",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(y, self.group)",
        new="return all_reduce(all_reduce(y, self.group), self.group)",
        verify=MTP,
        module="layers.0.attention.wo, forward",
        says="doubled|once more",
    ),
    Mistake(
        name="mtp: the output of a row is averaged",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(y, self.group)",
        new="return all_reduce(y, self.group).div_(self.group.size)",
        verify=MTP,
        module="layers.0.attention.wo, forward",
        says="averaged",
    ),
    Mistake(
        name="mtp: the gradient of a column's input is summed twice",
        file="core/parallel/tensor_parallel.py",
        old=(
            "        # It overlaps with the matmul for the weight's gradient.\n"
            "        return begin_all_reduce(dx, self.group)"
        ),
        new="        return begin_all_reduce(all_reduce(dx, self.group), self.group)",
        verify=MTP,
        module=r"layers.\d.feed_forward.w13, backward",
        says="doubled|once more",
    ),
    Mistake(
        name="mtp: the gradient of the head's input is not summed",
        file="core/parallel/tensor_parallel.py",
        old="return exchange(x, lambda x: x, lambda dx: all_reduce(dx, self.group))",
        new="return x",
        verify=MTP,
        module="output, backward",
        says="missing",
    ),
    Mistake(
        name="mtp: the gradient of the embedding is summed although every rank has all of it",
        file="core/parallel/tensor_parallel.py",
        old="lambda x: all_reduce(x, group), lambda dx: dx)",
        new="lambda x: all_reduce(x, group), lambda dx: all_reduce(dx.clone(), group))",
        verify=(*MTP, WHOLE_VOCABULARY),
        module="embedding, (backward|gradients)",
        says="once more|multiplied by 2|doubled",
    ),
    Mistake(
        name="mtp: the softmax of a split vocabulary has a maximum of its own on each rank",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(x, self.group, dist.ReduceOp.MAX)",
        new="return x",
        verify=MTP,
        module="output, forward",
    ),
    Mistake(
        name="mtp: the softmax of a split vocabulary is over this rank's entries",
        file="core/parallel/tensor_parallel.py",
        old="        return all_reduce(x, self.group)\n\n\nclass SplitHead(",
        new="        return x\n\n\nclass SplitHead(",
        verify=MTP,
        module="output, forward",
    ),
    Mistake(
        name="mtp: labels are taken for entries of the first rank's shard",
        file="ops/cross_entropy.py",
        old="local = labels - vocab.first",
        new="local = labels.clone()",
        verify=MTP,
        module="output, forward",
    ),
    Mistake(
        name="mtp: the softmax is scaled by the size of all heads of a rank",
        file="model/blocks.py",
        old="self.scale, self.window = c.attention_scale, c.window(layer)",
        new=(
            "self.scale, self.window = c.attention_scale, c.window(layer)\n"
            "        shard = self.wqkv.weight.shape[0] / groups\n"
            "        self.scale = (c.head_size * shard) ** -0.5"
        ),
        verify=MTP,
        module="layers.0.attention(.wo)?, forward",
    ),
    Mistake(
        name="mtp: the gradient of a QK-norm is not summed",
        file="core/parallel/sharding.py",
        old='partial = ParallelMode.WEIGHT if self.mode == "isp" else ParallelMode.TENSOR\n',
        new='partial = ParallelMode.WEIGHT if self.mode == "isp" else None\n',
        verify=MTP,
        config="configs/debug/qwen3.py",
        module=r"layers.\d.attention.qk_norm, gradients",
        says="not summed over tensor",
    ),
    Mistake(
        name="mtp: a QK-norm over all heads is over those of a rank",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(sums, self.group)",
        new="return sums",
        verify=MTP,
        config="configs/debug/olmo2.py",
        module="layers.0.attention.qk_norm, forward",
    ),
    Mistake(
        name="mtp: the gradient of a QK-norm over all heads lacks the sums of other ranks",
        file="core/parallel/qk_norm.py",
        old="means = _per_token(_mean_over_heads(sums, norm))",
        new="means = _per_token(sums / sums.new_tensor(norm.counts))",
        verify=MTP,
        config="configs/debug/olmo2.py",
        module=r"layers.\d.attention.qk_norm, backward",
    ),
    Mistake(
        name="mtp: an adapter is a plain product, whose parts are not summed",
        file="core/parallel/lora.py",
        old="low = self.lora_a(x, before)  # [T, r]",
        new="low = torch.nn.functional.linear(before(x) if before else x, self.lora_a.weight)",
        verify=(*MTP, LORA),
        module=r"layers.\d.(attention.wo|feed_forward.w2).lora_[ab], gradients",
    ),
    # -- sequence parallelism
    Mistake(
        name="msp: the gradient of an adapter that every rank holds is not summed",
        file="core/parallel/sharding.py",
        old="replace(self.replicated(shape, init), is_matrix=True, is_hidden=True)",
        new="replace(self.replicated(shape, init), is_matrix=True, is_hidden=True, partial_over=None)",
        verify=(*MSP, LORA),
        module=r"layers.\d.(attention.wo|feed_forward.w2).lora_b, gradients",
        says="not summed over tensor",
    ),
    Mistake(
        name="msp: the tokens of a row's output come back in reverse order of the ranks",
        file="core/parallel/tensor_parallel.py",
        old="return reduce_scatter(y, self.group)",
        new="return reduce_scatter(torch.cat(y.chunk(self.group.size)[::-1]), self.group)",
        verify=MSP,
        module="layers.0.attention.wo, forward",
        says="slices",
    ),
    Mistake(
        name="msp: the gradient of a column's input is sliced, not summed",
        file="core/parallel/tensor_parallel.py",
        old="        return begin_reduce_scatter(dx, self.group)\n\n\nclass MspColumn",
        new="        return Pending(dx.chunk(self.group.size)[self.group.rank].contiguous())\n\n\nclass MspColumn",
        verify=FSP,
        module=r"layers.\d.feed_forward.w13, backward",
    ),
    Mistake(
        name="msp: norm gradients are summed over the replicas, not over the tensor ranks",
        file="solver/optimizer/grad_reduce.py",
        old="self._pending = [begin_all_reduce(self._shard, self.process_groups.of_partial(mode))]",
        new="self._pending = [begin_all_reduce(self._shard, self.process_groups.replica)]",
        verify=("world=4", *MSP[1:], "zero1.size=1"),
        module=r"(norm|layers.\d.\w+_norm), gradients",
    ),
    Mistake(
        name="msp: every tensor rank drops as the first tokens do",
        file="core/parallel/dropout.py",
        old="first = 0 if own == self.tokens else key.tensor_rank * own",
        new="first = 0",
        verify=(*MSP, DROPOUT),
        module="the model, forward",
    ),
    Mistake(
        name="isp: the gradient of attention is off by the size of the group",
        file="core/parallel/isp.py",
        old="            return all_to_all(slices, self.group).flatten(0, 1)",
        new="            return all_to_all(slices, self.group).flatten(0, 1) / self.group.size",
        verify=ISP,
        module=r"layers.\d.attention(.wo)?, backward",
    ),
    Mistake(
        name="isp: copies of kv heads go to the ranks of other query heads",
        file="core/parallel/isp.py",
        old="return torch.cat([queries, keys_values], 3).flatten(1, 2)",
        new="return torch.cat([queries, keys_values], 3).transpose(1, 2).flatten(1, 2)",
        verify=("world=4", "tensor.size=4", "tensor.mode=isp", "weight.size=2", "model.num_kv_attention_heads=2"),
        module="layers.0.attention(.wo)?, forward",
    ),
    Mistake(
        name="isp: the window counts the tokens of a rank",
        file="model/blocks.py",
        old="self.scale, self.window = c.attention_scale, c.window(layer)",
        new=(
            "from internlm.core.parallel.sharding import current_sharding\n\n"
            "        self.scale, self.window = c.attention_scale, c.window(layer)\n"
            "        self.window = self.window and self.window // current_sharding().tensor.size"
        ),
        verify=ISP,
        config="configs/debug/mistral.py",
        module="layers.0.attention(.wo)?, forward",
    ),
    Mistake(
        name="isp: every rank has the labels of the first shard",
        file="data/loader.py",
        old='return {**split, "cu_seqlens": cu_seqlens}, local(labels)',
        new='return {**split, "cu_seqlens": cu_seqlens}, labels.view(rows, -1).chunk(sequence_shard.size, 1)[0]',
        verify=ISP,
        module="the batch, batch",
    ),
    Mistake(
        name="isp: gradients of weights are averaged over the weight group",
        file="core/parallel/weight_gatherer.py",
        old="            return deliver(pending.wait())",
        new="            return deliver(pending.wait().div_(self.group.size))",
        verify=ISP,
        module="output, gradients",
        says="averaged|multiplied by 0.5",
    ),
    Mistake(
        name="isp: the gradient of a micro-batch overwrites that of the one before",
        file="core/parallel/param_state.py",
        old="    _add(parameter, target, grad.view_as(target))\n",
        new="    begin_accumulation(parameter)\n    target.copy_(grad.view_as(target))\n",
        verify=ISP,
        module="output, gradients",
        says="lacks micro-batch 0",
    ),
)
