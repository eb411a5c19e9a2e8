"""Reading checkpoint files without trusting them."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from internlm.checkpoint.format_1 import SafeReader, damaged_files
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.planners import LogicalLoadPlanner
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.utils.errors import CheckpointError, DamagedCheckpointError
from tests.unit.checkpoint.samples import Evil, complete, in_ranges, write

VALUES = torch.arange(12.0).view(3, 4)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint of one tensor, in two slices."""
    return write(tmp_path / "step-1", {"model/w": in_ranges(VALUES, [5])})


def read_into(source: Path, name: str, logical: LogicalTensor) -> None:
    dcp.load({name: logical}, storage_reader=SafeReader(source), planner=LogicalLoadPlanner(), no_dist=True)


def edit(source: Path, change: Callable[[Metadata], None]) -> None:
    """Change the metadata of a checkpoint."""
    path = source / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


# -- good files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_good_file_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    values = VALUES.to(dtype)
    source = write(tmp_path / "step-1", {"model/w": in_ranges(values, [])})
    metadata = SafeReader(source).read_metadata().state_dict_metadata["model/w"]
    assert (metadata.size, metadata.properties.dtype) == (values.shape, dtype)
    target = in_ranges(torch.zeros_like(values), [])
    read_into(source, "model/w", target)
    assert torch.equal(target.slices[0, 0], values)


def test_nothing_of_the_machine_is_written(good: Path) -> None:
    """Such as the folder's path."""
    assert all(str(good.parent).encode() not in path.read_bytes() for path in good.iterdir())


def test_what_several_reads_of_a_file_need_is_remembered(good: Path) -> None:
    reader = SafeReader(good)
    assert reader.read_metadata().storage_meta.load_id == reader.load_id


# -- hostile files


def global_of(module: str, name: str) -> bytes:
    """A pickle that asks for a name, in the protocol that allows dots in it."""
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93."


METADATA = "torch.distributed.checkpoint.metadata"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("collections", "namedtuple"),
        (METADATA, "os"),
        (METADATA, "os.system"),
        (METADATA, "torch"),
        (METADATA, "dataclass"),  # makes source code of field names, and executes it
        (METADATA, "field"),
        (METADATA, "Metadata.__init__.__globals__"),
        (METADATA, "TensorProperties.create_from_tensor"),
        ("torch", "Size.__new__"),
    ],
)
def test_names_that_no_checkpoint_needs_are_refused(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(global_of(module, name))
    with pytest.raises(CheckpointError, match=f"refused a reference to {module}.{name}, which no checkpoint needs"):
        SafeReader(tmp_path).read_metadata()


def test_hostile_metadata_executes_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(CheckpointError, match=r"refused a reference to posix\.mkdir"):
        SafeReader(tmp_path).read_metadata()
    assert not proof.exists()


def test_a_pickled_object_in_place_of_a_tensor_executes_nothing(tmp_path: Path) -> None:
    source, proof = tmp_path / "step-1", tmp_path / "proof"
    dcp.save({"rng/0/data": Evil(proof)}, checkpoint_id=source, no_dist=True)
    edit(source, lambda metadata: setattr(metadata, "storage_meta", None))
    assert isinstance(SafeReader(source).read_metadata().state_dict_metadata["rng/0/data"], BytesStorageMetadata)
    with pytest.raises(CheckpointException, match="rng/0/data: expected a tensor, got a pickled object"):
        read_into(source, "rng/0/data", in_ranges(VALUES, []))
    assert not proof.exists()


def test_a_pickled_object_in_a_tensors_bytes_executes_nothing(good: Path, tmp_path: Path) -> None:
    proof, stream = tmp_path / "proof", io.BytesIO()
    torch.save(Evil(proof), stream)
    hostile = stream.getvalue()

    def point_at_it(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            (good / info.relative_path).write_bytes(hostile)
            info.offset, info.length = 0, len(hostile)

    edit(good, point_at_it)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        read_into(good, "model/w", in_ranges(VALUES, []))
    assert not proof.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "inner/file", "./file"])
