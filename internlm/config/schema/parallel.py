"""The ``parallel`` section: distribution of data, layers and weights over ranks."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.fields import Count, Positive, Section

TensorMode = Literal["mtp", "msp", "fsp", "isp"]
PipelineMode = Literal["1F1B", "ZBH1", "ZBV", "GPIPE"]
PartitionRule = Literal["uniform", "parameters", "flops"]
LaunchPlace = Literal["wqkv", "attn", "wo", "w1"]


class Zero1Config(Section):
    """Sharding of the optimizer state (ZeRO stage 1, arXiv 1910.02054)."""

    size: int = -1
    """Number of ranks over which the optimizer state is sharded. 0 or less: the whole data group (under isp, the
    weight-data group); 1: no sharding; k: sub-groups of k consecutive ranks, where k must divide the group size."""
    fsdp: bool = False
    """Shard parameters and gradients too, with PyTorch's ``fully_shard``, which has its own buckets and overlap: the
    bucket and overlap keys of ``hybrid_zero_optimizer`` then have no effect."""


class TensorConfig(Section):
    """Splitting of each layer over a tensor group."""

    size: Count = 1
    """Number of ranks in a tensor group."""
    mode: TensorMode = "mtp"
    """Tensor-parallel mode. ``mtp``: Megatron tensor parallelism (arXiv 1909.08053). ``msp``: with sequence parallelism
    (arXiv 2205.05198). ``fsp``: as msp, but the backward pass gathers the input again instead of saving it. ``isp``:
    sequence-parallel activations with sharded weights (arXiv 2401.09149)."""


class PipelineConfig(Section):
    """Splitting of the model's layers into pipeline stages."""

    size: Count = 1
    """Number of pipeline stages."""
    interleaved_overlap: bool = False
    """Overlap sends and receives with compute in the interleaved schedule; all other schedules always do."""
    mode: PipelineMode = "1F1B"
    """Schedule: ``1F1B`` (interleaved where ``model.num_chunks`` > 1, arXiv 2104.04473), zero-bubble ``ZBH1`` or
    ``ZBV`` (arXiv 2401.10241), or ``GPIPE`` (arXiv 1811.06965)."""
    partition: PartitionRule | tuple[int, ...] = "uniform"
    """Assignment of layers to the size · ``model.num_chunks`` virtual stages: ``uniform``, ``parameters`` or
    ``flops`` (minimise the largest stage, with embedding and head counted), or explicit layer counts in the order of
    the model."""
    table: str | None = None
    """Path of a CSV file with a custom schedule; ``internlm schedule --csv`` checks and draws it. ``mode`` still
    decides how layers are laid out on ranks (ZBV: in a V)."""


class WeightConfig(Section):
    """Sharding of weights under isp, and its overlap with compute."""

    size: Count = 1
    """Number of ranks over which each weight is sharded. More than 1 needs ``parallel.tensor.mode = "isp"``."""
    overlap: bool = False
    """Prefetch: all-gather the next weights while the current ones are in use."""
    memory_pool: bool = False
    """All-gather into a fixed set of buffers instead of allocating memory for every all-gather."""
    # Late enough to hold the weights of two blocks only briefly, early enough to hide the all-gather behind the MLP.
    launch_allgather_before: LaunchPlace = "wo"
    """Module of a block before which the all-gather of the next block is launched."""
    forward_overlap_per: Literal["layer", "module"] = "layer"
    """Unit of prefetching in the forward pass: a block (``layer``) or one linear (``module``)."""


class ExpertConfig(Section):
    """Distribution of experts over ranks."""

    size: int = -1
    """Number of ranks over which the experts are distributed. −1: min(data · tensor, ``model.num_experts``)."""
    no_tp: bool = False
    """Do not split experts over the tensor group."""


class PlacementStrategy(Section):
    """Order of the ranks of a two-dimensional sequence group."""

    head_first: bool = True
    """True: consecutive ranks form the groups that split the heads. False: those that split the context."""
    interleaved: bool = False
    """Interleave the ranks of the context groups."""


class Sequence2DConfig(Section):
    """Attention split over heads and context at once."""

    enable: bool = False
    """Enable two-dimensional sequence parallelism."""
    head_size: Count = 1
    """Number of ranks that split the heads. head_size · context_size must equal ``parallel.tensor.size``."""
    context_size: Count = 1
    """Number of ranks that split the context."""
    window_size: Count = 1
    """Number of ranks in an inner ring of a context group."""
    device_placement_strategy: PlacementStrategy = PlacementStrategy()
    """Order of the ranks."""


class ParallelConfig(Section):
    """Sizes of parallel groups: world = data · pipeline · tensor; under isp also weight-data · pipeline · weight."""

    zero1: Zero1Config = Zero1Config()
    """Sharding of the optimizer state."""
    tensor: TensorConfig = TensorConfig()
    """Splitting of each layer over a tensor group."""
    pipeline: PipelineConfig = PipelineConfig()
    """Splitting of the layers into pipeline stages."""
    weight: WeightConfig = WeightConfig()
    """Sharding of weights; needs isp."""
    expert: ExpertConfig = ExpertConfig()
    """Distribution of experts."""
    expert_weight: WeightConfig = WeightConfig()
    """Sharding of the weights of experts; needs isp."""
    # Not much shorter: the first step may compile and read data for minutes.
    timeout: Positive = 1800.0
    """Timeout of process groups in seconds. The run ends if a rank does not join a collective within this time."""
    sequence_2D: Sequence2DConfig = Sequence2DConfig()  # noqa: N815 (the key's name in users' configs)
    """Two-dimensional sequence parallelism; needs isp."""
