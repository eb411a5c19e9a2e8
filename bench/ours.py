"""A training step of this framework, through its public interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch

from bench.yardsticks import Yardstick
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.ledger import LEDGER
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.loader import Batch, pin_batch, split_rows
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ours:
    """A trainer of a yardstick's model on one rank.

    Args:
        yardstick: model and batches.
        overrides: ``KEY=VALUE`` of its config.
        rank: rank of this process.
        world: processes.
        port: port of rank 0; by default a free one, for a single process.
        data_size: ranks that read different sequences.
        micro_num: micro-batches of a step.
    """

    def __init__(
        self,
        yardstick: Yardstick,
        overrides: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
        port: int | None = None,
        data_size: int = 1,
        micro_num: int = 1,
    ) -> None:
        self.yardstick, self._batches = yardstick, yardstick.batches()
        names = dict(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port or free_port()
        )
        os.environ |= {name: str(value) for name, value in names.items()}
        self._micro_num = micro_num
        share = f"data.micro_bsz={yardstick.micro_bsz // data_size // micro_num}"
        initialize_distributed_env(
            yardstick.config(), launcher="torch", overrides=[share, f"data.micro_num={micro_num}", *overrides]
        )
        self.config = gpc.config
        self.build()
        tensor = GroupPosition(gpc.get_local_rank(ParallelMode.TENSOR), gpc.get_world_size(ParallelMode.TENSOR))
        self._sequence_shard = tensor if self.config.parallel.tensor.mode == "isp" else ALONE
        self._data = GroupPosition(gpc.get_local_rank(ParallelMode.DATA), data_size)

    def build(self) -> None:
        """Build model, optimizer and trainer."""
        model, communicator = initialize_model_and_parallel_communicator(create_model())
        optimizer, beta2, lr = initialize_optimizer(model, communicator)
        self.trainer = initialize_trainer(model, optimizer, lr, beta2)

    def step(self) -> float:
        """Train on this rank's part of the next batch; return the loss."""
        return self.trainer.train_step(iter([self._batch()])).result.loss

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return sum(entry.sent for entry in LEDGER.snapshot().values())

    def _batch(self) -> Batch:
        ids, lengths = next(self._batches)
        if self._data.size > 1:
            ids = ids.chunk(self._data.size)[self._data.rank]
            lengths = lengths[: len(lengths) // self._data.size]
        ends = torch.tensor(lengths).cumsum(0)
        labels = ids.roll(-1)
        labels[ends - 1] = -100
        positions = torch.cat([torch.arange(length) for length in lengths])
        shape = (1, -1) if self.yardstick.documents else (self._micro_num, -1, self.yardstick.seq_len)
        batch: dict[str, Any] = {"input_ids": ids.view(shape), "indexes": positions.view(shape)}
        batch["type_ids"] = torch.zeros_like(batch["input_ids"])
        if self.yardstick.documents:
            batch["cu_seqlens"] = [torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])]
        return pin_batch(split_rows((batch, labels.view(shape)), self._sequence_shard))
