"""Checkpoints: logical tensors written by all ranks, complete once the commit mark exists."""

from internlm.checkpoint.manager import CheckpointManager as CheckpointManager
from internlm.checkpoint.manager import load_weights as load_weights
