"""One training step of this framework, by its public path."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from bench.yardsticks import Yardstick
from internlm.core.context import global_context as gpc
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_optimizer


class Ours:
    """A trainer over a yardstick's model; ``step`` trains on its next batch."""

    def __init__(self, yardstick: Yardstick) -> None:
        self.yardstick, self._batches = yardstick, yardstick.batches()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        initialize_distributed_env(yardstick.config(), launcher="torch")
        model = create_model()
        optimizer, beta2, lr = initialize_optimizer(model)
        self.trainer = initialize_trainer(model, optimizer, lr, beta2)
        self.config = gpc.config

    def step(self) -> float:
        """Forward, backward, clip, update; the loss."""
        return self.trainer.train_step(iter([self._batch()])).result.loss

    def _batch(self) -> tuple[dict[str, Any], torch.Tensor]:
        ids, lengths = next(self._batches)
        ends = torch.tensor(lengths).cumsum(0)
        labels = ids.roll(-1)
        labels[ends - 1] = -100
        positions = torch.cat([torch.arange(length) for length in lengths])
        shape = (1, -1) if self.yardstick.documents else (1, self.yardstick.micro_bsz, self.yardstick.seq_len)
        batch: dict[str, Any] = {"input_ids": ids.view(shape), "indexes": positions.view(shape)}
        batch["type_ids"] = torch.zeros_like(batch["input_ids"])
        if self.yardstick.documents:
            batch["cu_seqlens"] = [torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])]
        return batch, labels.view(shape)
