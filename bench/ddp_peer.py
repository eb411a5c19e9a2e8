"""A training step by torch: our model under ``DistributedDataParallel``, clip_grad_norm_, fused AdamW."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.ours import Ours
from bench.yardsticks import Yardstick
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.collectives import all_reduce
from internlm.train import initialize_model


class Ddp(Ours):
    """Our model, data and loss, with torch's gradient reduction and optimizer."""

    def __init__(self, yardstick: Yardstick, rank: int, world: int, port: int) -> None:
        super().__init__(yardstick, rank=rank, world=world, port=port, data_size=world)

    def build(self) -> None:
        """Build model and optimizer; there is no trainer."""
        self.data_group = gpc.group(ParallelMode.DATA)
        self.model = DistributedDataParallel(initialize_model(), gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(self) -> float:
        """Train on this rank's part of the next batch; return the mean loss over the ranks."""
        batch, labels = self._batch()
        tokens = int(all_reduce((labels != -100).sum(), self.data_group))
        scale = self.data_group.size / tokens  # DDP takes the mean over ranks
        loss = self.model(
            batch["input_ids"][0], indexes=batch["indexes"][0], labels=labels[0], grad_scale=scale
        ).loss_sum
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(all_reduce(loss.detach(), self.data_group)) / self.data_group.size
