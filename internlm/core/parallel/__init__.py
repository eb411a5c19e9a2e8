"""Parallel layers, their communicators, and the placement of each parameter."""

from internlm.core.parallel.communicator import Communicator as Communicator
from internlm.core.parallel.layers import ParallelEmbedding as ParallelEmbedding
from internlm.core.parallel.layers import ParallelHead as ParallelHead
from internlm.core.parallel.layers import ParallelNorm as ParallelNorm
from internlm.core.parallel.linear import ParallelLinear as ParallelLinear
from internlm.core.parallel.param_state import place as place
from internlm.core.parallel.param_state import placement_of as placement_of
from internlm.core.parallel.placement import ParamPlacement as ParamPlacement
from internlm.core.parallel.sharding import StageLayers as StageLayers
from internlm.core.parallel.sharding import current_stage_layers as current_stage_layers
from internlm.core.parallel.sharding import place_replicated as place_replicated
