"""The symbols in the formulas of traffic and memory, from the config alone.

==========  =========================================================================================================
t, w        ranks of the tensor group and of the weight group (w is 1 but under isp)
p           stages of the pipeline; what follows is that of one stage
z, r        ranks that share one optimizer state, and copies of that state (replicas)
d           ranks whose labels make up the global batch: those of the data group, under isp all of the stage
T           tokens of a row on a data rank, ``data.packed_length``; where the sequence is split, t ranks share them
S           those of them that this rank has between the layers: T under mtp, T/t under msp, fsp and isp
H, F, V     hidden width, intermediate width, vocabulary
G, Q, D     kv heads, query heads per kv head, head width
e, g        bytes of a parameter or an activation; of a gradient, a logit or a statistic where they are summed up (4 at
            least)
==========  =========================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.context.parallel_context import sizes_of
from internlm.core.parallel.sharding import StageLayers
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import schedule_of, stage_layout_of
from internlm.costs.stages import stage_layers_of
from internlm.model.decoder import DecoderSpec
from internlm.model.families import FAMILIES, spec_of
from internlm.utils.dtype import torch_dtype, wide


@dataclass(frozen=True)
class Symbols:
    """The symbols at the top of this file; t, w, p, z, r and d as groups without handles."""

    config: Config
    spec: DecoderSpec
    stage: int
    stage_layout: StageLayout
    stage_layers: StageLayers  # of the stage
    t: Group
    w: Group
    p: Group
    z: Group
    r: Group
    d: Group
    T: int
    S: int
    H: int
    F: int
    V: int
    G: int
    Q: int
    D: int
    e: int
    g: int

    @classmethod
    def of(cls, config: Config, world_size: int, stage: int = 0) -> Symbols:
        """Those of a resolved ``config`` on ``world_size`` ranks, for those of ``stage``; raises KeyError where the
        model is none of ours."""
        model, sizes = config.model, sizes_of(config, world_size)
        assert model.dtype is not None, "the resolver fills model.dtype"
        dtype = torch_dtype(model.dtype)
        isp, ranks, tokens = sizes.isp, world_size // sizes.pipeline, config.data.packed_length
        return cls(
            config,
            spec_of(FAMILIES[config.model_type], model),
            stage,
            stage_layout_of(
                schedule_of(config.parallel.pipeline.mode, model.num_chunks), sizes.pipeline, model.num_chunks
            ),
            stage_layers_of(config, stage),
            t=Group(ParallelMode.TENSOR, size=sizes.tensor),
            w=Group(ParallelMode.WEIGHT, size=sizes.weight),
            p=Group(ParallelMode.PIPELINE, size=sizes.pipeline),
            z=Group(ParallelMode.ZERO1, size=sizes.zero),
            r=Group(ParallelMode.ZERO1_REPLICA, size=sizes.zero_parent // sizes.zero),
            d=Group(ParallelMode.ISP_DATA, size=ranks) if isp else Group(ParallelMode.DATA, size=sizes.data),
            T=tokens,
            S=tokens if config.parallel.tensor.mode == "mtp" else tokens // sizes.tensor,
            H=model.hidden_size,
            F=model.intermediate_size,
            V=model.vocab_size,
            G=model.kv_heads,
            Q=model.num_attention_heads // model.kv_heads,
            D=model.head_size,
            e=dtype.itemsize,
            g=wide(dtype).itemsize,
        )

    @property
    def mode(self) -> str:
        """The parallel mode."""
        return self.config.parallel.tensor.mode

    @property
    def shares_parameters(self) -> bool:
        """Whether the z ranks share parameters and gradients too."""
        return self.config.parallel.zero1.fsdp and self.z.size > 1

    @property
    def split(self) -> Group:
        """The group over which weights are split."""
        return self.w if self.mode == "isp" else self.t

    @property
    def chunks(self) -> range:
        """Numbers of the stage's chunks."""
        return range(len(self.stage_layers.chunks))

    @property
    def layers(self) -> int:
        """Layers of the stage."""
        return sum(map(len, self.stage_layers.chunks))

    def recomputed(self, chunk: int) -> int:
        """Layers of a chunk that are run again in backward."""
        return sum(map(self.config.model.recomputes, self.stage_layers.chunks[chunk]))
