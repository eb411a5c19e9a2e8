"""``parallel``: how many processes share what."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.fields import Count, Positive, Section


class Zero1Config(Section):
    """``parallel.zero1``: sharding of the optimizer state (ZeRO-1.5)."""

    size: int = -1
    """Ranks that share one copy of the optimizer state. At most 0: the whole data group (weight-data group under isp);
    1: off; k: a subgroup of k consecutive ranks, which must divide that group."""
    fsdp: bool = False
    """Share parameters and gradients too, with PyTorch's ``fully_shard``. Buckets, and what overlaps with them, are
    then its own: all keys of ``hybrid_zero_optimizer`` about them are without effect."""


class TensorConfig(Section):
    """``parallel.tensor``: splitting of each layer."""

    size: Count = 1
    """Ranks that share one layer."""
    mode: Literal["mtp", "msp", "fsp", "isp"] = "mtp"
    """mtp: tensor parallel; msp, fsp: with sequence parallel; isp: sequence plus weight parallel."""


class PipelineConfig(Section):
    """``parallel.pipeline``: splitting of the model by layers."""

    size: Count = 1
    """Stages."""
    interleaved_overlap: bool = False
    """Let transfers run under compute in the interleaved schedule, as they do in the others."""
    mode: Literal["1F1B", "ZBH1", "ZBV", "GPIPE"] = "1F1B"
    """Schedule. Interleaved 1F1B is meant when ``model.num_chunks > 1``."""
    partition: Literal["uniform", "parameters", "flops"] | tuple[int, ...] = "uniform"
    """Which layers a part of the model gets: equally many; such that the largest part has as few parameters, or as few
    operations, as can be, embedding and head included; or how many, part by part in the order of the model. There are
    size · ``model.num_chunks`` parts."""
    table: str | None = None
    """A CSV file with a schedule of your own, that ``internlm schedule`` can check; the mode says how the model is cut
    for it (ZBV: in a V)."""


class WeightConfig(Section):
    """``parallel.weight`` and ``parallel.expert_weight``: weight parallelism of isp."""

    size: Count = 1
    """Ranks that share one weight."""
    overlap: bool = False
    """Prefetch the next weight while this one is used."""
    memory_pool: bool = False
    """Gather into a fixed set of buffers instead of allocating."""
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = "wo"
    """The module before which the gather of the next layer starts."""
    forward_overlap_per: Literal["layer", "module"] = "layer"
    """Prefetch a whole layer or one module ahead."""


class ExpertConfig(Section):
    """``parallel.expert``: distribution of experts."""

    size: int = -1
    """Ranks that share one set of experts. −1: as many as data, tensor and ``model.num_experts`` allow."""
    no_tp: bool = False
    """Leave experts whole where other layers are tensor parallel."""


class PlacementStrategy(Section):
    """``parallel.sequence_2D.device_placement_strategy``."""

    head_first: bool = True
    """Neighbouring ranks share heads rather than context."""
    interleaved: bool = False
    """Interleave context ranks."""


class Sequence2DConfig(Section):
    """``parallel.sequence_2D``: attention split over heads and context at once."""

    enable: bool = False
    """Switch."""
    head_size: Count = 1
    """Ranks over heads; head_size · context_size == tensor.size."""
    context_size: Count = 1
    """Ranks over context."""
    window_size: Count = 1
    """Ranks in one inner ring."""
    device_placement_strategy: PlacementStrategy = PlacementStrategy()
    """Which ranks lie next to one another."""


class ParallelConfig(Section):
    """``parallel``: world = data · pipeline · tensor; under isp also weight-data · pipeline · weight."""

    zero1: Zero1Config = Zero1Config()
    """Sharding of the optimizer state."""
    tensor: TensorConfig = TensorConfig()
    """Splitting of each layer."""
    pipeline: PipelineConfig = PipelineConfig()
    """Splitting by layers."""
    weight: WeightConfig = WeightConfig()
    """Weight parallelism; a size over 1 only under isp."""
    expert: ExpertConfig = ExpertConfig()
    """Distribution of experts."""
    expert_weight: WeightConfig = WeightConfig()
    """Weight parallelism of experts; only under isp."""
    timeout: Positive = 1800.0
    """Seconds that a rank waits for another before it takes it for lost."""
    sequence_2D: Sequence2DConfig = Sequence2DConfig()  # noqa: N815 (the key's name in users' configs)
    """Two-dimensional sequence parallelism; only under isp."""
