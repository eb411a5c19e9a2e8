"""Content of a run that checkpoints save and restore: model, optimizer, random streams, data position and counters.

Phases of a load: (1) every rank compares the checkpoint with its model and config, (2) tensors are read into the memory
of the model and the optimizer, (3) the rest of the state is restored. After (1) and (2) the ranks exchange what went
wrong, so that all of them raise it. Before (2) nothing is changed; after a failure in (2), all content has to be loaded
from another checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from internlm.checkpoint import compatibility
from internlm.checkpoint.config_changes import log_allowed, log_changes
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.lease import this_launcher
from internlm.checkpoint.logical_tensors import (
    LogicalTensor,
    LogicalTensors,
    model_tensors,
    optimizer_tensors,
    tensor_addresses,
    without_rounded,
)
from internlm.checkpoint.manifest import FORMAT
from internlm.checkpoint.run_state import OptimizerCounters, RunState, TrainCounters, current_versions
from internlm.checkpoint.saved_checkpoint import SavedCheckpoint, open_checkpoint
from internlm.checkpoint.storage import Storage
from internlm.config.schema.root import CheckpointContent, CkptConfig
from internlm.core.context.random import RandomStreams
from internlm.data.batch_plan import Position
from internlm.ops.cpu.kernel_start import kernels_of_job, resume_kernels
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.errors import CheckpointError, Problem

#: Meaning of ``content=("all",)``. Random streams have no keyword: they are loaded only with all other content.
ALL: frozenset[CheckpointContent] = frozenset({"model", "optimizer", "scheduler", "sampler"})
#: Settings by which a checkpoint must match the run.
NOTHING_CHANGES = CkptConfig()


class Resumable(Protocol):
    """Protocol for the progress counters of a run, which are saved in a checkpoint and restored from it."""

    step: int

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as a JSON-serialisable dict."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters."""


class Sampler(Protocol):
    """Protocol for a data sampler that can resume at a saved position."""

    state_is_sharded: bool  # whether ranks have different parts of the state of a position

    def position(self, step: int) -> Position:
        """Return the data position before ``step``."""

    def resume(self, position: Position, has_changed: bool = False) -> None:
        """Continue from a data position that :meth:`position` returned, possibly in an earlier run.

        Args:
            position: The data position.
            has_changed: Whether the data, or settings that determine the rows, have changed since it was saved.
        """


