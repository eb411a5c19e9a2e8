"""Symbols of the cost formulas for traffic, memory and activations.

==========  =========================================================================================================
t, w        ranks of the tensor group and of the weight group (w is 1 except under isp)
p           stages of the pipeline; all symbols below describe one stage
z, r        ranks that shard one optimizer state (the zero group), and replicas of that state
d           ranks whose labels make up the global batch: the data group, under isp all ranks of the stage
T           tokens of a packed row, ``data.packed_length``; if the sequence is split, each of t ranks has T/t of them
S           tokens of the row that a rank holds between the layers: T under mtp, T/t under msp, fsp and isp
K           tokens that take part in the loss, out of the T tokens (under isp, T/t) whose labels the rank has
L, R        layers of a chunk, and how many of them are recomputed (``model.checkpoint``)
H, F, V     hidden size, intermediate size, vocabulary size
G, Q, D     kv heads, query heads per kv head, head dimension
e           bytes of an element of parameters and activations
x           bytes of an element of the residual stream: g with ``model.residual_in_fp32``, else e
g           bytes of an element of a tensor that holds sums, such as gradients, logits and statistics (at least 4)
B           elements of a bucket of the optimizer, padding included
N, n        elements of a param group's flat buffer, padding included, and how many of them the rank owns
U           elements of an FSDP unit (a block, or the root: all that lies outside of blocks), padding included
a, c        bytes of a gradient element as it is accumulated (g, or e without ``fp32_grad_accum``), and as it is
            reduced (``reduce_comm_dtype``; without it, a)
==========  =========================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.accelerator import HOST, kind_of
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.context.parallel_context import sizes_of
from internlm.core.parallel.sharding import StageLayers, TensorMode
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import schedule_of, stage_layout_of
from internlm.costs.stages import stage_layers_of
from internlm.model.families import FAMILIES, spec_of
from internlm.model.spec import DecoderSpec
from internlm.utils.dtype import torch_dtype, wide
from internlm.utils.errors import Problem, UserError


class NoCostFormulaError(UserError):
    """Error for a model without a cost formula; only the built-in decoder has one."""

    same_on_all_ranks = True

    def __init__(self, model_type: str, reason: str, todo: str = "") -> None:
        measure = "Run train.py --profiling to measure your own model instead"
        super().__init__(
            Problem("model_type", f"no cost formula for {model_type!r}, {reason}", f"{todo} {measure}".lstrip())
        )


@dataclass(frozen=True, kw_only=True)
class GroupSymbols:
    """Symbols of the parallel groups, which are defined for any model.

    The groups have a size, but no process-group handle.
    """

    config: Config
    # Formulas need only the sizes of groups, so the costs of a large layout are computed in one process.
    t: Group
    w: Group
    p: Group
    z: Group
    r: Group
    d: Group

    @property
    def mode(self) -> TensorMode:
        """Tensor-parallel mode."""
        return self.config.parallel.tensor.mode

    @property
    def shares_parameters(self) -> bool:
        """Whether parameters and gradients are sharded like optimizer states (ZeRO-3, ``parallel.zero1.fsdp``)."""
        return self.config.parallel.zero1.fsdp and self.z.size > 1

    @property
    def split(self) -> Group:
        """Group over which weights are split."""
        return self.w if self.mode == "isp" else self.t


def group_symbols(config: Config, world_size: int) -> GroupSymbols:
    """Return the symbols of the parallel groups for a resolved ``config`` on ``world_size`` ranks."""
    sizes = sizes_of(config, world_size)
    ranks_of_stage = world_size // sizes.pipeline
    return GroupSymbols(
        config=config,
        t=Group(ParallelMode.TENSOR, size=sizes.tensor),
        w=Group(ParallelMode.WEIGHT, size=sizes.weight),
        p=Group(ParallelMode.PIPELINE, size=sizes.pipeline),
        z=Group(ParallelMode.ZERO1, size=sizes.zero),
        r=Group(ParallelMode.ZERO1_REPLICA, size=sizes.zero_parent // sizes.zero),
        # Under isp every rank of the weight group has tokens of its own, so all ranks of a stage contribute labels.
        d=Group(ParallelMode.ISP_DATA, size=ranks_of_stage) if sizes.isp else Group(ParallelMode.DATA, size=sizes.data),
    )


@dataclass(frozen=True, kw_only=True)
class Symbols(GroupSymbols):
    """Values of all symbols of the cost formulas, for one pipeline stage of a decoder."""

    spec: DecoderSpec
    stage: int
    stage_layout: StageLayout
    stage_layers: StageLayers  # layers of this stage, chunk by chunk
    on_host: bool  # whether the device is the CPU, whose attention kernels and loss save other tensors
    T: int
    S: int
    H: int
    F: int
    V: int
    G: int
    Q: int
    D: int
    e: int
    x: int
    g: int

    @classmethod
    def of(
        cls,
        config: Config,
        world_size: int,
        stage: int = 0,
        spec: DecoderSpec | None = None,
        device_type: str = HOST.type,
    ) -> Symbols:
        """Return the symbols of ``stage`` for a resolved ``config`` on ``world_size`` ranks.

        Args:
            config: Resolved config.
            world_size: Number of ranks of the run.
            stage: Pipeline stage.
            spec: Spec of the decoder; by default the spec of the family ``config.model_type``.
            device_type: Type of the device.

        Raises:
            NoCostFormulaError: ``spec`` is not given and ``config.model_type`` is not a built-in family.
        """
        model = config.model
        if spec is None and config.model_type not in FAMILIES:
            raise NoCostFormulaError(config.model_type, f"which is not a built-in family ({', '.join(FAMILIES)})")
        assert model.dtype is not None, "the resolver fills model.dtype"
        dtype, groups, tokens = torch_dtype(model.dtype), group_symbols(config, world_size), config.data.packed_length
        return cls(
            **vars(groups),
            spec=spec or spec_of(FAMILIES[config.model_type], model),
            stage=stage,
            stage_layout=stage_layout_of(
                schedule_of(config.parallel.pipeline.mode, model.num_chunks), groups.p.size, model.num_chunks
            ),
            stage_layers=stage_layers_of(config, stage),
            on_host=kind_of(device_type).is_host,
            T=tokens,
            # Sequence parallelism (msp, fsp, isp) splits the tokens between the layers, mtp keeps them whole.
            S=tokens if groups.mode == "mtp" else tokens // groups.t.size,
            H=model.hidden_size,
            F=model.intermediate_size,
            V=model.vocab_size,
            G=model.kv_heads,
            Q=model.num_attention_heads // model.kv_heads,
            D=model.head_size,
            e=dtype.itemsize,
            x=(wide(dtype) if model.residual_in_fp32 else dtype).itemsize,
            g=wide(dtype).itemsize,
        )

    @property
    def trains_base(self) -> bool:
        """Whether all weights are trained, rather than adapters alone (``model.lora``)."""
        return self.config.model.lora is None

    @property
    def chunks(self) -> range:
        """Indices of the stage's chunks."""
        return range(len(self.stage_layers.chunks))

    @property
    def layers(self) -> int:
        """Number of layers of the stage."""
        return sum(map(len, self.stage_layers.chunks))

    def recomputed(self, chunk: int) -> int:
        """Return R, the number of layers of ``chunk`` whose forward pass is recomputed in backward."""
        return sum(map(self.config.model.recomputes, self.stage_layers.chunks[chunk]))


def rows_per_rank(rows: int, group: Group) -> int:
    """Return the number of rows on each rank of ``group``, after padding ``rows`` to equal shards."""
    return -(-rows // group.size)
