"""The ``parallel`` section: distribution of data, layers and weights over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from internlm.config.schema.fields import Count, Items, PathText, Positive, Section

TensorMode = Literal["mtp", "msp", "fsp", "isp"]
PipelineMode = Literal["1F1B", "ZBH1", "ZBV", "GPIPE"]
PartitionRule = Literal["uniform", "parameters", "flops"]
LaunchPlace = Literal["wqkv", "attn", "wo", "w1"]


class Zero1Config(Section):
    """Settings for sharding the optimizer state (ZeRO stage 1, arXiv 1910.02054)."""

    size: int = -1
    """Number of ranks over which the optimizer state is sharded. 0 or less: the whole data group (under isp, the
    weight-data group); 1: no sharding; k: sub-groups of k consecutive ranks, where k must divide the group size."""
    fsdp: bool = False
    """Shard parameters and gradients too, with PyTorch's ``fully_shard``, which has its own buckets and overlap: the
    bucket and overlap keys of ``hybrid_zero_optimizer`` then have no effect."""


class TensorConfig(Section):
    """Settings of tensor parallelism, which splits each layer over a group of ranks."""

    size: Count = 1
    """Number of ranks in a tensor group."""
    mode: TensorMode = "mtp"
    """Tensor-parallel mode. ``mtp``: Megatron tensor parallelism (arXiv 1909.08053). ``msp``: mtp with sequence
    parallelism (arXiv 2205.05198). ``fsp``: like msp, but each rank saves only its shard of each input and
    gathers the whole input again in the backward pass. ``isp``: sequence-parallel activations with sharded weights
    (arXiv 2401.09149)."""


class PipelineConfig(Section):
    """Settings of pipeline parallelism, which splits the layers of the model into stages."""

    size: Count = 1
    """Number of pipeline stages."""
    interleaved_overlap: bool = False
    """Overlap sends and receives with compute in the interleaved schedule; all other schedules always overlap them."""
    mode: PipelineMode = "1F1B"
    """Schedule: ``1F1B`` (interleaved if ``model.num_chunks`` > 1, arXiv 2104.04473), zero-bubble ``ZBH1`` or
    ``ZBV`` (arXiv 2401.10241), or ``GPIPE`` (arXiv 1811.06965)."""
    partition: PartitionRule | Items[int] = "uniform"
    """Assignment of layers to the ``size`` · ``model.num_chunks`` virtual stages: ``uniform``, ``parameters`` or
    ``flops`` (minimise the largest stage, with embedding and head counted), or explicit layer counts in the order of
    the model."""
    table: PathText | None = None
    """Path of a CSV file with a custom schedule; ``internlm schedule --csv`` checks and draws it. ``mode`` still
    determines which virtual stages each rank holds."""


def round_size_of(pipeline: PipelineConfig, num_chunks: int) -> int:
    """Return the number that the micro-batches of a step must be a multiple of.

    The interleaved schedule (arXiv 2104.04473, section 2.2) works in rounds of one micro-batch per stage.
    """
    return pipeline.size if num_chunks > 1 and pipeline.mode == "1F1B" else 1


class WeightConfig(Section):
    """Settings for sharding weights under isp, and for overlapping their all-gathers with compute."""

    size: Count = 1
    """Number of ranks over which each weight is sharded. More than 1 needs ``parallel.tensor.mode = "isp"``."""
    overlap: bool = False
    """Prefetch: all-gather the next weights while the current ones are in use."""
    memory_pool: bool = False
    """All-gather into a fixed set of buffers instead of allocating memory for every all-gather."""
    # Late enough to hold the weights of two blocks only briefly, early enough to hide the all-gather behind the MLP.
    launch_allgather_before: LaunchPlace = "wo"
    """Module of the current block before which the all-gather of the next block's weights is launched."""
    forward_overlap_per: Literal["layer", "module"] = "layer"
    """Unit of prefetching in the forward pass: a whole block (``layer``) or a single linear layer (``module``)."""


class ExpertConfig(Section):
    """Settings of expert parallelism, which distributes experts over ranks."""

    size: int = -1
    """Number of ranks over which the experts are distributed. −1: ``model.num_experts``, but at most
    the product of the data-parallel and tensor-parallel sizes."""
    no_tp: bool = False
    """Do not split experts over the tensor group."""


class PlacementStrategy(Section):
    """Settings for the order of ranks in two-dimensional sequence parallelism."""

    head_first: bool = True
    """True: consecutive ranks split the heads. False: consecutive ranks split the context."""
    interleaved: bool = False
    """Interleave the ranks of the context groups."""


class Sequence2DConfig(Section):
    """Settings of two-dimensional sequence parallelism, which splits attention over heads and context; needs isp."""

    enable: bool = False
    """Enable two-dimensional sequence parallelism."""
    head_size: Count = 1
    """Number of ranks that split the heads. head_size · context_size must equal ``parallel.tensor.size``."""
    context_size: Count = 1
    """Number of ranks that split the context."""
    window_size: Count = 1
    """Number of ranks per inner ring of double-ring attention in a context group (LoongTrain, arXiv 2406.18485)."""
    device_placement_strategy: PlacementStrategy = PlacementStrategy()
    """Settings for the order of ranks in two-dimensional sequence parallelism."""


class ElasticLayout(Section):
    """Entry of ``parallel.elastic``: the layout of a job that has been started with certain numbers of processes."""

    worlds: Annotated[Items[Count], Field(min_length=1)]
    """Numbers of processes."""
    layout: dict[str, int | str | bool]
    """Values of keys in ``parallel`` for these numbers, such as ``{"tensor.size": 2}``."""


class ParallelConfig(Section):
    """Settings of parallelism. World size = data · pipeline · tensor; isp: also = weight-data · pipeline · weight."""

    zero1: Zero1Config = Zero1Config()
    """Settings for sharding the optimizer state (ZeRO stage 1, arXiv 1910.02054)."""
    tensor: TensorConfig = TensorConfig()
    """Settings of tensor parallelism, which splits each layer over a group of ranks."""
    pipeline: PipelineConfig = PipelineConfig()
    """Settings of pipeline parallelism, which splits the layers of the model into stages."""
    weight: WeightConfig = WeightConfig()
    """Settings for sharding weights under isp, and for overlapping their all-gathers with compute."""
    expert: ExpertConfig = ExpertConfig()
    """Settings of expert parallelism, which distributes experts over ranks."""
    expert_weight: WeightConfig = WeightConfig()
    """Settings for sharding expert weights; needs isp."""
    elastic: Items[ElasticLayout] = ()
    """Layouts by the number of processes, for jobs that are restarted with fewer or more of them. The first entry that
    names the number applies; without one, the other keys do, and the data-parallel size follows."""
    # Not much shorter: the first step may compile and read data for minutes.
    timeout: Positive = 1800.0
    """Timeout of process groups in seconds. The run ends if a rank does not join a collective within this time."""
    sequence_2D: Sequence2DConfig = Sequence2DConfig()  # noqa: N815 (the key's name in users' configs)
    """Settings of two-dimensional sequence parallelism, which splits attention over heads and context; needs isp."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between the linears are split along the sequence, by its older name."""
        return self.tensor.mode != "mtp"
