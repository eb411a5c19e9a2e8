"""Writer of a checkpoint's tensors: one file of raw bytes per rank, with a checksum of each piece.

A checksum is computed from memory, before the bytes are written: reading a file back would give a valid checksum to
bytes that were corrupted on their way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from internlm.checkpoint.manifest import (
    FORMAT,
    LARGEST_MANIFEST,
    FileRecord,
    Manifest,
    Piece,
    TensorRecord,
    checksum,
)
from internlm.checkpoint.planners import LogicalSavePlanner
from internlm.checkpoint.run_state import LARGEST_STATE, RunState
from internlm.checkpoint.storage import MANIFEST, Storage

STATE_FILE = "state.json"
#: Bytes that are hashed and written at a time: few enough to be in the processor's cache when they are written.
BLOCK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Save:
    """Name, step and state of a checkpoint, saved beside its tensors."""

    checkpoint: str
    """Name of the checkpoint, such as ``step-40``."""
    step: int
    state: RunState


class TensorWriter(StorageWriter):
    """DCP writer of one checkpoint: each rank writes a file, and the coordinator publishes the manifest.

    Args:
        storage: Storage to save to.
        save: Name, step and state of the checkpoint.
        attempt: Identifier of this save, the same on all ranks and different in every save.
        rank: Rank of this process, which its file is named after.
        before_commit: Function that the coordinator calls right before it publishes; it raises unless this run
            owns the folder. None: nobody else saves there.
    """

    def __init__(
        self,
        storage: Storage,
        save: Save,
        attempt: str,
        rank: int = 0,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self.storage, self.save, self.attempt, self.before_commit = storage, save, attempt, before_commit
        self.file = f"rank-{rank:05}.bin"
        self.folder = storage.attempt_folder(save.checkpoint, attempt)
        # The files of an attempt may lie in a folder of their own, beside the manifest.
        self.prefix = f"{attempt}/" if self.folder.startswith(f"{save.checkpoint}/") else ""
        self.whole_files: dict[str, FileRecord] = {}
        """Files without pieces that the coordinator has written, by their names in the checkpoint."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the pieces of this rank, and make them durable; the results hold a :class:`Piece` each."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        results, position = [], 0
        contents: Iterable[memoryview] = (_content(planner, item) for item in plan.items)
        if isinstance(planner, LogicalSavePlanner) and planner.is_staged:
            # Views, which need no memory. Between writes the caches of the processor hold data, and this takes longer.
            contents = list(contents)
        with self.storage.create(f"{self.folder}/{self.file}") as sink:
            for item, content in zip(plan.items, contents, strict=True):
                assert item.tensor_data is not None
                assert item.index.offset is not None
                hasher = xxhash.xxh3_128()
                for _, block in blocks_of(content):
                    hasher.update(block)
                    sink.write(block)
                offsets, sizes = tuple(item.index.offset), tuple(item.tensor_data.chunk.sizes)
                piece = Piece(self.file, position, offsets, sizes, hasher.hexdigest())
                results.append(WriteResult(item.index, len(content), piece))
                position += len(content)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the state file, and publish the manifest of all ranks' pieces; the coordinator calls this."""
        state = self.save.state.to_bytes()
        self._check_size(STATE_FILE, state, LARGEST_STATE)
        with self.storage.create(f"{self.folder}/{STATE_FILE}") as sink:
            sink.write(memoryview(state))
        self.whole_files[self.prefix + STATE_FILE] = FileRecord(size=len(state), checksum=checksum(state))
        manifest = self._manifest(metadata, [result for of_rank in results for result in of_rank]).to_bytes()
        self._check_size(MANIFEST, manifest, LARGEST_MANIFEST)
        self.storage.publish(self.save.checkpoint, self.attempt, manifest, self.before_commit)
        self.whole_files[MANIFEST] = FileRecord(size=len(manifest), checksum=checksum(manifest))

    def _check_size(self, file: str, content: bytes, limit: int) -> None:
        # A larger one could never be loaded.
        if len(content) > limit:
            message = f"has {len(content)} bytes, at most {limit} can be read"
            raise OSError(errno.EFBIG, message, self.storage.path(f"{self.save.checkpoint}/{file}"))

    def _manifest(self, metadata: Metadata, results: list[WriteResult]) -> Manifest:
        pieces: dict[str, list[Piece]] = {}
        sizes: dict[str, int] = {}
        for result in results:
            piece = result.storage_data._replace(file=self.prefix + result.storage_data.file)
            pieces.setdefault(result.index.fqn, []).append(piece)
            sizes[piece.file] = max(sizes.get(piece.file, 0), piece.position + result.size_in_bytes)
        return Manifest(
            format=FORMAT,
            step=self.save.step,
            checkpoint=self.save.checkpoint,
            attempt=self.attempt,
            files=self.whole_files | {name: FileRecord(size=size) for name, size in sizes.items()},
            tensors={
                name: _record(stored, pieces.get(name, []))
                for name, stored in metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            },
        )

    # DCP calls these, which have nothing to do here.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer saves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: folders are created with their files."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans unchanged."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: the storage and the name are given to the constructor."""
        return False


def _content(planner: SavePlanner, item: WriteItem) -> memoryview:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), item
    return memory_of(tensor.detach().cpu().contiguous())


def _record(stored: TensorStorageMetadata, pieces: list[Piece]) -> TensorRecord:
    dtype = str(stored.properties.dtype).removeprefix("torch.")
    return TensorRecord(dtype=dtype, shape=tuple(stored.size), pieces=tuple(pieces))


def blocks_of(memory: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the position and the bytes of each block of at most :data:`BLOCK_BYTES`."""
    for start in range(0, len(memory), BLOCK_BYTES):
        yield start, memory[start : start + BLOCK_BYTES]


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the host, without copying."""
    # Through uint8, since NumPy has no bfloat16.
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