def test_files_outside_the_checkpoint_are_not_read(good: Path, path: str) -> None:
    def point_outside(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = path

    edit(good, point_outside)
    with pytest.raises(CheckpointError, match=f"expected a file name without folders, got '{path}'"):
        SafeReader(good).read_metadata()


# -- damaged files


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "pickle exhausted before seeing STOP"),
        (b"not a pickle", "cannot be read"),
        (pickle.dumps(torch.Size((3, 4))), "expected DCP metadata, got Size"),
        (pickle.dumps(None), "expected DCP metadata, got NoneType"),
        (pickle.dumps(Metadata({}))[:-20], "cannot be read"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x05\x96" + (2**31).to_bytes(8, "little") + b".", "cannot be read"),  # it would be allocated
        (b"\x80\x04Nr" + (2**31 - 1).to_bytes(4, "little") + b".", "refused the memo index 2147483647"),
    ],
    ids=["empty", "garbage", "something else", "nothing", "cut off", "a length", "a byte array", "a memo"],
)
def test_damaged_metadata(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=why) as caught:
        SafeReader(tmp_path).read_metadata()
    assert str(caught.value).startswith(f"{tmp_path / '.metadata'}: cannot be read (")


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafeReader(tmp_path).read_metadata()


def test_a_missing_slice_is_an_error(good: Path) -> None:
    edit(good, lambda metadata: metadata.storage_data.pop(MetadataIndex("model/w", torch.Size((0, 0)), 0)))
    with pytest.raises(CheckpointException):
        read_into(good, "model/w", in_ranges(VALUES, []))


# -- layouts


def any_splits(numel: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[: seed % 4].tolist()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(4, 3, 5), (7,), (2, 9)], ids=str)
def test_any_layout_reads_what_another_wrote(tmp_path: Path, shape: tuple[int, ...], seed: int) -> None:
    """Flat ranges split anywhere, as by ZeRO."""
    values = torch.randn(shape)
    source = write(tmp_path / "step-1", {"optimizer/exp_avg/w": in_ranges(values, any_splits(values.numel(), seed))})
    split_at: Any = any_splits(values.numel(), seed + 11)
    target, expected = in_ranges(torch.zeros(shape), split_at), in_ranges(values, split_at)
    read_into(source, "optimizer/exp_avg/w", target)
    assert all(torch.equal(target.slices[offsets], tensor) for offsets, tensor in expected.slices.items())


# -- files of the checkpoint


def texts_of_damage(source: Path) -> list[str]:
    return list(map(str, damaged_files(source, SafeReader(source).read_metadata())))


def test_whole_files_are_not_damaged(good: Path) -> None:
    assert texts_of_damage(good) == []


@pytest.mark.parametrize("kept", [0, 0.5, 0.99, None], ids=str)
def test_files_that_are_too_short(good: Path, kept: float | None) -> None:
    (file,) = good.glob("*.distcp")
    size = file.stat().st_size
    left = int(size * (kept or 0))
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:left])
    expected = f"{file}: expected at least {size} bytes according to .metadata, got {left}. Choose an older checkpoint"
    assert texts_of_damage(good) == [expected]


def test_a_file_that_is_a_link_is_not_followed(good: Path) -> None:
    (file,) = good.glob("*.distcp")
    file.rename(good.parent / "elsewhere")
    file.symlink_to(good.parent / "elsewhere")
    assert "expected at least" in texts_of_damage(good)[0]


@pytest.mark.parametrize("name", [".metadata", "state.json"])
def test_links_and_pipes_are_refused_at_once(good: Path, name: str) -> None:
    complete(good)
    (good / name).rename(good.parent / "elsewhere")
    (good / name).symlink_to(good.parent / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match="symbolic link"):
        open_checkpoint(LocalStorage(good.parent), good.name)
    (good / name).unlink()
    os.mkfifo(good / name)
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        open_checkpoint(LocalStorage(good.parent), good.name)
