"""Checkpoints: logical tensors, written by every rank, complete only once their commit mark is there."""

from internlm.checkpoint.manager import CheckpointManager as CheckpointManager
