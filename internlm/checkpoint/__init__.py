"""Checkpoints that are written by all ranks, and can be loaded by a run with a different parallel layout."""

from internlm.checkpoint.manager import CheckpointManager as CheckpointManager
from internlm.checkpoint.manager import load_weights as load_weights
