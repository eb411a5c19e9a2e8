"""Reader of a checkpoint's tensors, which verifies the checksum of every piece that it reads."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from internlm.checkpoint.folder_checks import is_damage, reason_of, todo_at
from internlm.checkpoint.manifest import Manifest, Piece, TensorRecord
from internlm.checkpoint.storage import Source, Storage
from internlm.checkpoint.tensor_writer import blocks_of, memory_of
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem

TODO = "Choose another checkpoint"


class _Read(NamedTuple):
    """Piece to read, and where to."""

    piece: Piece
    record: TensorRecord
    items: list[ReadItem]
    targets: list[Tensor]
    memory: memoryview | None
    """Bytes of the only target, if the piece has the same; None: a part of the piece is copied to each target."""


class TensorReader(StorageReader):
    """DCP reader of one checkpoint.

    Args:
        storage: Storage of the checkpoint.
        folder: Folder of the manifest.
        manifest: Parsed manifest.
    """

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self.storage, self.folder, self.manifest = storage, folder, manifest
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the tensors of the manifest as DCP metadata."""
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        pieces: dict[MetadataIndex, Piece] = {}
        for name, record in self.manifest.tensors.items():
            chunks = []
            for piece in record.pieces:
                offsets = torch.Size(piece.offsets)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
                pieces[MetadataIndex(name, offsets)] = piece
            properties = TensorProperties(dtype=record.torch_dtype)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(record.shape), chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=pieces)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember the pieces that :meth:`read_metadata` found."""
        self._pieces: dict[MetadataIndex, Piece] = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the pieces of ``plan``, verify them, and copy what is needed of each.

        Raises:
            DamagedCheckpointError: A file is missing or too short, or a piece has another checksum. Pieces read before
                have been copied.
        """
        items: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(MetadataIndex(item.storage_index.fqn, item.storage_index.offset), []).append(item)
        by_file: dict[str, list[_Read]] = {}
        # Before anything is read: afterwards the caches of the processor hold data, and this takes much longer.
        for index, of_piece in items.items():
            read = self._prepare(self._pieces[index], of_piece, planner)
            by_file.setdefault(read.piece.file, []).append(read)
        for file, reads in by_file.items():
            size = self.manifest.files[file].size
            with OpenFile(self.storage, f"{self.folder}/{file}", size) as source:
                for read in sorted(reads, key=lambda read: read.piece.position):
                    self._read_piece(source, read)
                    for item, target in zip(read.items, read.targets, strict=True):
                        planner.commit_tensor(item, target)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _prepare(self, piece: Piece, items: list[ReadItem], planner: LoadPlanner) -> _Read:
        record = self.manifest.tensors[items[0].storage_index.fqn]
        targets = [planner.resolve_tensor(item).detach() for item in items]
        whole = len(items) == 1 and _is_same_memory(targets[0], record.torch_dtype, record.piece_bytes(piece))
        return _Read(piece, record, items, targets, memory_of(targets[0]) if whole else None)

    def _read_piece(self, source: OpenFile, read: _Read) -> None:
        if read.memory is not None:
            source.read_verified(read.piece, read.memory)
            return
        dtype = read.record.torch_dtype
        stored = self._buffer(read.record.piece_bytes(read.piece)).view(dtype).view(read.piece.sizes)
        source.read_verified(read.piece, memory_of(stored))
        for item, target in zip(read.items, read.targets, strict=True):
            part = stored
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target.copy_(part)

    def _buffer(self, size: int) -> Tensor:
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size]

    # DCP calls these, which have nothing to do here.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads one checkpoint."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: the storage and the folder are given to the constructor."""
        return False


def _is_same_memory(target: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Return whether a whole piece can be read into ``target`` without a copy."""
    return target.is_contiguous() and target.dtype == dtype and target.is_cpu and target.nbytes == size


class UnreadableCheckpointError(CheckpointError):
    """Files of a checkpoint that may be whole cannot be read."""


class OpenFile:
    """File of a checkpoint that is open for reading pieces, in a ``with`` block.

    Raises:
        DamagedCheckpointError: The file is missing, cannot be read, or has another size than the manifest says.
        UnreadableCheckpointError: The file is out of reach.
    """

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self.storage, self.name, self.size = storage, name, size

    def __enter__(self) -> OpenFile:
        try:
            self._source: Source = self.storage.open(self.name)
        except FileNotFoundError:
            raise self._damaged("is missing") from None
        except OSError as error:
            raise self._unreadable(error) from None
        if self._source.size != self.size:
            self._source.close()
            raise self._damaged(f"{self._source.size} bytes, manifest says {self.size}")
        return self

    def __exit__(self, *error: object) -> None:
        self._source.close()

    def read_verified(self, piece: Piece, memory: memoryview) -> None:
        """Read ``piece`` into ``memory``, which has its size, and verify the checksum.

        Raises:
            DamagedCheckpointError: The bytes are not those that were saved, or cannot be read.
            UnreadableCheckpointError: The file is out of reach.
        """
        hasher = xxhash.xxh3_128()
        try:
            for start, block in blocks_of(memory):
                count = self._source.read_into(piece.position + start, block)
                # Hash each block when it is in the processor's cache.
                hasher.update(block[:count])
        except OSError as error:
            raise self._unreadable(error) from None
        if hasher.hexdigest() != piece.checksum:
            stop = piece.position + len(memory)
            raise self._damaged(f"bytes {piece.position} to {stop} differ from those that were saved")

    def _unreadable(self, error: OSError) -> CheckpointError:
        return unreadable(error, self.storage.path(self.name))

    def _damaged(self, message: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(Problem(self.storage.path(self.name), message, TODO))


def unreadable(error: OSError, path: str) -> CheckpointError:
    """Return the error for a file that cannot be read: of damage, unless the file may be whole."""
    if is_damage(error):
        return DamagedCheckpointError(Problem(path, f"cannot be read ({reason_of(error)})", TODO))
    todo = todo_at(path, error.errno, "Make it readable, and start again")
    return UnreadableCheckpointError(Problem(path, f"cannot be read ({reason_of(error)})", todo))