class RunContent:
    """Content of a run on this rank.

    Args:
        model: Model of this rank, with a placement for each parameter.
        optimizer: Optimizer of ``model``.
        streams: Random streams of this rank.
        sampler: Training loader, whose data position is saved and restored.
        run_info: JSON-serialisable entries, saved with each checkpoint. Compared on loading: the resolved ``config``,
            the fingerprint of the ``data``, the list of its ``data_files`` and the ``seed``. Not compared:
            ``run_folder``, that of the run's records.
        exchange: Exchange between all ranks.
        config: What may have changed since a checkpoint was saved.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: HybridZeroOptimizer,
        streams: RandomStreams,
        sampler: Sampler,
        run_info: dict[str, Any],
        exchange: Exchange,
        config: CkptConfig = NOTHING_CHANGES,
    ) -> None:
        self.exchange = exchange
        self.model, self.optimizer, self.streams = model, optimizer, streams
        self.sampler, self.run_info, self.config = sampler, run_info, config
        self._tensors: LogicalTensors = {}
        self._addresses: list[int] = []

    # -- saving -------------------------------------------------------------------------------------------------------
    def tensors(self) -> LogicalTensors:
        """Return the tensors of this rank, after the all-gathers of the last update."""
        return {**self._tensors_in_memory(), **self._stream_tensors()}

    def _tensors_in_memory(self) -> LogicalTensors:
        # With overlap_sync_param, the all-gathers of the last update may still be running.
        self.optimizer.gather_parameters()
        # A step waits for this, so the slices are made anew only if memory was replaced.
        addresses = tensor_addresses(self.model, self.optimizer)
        if addresses != self._addresses:
            self._tensors = {**model_tensors(self.model), **optimizer_tensors(self.optimizer)}
            self._addresses = addresses
        return self._tensors

    def bytes_of_checkpoint(self) -> int:
        """Return the size of the tensors of a checkpoint on rank 0, and 0 on other ranks; collective."""
        sizes = {name: x.global_shape.numel() * x.dtype.itemsize for name, x in self.tensors().items()}
        # A tensor that several ranks hold is saved once.
        return sum({name: size for of_rank in self.exchange.gather(sizes) for name, size in of_rank.items()}.values())

    def state(self, counters: Resumable, save_folder: str) -> RunState:
        """Return the content of the state file, on rank 0 with the data positions of all ranks; collective."""
        position = self.sampler.position(counters.step)
        shards = self.exchange.gather(position.state) if self.sampler.state_is_sharded else [position.state]
        return RunState(
            format=FORMAT,
            train_state=TrainCounters(**counters.state_dict()),
            optimizer=OptimizerCounters(**self.optimizer.state_dict()),
            sampler=[position.step, position.batch, position.row],
            sampler_state={name: numbers for shard in shards for name, numbers in shard.items()},
            world_size=dist.get_world_size(),
            cpu_kernels=kernels_of_job(),
            save_folder=save_folder,
            launcher=this_launcher(),
            versions=current_versions(),
            **self.run_info,
        )

    def _stream_tensors(self, version: int = FORMAT) -> LogicalTensors:
        """Return this rank's RNG states, keyed by ``rng/<owner>/<stream>``; in format 1 the owner is the rank."""
        owners = self.streams.owners
        return {
            f"rng/{dist.get_rank() if version == 1 else owners[name]}/{name}": LogicalTensor.whole(value)
            for name, value in self.streams.state_dict().items()
        }

    # -- loading ------------------------------------------------------------------------------------------------------
    def load(self, storage: Storage, name: str, counters: Resumable, content: Iterable[CheckpointContent]) -> RunState:
        """Load ``content`` from a checkpoint; collective.

        Args:
            storage: Storage of the checkpoint.
            name: Name of the checkpoint in it.
            counters: Progress counters to restore.
            content: Content to load; "all" includes the random streams.

        Returns:
            Content of the state file.

        Raises:
            DamagedCheckpointError: On some rank, the checkpoint does not verify. Content may have been overwritten.
            CheckpointError: On some rank, the checkpoint does not match the run. Nothing was changed.
        """
        content = set(content)
        wanted = set(ALL) if "all" in content else content
        # Waits for all-gathers, which would overwrite loaded parameters with old values.
        tensors = {name: x for name, x in self._tensors_in_memory().items() if name.partition("/")[0] in wanted}
        # A pipeline stage has only the tensors of its own layers.
        known = {name for names in self.exchange.all_gather([*tensors]) for name in names}
        # Every rank reads the manifest, which is small: a file system that differs between ranks is detected here.
        with self.exchange.failing_together():
            checkpoint = open_checkpoint(storage, name)
            saved = checkpoint.state
            where = checkpoint.where
            problems = list(compatibility.adapters_without_state(where, tensors, saved.config))
            tensors = checkpoint.as_stored(compatibility.without_new_adapters(tensors, saved.config))
            known = checkpoint.names_as_stored(known)
            other_data = list(compatibility.other_samples(where, saved.model_dump(), self.run_info))
            # Instead of the differences that follow from it, tensor by tensor.
            problems = problems or list(self._tensor_problems(checkpoint, saved, tensors, known, wanted))
            if "sampler" in wanted and not self.config.allow_data_changes:
                problems += other_data
            if problems:
                raise CheckpointError(*problems)
        if wanted == ALL:
            # In another layout, some streams are missing; they keep their states from the seed.
            streams = self._stream_tensors(checkpoint.format)
            stored = checkpoint.metadata.state_dict_metadata
            tensors |= {name: tensor for name, tensor in streams.items() if name in stored}
        with self.exchange.failing_together():
            checkpoint.read(without_rounded(tensors))
        self._restore(saved, tensors, counters, wanted)
        if "sampler" in wanted:
            log_allowed(other_data)
            self.sampler.resume(saved.position, has_changed=bool(other_data))
        log_changes(where, saved, self.run_info, wanted)
        return saved

    def _tensor_problems(
        self,
        checkpoint: SavedCheckpoint,
        saved: RunState,
        tensors: LogicalTensors,
        known: set[str],
        wanted: set[CheckpointContent],
    ) -> Iterator[Problem]:
        """Compare the config and the tensors of the checkpoint with those of the run; yield a problem per difference.

        Tensors are compared only if the configs match: with another architecture, nearly every tensor would differ.

        Args:
            checkpoint: The checkpoint.
            saved: Content of the checkpoint's state file.
            tensors: Tensors that this rank loads.
            known: Names of the tensors that at least one rank loads.
            wanted: Parts of the checkpoint to load, such as "model" and "optimizer".
        """
        source, metadata = checkpoint.where, checkpoint.metadata
        then, now = saved.config, self.run_info["config"]
        problems = list(compatibility.other_architecture(source, then, now))
        if "model" in wanted and not self.config.allow_model_changes:
            problems += compatibility.other_mathematics(source, then, now)
        problems += compatibility.other_dtype(source, then, now) if "optimizer" in wanted else []
        yield from problems
        if not problems:
            yield from compatibility.missing_tensors(source, metadata, tensors)
            yield from compatibility.unexpected_tensors(source, metadata, known) if "model" in wanted else ()
            yield from compatibility.other_states(source, metadata, known) if "optimizer" in wanted else ()

    def _restore(
        self,
        saved: RunState,
        tensors: LogicalTensors,
        counters: Resumable,
        wanted: set[CheckpointContent],
    ) -> None:
        """Restore the state that was not read directly into the model and the optimizer, but for the data position."""
        if "optimizer" in wanted:
            self.optimizer.load_state_dict(saved.optimizer.model_dump())
            if "model" not in wanted:
                self.optimizer.copy_main_to_model_params()
        else:
            # Main parameters still hold the initial values; the first update would write them back to the model.
            self.optimizer.copy_model_to_main_params()
        # Learning-rate schedules are functions of the step, so they have no state.
        if wanted & {"scheduler", "sampler"}:
            counters.load_state_dict(saved.train_state.model_dump())
        if wanted == ALL:
            resume_kernels(saved.cpu_kernels)
        streams = {name.rsplit("/", 1)[1]: t.slices[(0,)] for name, t in tensors.items() if name.startswith("rng/")}
        if streams:
            self.streams.load_state_dict(streams)
