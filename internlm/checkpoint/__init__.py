"""Checkpoints of logical tensors, written by all ranks and complete once the commit mark exists."""

from internlm.checkpoint.manager import CheckpointManager as CheckpointManager
from internlm.checkpoint.manager import load_weights as load_weights
