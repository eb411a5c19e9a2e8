"""Formulas of the communication traffic of a step: scalars, micro-batches, and the optimizer's collectives.

The optimizer's collectives are those of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). Stages 1 and 2 reduce-scatter
gradients and all-gather parameters, per bucket of a flat buffer (section 5.2). Stage 3 gathers each FSDP unit before
use (section 5.3, ``parallel.zero1.fsdp``). Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from internlm.accelerator import HOST
from internlm.core.parallel.ledger import Traffic
from internlm.costs.flops import attention_has_grad
from internlm.costs.param_shards import FlatBuffer, ParamInventory, ParamShard, partial_sum_group, reduced_itemsize
from internlm.costs.symbols import GroupSymbols, Symbols
from internlm.costs.traffic_model import (
    AG,
    AR,
    RS,
    Call,
    PassCalls,
    block,
    calls_on,
    count_calls,
    embedding,
    head,
    heads_to_tokens,
    loss,
    merge,
    positions,
)
from internlm.solver.optimizer.flat_buffers import Bucket
from internlm.solver.optimizer.param_groups import ParamGroupKey
from internlm.utils.dtype import torch_dtype, wide


def expected_traffic(
    inventory: ParamInventory,
    tokens: Sequence[int] | None = None,
    *,
    types: int = 1,
    device_type: str = HOST.type,
    forward_only: bool = False,
    zero_rank: int = 0,
) -> Traffic:
    """Return the traffic that a rank's ledger must hold after one step of the decoder, skipped or not.

    Args:
        inventory: Parameters of the rank's pipeline stage.
        tokens: Number of tokens in the loss, K, of each micro-batch: on the CPU those whose label is not ignored,
            elsewhere all. By default all tokens of ``micro_num`` micro-batches.
        types: Number of dataset types.
        device_type: Type of the device, which decides the chunk size of the loss.
        forward_only: Count a validation step instead of a training step.
        zero_rank: Rank within the zero group, which matters if each parameter has one owner.

    Raises:
        NoCostFormulaError: The model is not the built-in decoder.
    """
    s = inventory.symbols
    tokens = tokens if tokens is not None else [s.T] * s.config.data.micro_num
    calls = scalars(s, types, len(tokens))
    for count in tokens:
        passes = micro_batch(inventory, count, device_type)
        calls += passes.forward if forward_only else passes.forward + passes.backward
    return count_calls(calls if forward_only else calls + optimizer(inventory, zero_rank))


def scalars(s: GroupSymbols, types: int, micro_num: int) -> list[Call]:
    """Return the all-reduces of a step's scalars.

    They take 8 bytes over d for the number of valid tokens, and 4·types·8 bytes over d and then over p for loss,
    correct predictions, tokens and weighted loss by dataset type. An average by micro-batches takes 16 bytes over d,
    and first micro_num·8 bytes over the ranks that split a row of isp.
    """
    sums = 4 * types * 8
    if s.config.loss.average == "token":
        counts = calls_on(s.d, AR, 8)
    else:
        counts = (calls_on(s.t, AR, 8 * micro_num) if s.mode == "isp" else []) + calls_on(s.d, AR, 16)
    return counts + calls_on(s.d, AR, sums) + calls_on(s.p, AR, sums)


def micro_batch(inventory: ParamInventory, tokens: int, device_type: str) -> PassCalls:
    """Return the collectives of one micro-batch with K = ``tokens``, over all chunks and FSDP units of a stage."""
    s = inventory.symbols
    units = [fsdp_units(inventory)] if s.shares_parameters else []
    return merge(*units, *(_chunk(s, chunk, tokens, device_type) for chunk in s.chunks))


def _chunk(s: Symbols, chunk: int, tokens: int, device_type: str) -> PassCalls:
    """Return the collectives of a chunk in one micro-batch.

    The result covers positions, blocks and stage messages. For the first chunk of the model it also covers the
    embedding, and for the last chunk the head and the loss.
    """
    model, parts = s.config.model, [positions(s), _stage_messages(s, chunk)]
    for layer in s.stage_layers.chunks[chunk]:
        one = block(s, layer)
        # Recomputing a block repeats all products, and so all collectives, of its forward pass. Weight gradients that
        # the schedule defers (zero bubble) are sent later, but the traffic is the same.
        recomputed = one.forward if model.recomputes(layer) else []
        if s.spec.recomputes_attention and attention_has_grad(model, layer):
            recomputed = heads_to_tokens(s).forward
        parts.append(PassCalls(one.forward, one.backward + recomputed))
    if s.stage_layers.is_first(chunk):
        parts.append(embedding(s))
    if s.stage_layers.is_last(chunk):
        parts += head(s), PassCalls(loss(s, tokens, device_type), [])
    return merge(*parts)


def _stage_messages(s: Symbols, chunk: int) -> PassCalls:
    """Return the sends of a chunk in one micro-batch, to the next and the previous virtual stage.

    Hidden states are sent to the next virtual stage, gradients to the previous one; each takes S·H·x. Adjacent virtual
    stages on the same rank pass tensors in memory and send nothing.
    """

    def send_to(virtual: int) -> list[Call]:
        exists = 0 <= virtual < s.stage_layout.virtual_stages
        if not exists or s.stage_layout.rank_of(virtual) == s.stage:  # neighbours on one rank pass tensors in memory
            return []
        return [Call(s.p.mode, "send", s.S * s.H * s.x)]

    virtual = s.stage_layout.virtual(s.stage, chunk)
    return PassCalls(send_to(virtual + 1), send_to(virtual - 1))


# -- the optimizer


def optimizer(inventory: ParamInventory, zero_rank: int = 0) -> list[Call]:
    """Return the collectives of an optimizer step, for gradients, norm, Muon and parameters.

    1. Gradients, for each bucket: reduce-scatter over z of B·c, and all-reduce over r of (B/z)·c. Partial sums
       (``partial_over``) are all-reduced in (B/z)·g over t (isp: w), or, for a tied embedding, over the first and the
       last stage of the pipeline.
    2. Norm: all-reduces of 16 bytes over z, of 8 bytes over the group that splits weights, and of 8 bytes over p.
    3. Muon, for each matrix that this rank of z owns: all-gather of O·I·g over the group that splits weights.
    4. Parameters, for each bucket: all-gather over z of B·e.

    If each parameter has one owner, a reduce to and a broadcast from each owner replace the reduce-scatter and the
    all-gather. For an owner of m elements of the bucket, every other rank sends m·c in the reduce, and the owner sends
    m·e in the broadcast. In the all-reduces of gradients, the number of elements that this rank owns replaces B/z.

    FSDP units have no buckets: :func:`fsdp_units` returns their reduce-scatters and all-gathers, and the optimizer step
    has only the all-reduces of gradients and norm.
    """
    s = inventory.groups
    calls = calls_on(s.z, AR, 16) + calls_on(s.split, AR, 8) + calls_on(s.p, AR, 8)
    if s.shares_parameters:
        for key, shards in inventory.param_groups.items():
            calls += _fsdp_replica_sums(s, key, shards, zero_rank)
        return calls
    for key, buffer in inventory.flat_buffers.items():
        for bucket in buffer.layout.buckets:
            calls += _bucket(s, key, bucket, zero_rank)
        calls += _muon_gathers(s, key, buffer, zero_rank)
    return calls


def _bucket(s: GroupSymbols, key: ParamGroupKey, bucket: Bucket, zero_rank: int) -> list[Call]:
    """Return the collectives that reduce the gradients and gather the parameters of one bucket."""
    # Replicas sum the result of the reduce-scatter in its dtype. Partial sums of vectors are small, so they are sent in
    # g bytes per element.
    reduced, main = reduced_itemsize(s.config, key.dtype), wide(key.dtype).itemsize
    run = bucket.shard(zero_rank)
    owned = run.stop - run.start
    calls = calls_on(s.r, AR, owned * reduced) if owned else []
    if key.partial_over is not None and owned:
        calls += calls_on(partial_sum_group(s, key.partial_over), AR, owned * main)
    if bucket.is_even:
        numel = bucket.stop - bucket.start
        return [*calls, *calls_on(s.z, RS, numel * reduced), *calls_on(s.z, AG, numel * key.dtype.itemsize)]
    # Reduce-scatter and all-gather need equal shards; uneven ones are reduced to, and broadcast from, each owner.
    for owner in range(s.z.size):
        run = bucket.shard(owner)
        numel = run.stop - run.start
        if numel:
            is_owner = owner == zero_rank
            calls.append(Call(s.z.mode, "reduce", 0 if is_owner else numel * reduced))
            calls.append(Call(s.z.mode, "broadcast", numel * key.dtype.itemsize if is_owner else 0))
    return calls


def _muon_gathers(s: GroupSymbols, key: ParamGroupKey, buffer: FlatBuffer, zero_rank: int) -> list[Call]:
    """Return the all-gathers of split matrices, which Muon orthogonalises whole (Jordan et al. 2024)."""
    if not key.needs_matrices or key.split_over is None:
        return []
    itemsize = wide(key.dtype).itemsize
    matrices = [s.split.size * shard.numel * itemsize for shard in buffer.owned_by(zero_rank)]
    return [call for nbytes in matrices for call in calls_on(s.split, AG, nbytes)]


# -- parameters that the zero group shards


def fsdp_units(inventory: ParamInventory) -> PassCalls:
    """Return the collectives of all FSDP units of the decoder in one micro-batch.

    ========  =========================  =========================================================
    unit      forward                    backward
    ========  =========================  =========================================================
    a block   all-gather over z of U·e   all-gather over z of U·e; reduce-scatter over z of U·c
    the root  all-gather over z of U·e   reduce-scatter over z of U·c
    ========  =========================  =========================================================

    Frozen parameters are not counted in the reduce-scatter.
    """
    s, sizes = inventory.symbols, unit_sizes(inventory)
    reduced = reduced_itemsize(s.config, torch_dtype(str(s.config.model.dtype)))
    forward = [call for size in sizes.values() for call in calls_on(s.z, AG, size * s.e)]
    # The root stays gathered from forward to backward: its backward pass comes right after its forward pass.
    regathered = [call for unit, size in sizes.items() if unit for call in calls_on(s.z, AG, size * s.e)]
    trained = [size for size in unit_sizes(inventory, trained=True).values() if size]
    return PassCalls(forward, regathered + [call for size in trained for call in calls_on(s.z, RS, size * reduced)])


def unit_sizes(inventory: ParamInventory, *, trained: bool = False) -> dict[str, int]:
    """Return the number of elements, U, of each FSDP unit, by block name; the name of the root is empty.

    The rows of each parameter are padded to a multiple of z. With ``trained``, frozen parameters are not counted.
    """
    sizes: dict[str, int] = {}
    for shard in inventory.shards:
        counted = shard.trainable or not trained
        sizes[shard.block] = sizes.get(shard.block, 0) + counted * shard.padded_numel(inventory.groups.z)
    return sizes


def _fsdp_replica_sums(s: GroupSymbols, key: ParamGroupKey, shards: Iterable[ParamShard], zero_rank: int) -> list[Call]:
    """Return the all-reduces of gradients that FSDP units leave to the optimizer step.

    They take n·c over r, and n·g for partial sums (``partial_over``).
    """
    owned = sum(shard.owned_numel(s.z, zero_rank) for shard in shards)
    if not owned:
        return []
    main, reduced = wide(key.dtype).itemsize, s.config.reduce_comm_dtype
    calls = calls_on(s.r, AR, owned * (torch_dtype(reduced).itemsize if reduced else main))
    if key.partial_over is not None:
        calls += calls_on(partial_sum_group(s, key.partial_over), AR, owned * main)
    return calls
