"""The ways in which ranks form groups."""

from __future__ import annotations

from enum import Enum


class ParallelMode(Enum):
    """A family of process groups; each rank is in exactly one group of each mode."""

    GLOBAL = "global"  # every rank
    DATA = "data"  # different samples
    MODEL = "model"  # one copy of the model: tensor x pipeline
    PIPELINE = "pipeline"  # different layers
    TENSOR = "tensor"  # different slices of a layer, or of the sequence
    ZERO1 = "zero1"  # different shards of one optimizer state
    ZERO1_REPLICA = "zero1_replica"  # the same shard of the optimizer state
    WEIGHT = "weight"  # isp: different shards of one weight
    WEIGHT_DATA = "weight_data"  # isp: the same shard of a weight, different data
    ISP_DATA = "isp_data"  # isp: different tokens, of the same samples or of others
    EXPERT = "expert"  # different experts
    EXPERT_DATA = "expert_data"  # the same experts, different data
    EXPERT_TENSOR = "expert_tensor"  # different slices of an expert
