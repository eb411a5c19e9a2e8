"""Loaders built from a ``data`` section: shapes and content of batches, seeking, splitting among ranks, errors."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.accelerator import DeviceKind
from internlm.config.schema import DataConfig
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data import loader as loader_file
from internlm.data.build import build_train_loader, build_valid_loaders
from internlm.data.loader import Batch, TrainLoader, ValidLoader
from internlm.utils.errors import DataError, UserError
from tests.unit.data.files import write_bin

SIZES: dict[str, Any] = {"seq_len": 16, "micro_bsz": 2, "micro_num": 3, "total_steps": 20, "num_worker": 0}


def data(**settings: Any) -> DataConfig:
    return DataConfig(**{**SIZES, **settings})


def train(rank: int = 0, size: int = 1, seed: int = 7, **settings: Any) -> TrainLoader:
    return build_train_loader(data(**settings), vocab_size=50, seed=seed, replica=GroupPosition(rank, size))[0]


def valid(rank: int = 0, size: int = 1, **settings: Any) -> dict[str, ValidLoader]:
    return build_valid_loaders(data(**settings), vocab_size=50, seed=7, replica=GroupPosition(rank, size))


def flat(batches: list[Batch]) -> list[torch.Tensor]:
    """All tensors of the batches, one after another."""
    return [
        tensor
        for batch, labels in batches
        for part in [*(batch[name] for name in sorted(batch)), labels]
        for tensor in (part if isinstance(part, list) else [part])
    ]


def same(one: list[Batch], other: list[Batch]) -> bool:
    left, right = flat(one), flat(other)
    return len(left) == len(right) and all(a.equal(b) for a, b in zip(left, right, strict=True))


def of_all_ranks(batches: list[Batch]) -> list[torch.Tensor]:
    """Input ids, labels and sequence boundaries of a global batch, whichever ranks its rows are on."""
    ids = torch.cat([batch["input_ids"] for batch, _ in batches])
    return [
        ids,
        torch.cat([labels for _, labels in batches]),
        *(bounds for b, _ in batches for bounds in b["cu_seqlens"]),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Thirty samples of type code, ten of type en."""
    write_bin(tmp_path / "code/x.bin", [[i % 50] * (1 + i) for i in range(30)])
    write_bin(tmp_path / "en/x.bin", [[i + 1] * 7 for i in range(10)])
    return str(tmp_path)


# -- batches


def test_a_packed_batch() -> None:
    batch, labels = next(iter(train()))
    assert set(batch) == {"input_ids", "indexes", "type_ids", "cu_seqlens"}
    for tensor in (batch["input_ids"], batch["indexes"], batch["type_ids"], labels):
        assert (tensor.shape, tensor.dtype) == ((3, 32), torch.int64)
    assert len(batch["cu_seqlens"]) == 3
    for bounds in batch["cu_seqlens"]:
        assert bounds.dtype == torch.int32
        assert (bounds[0], bounds[-1]) == (0, 32)


def test_a_batch_packed_into_one() -> None:
    batch, _ = next(iter(train(pack_sample_into_one=True)))
    assert [bounds.tolist() for bounds in batch["cu_seqlens"]] == [[0, 16, 32]] * 3


def test_an_unpacked_batch() -> None:
    batch, labels = next(iter(train(use_packed_dataset=False)))
    assert set(batch) == {"input_ids", "indexes", "type_ids"}
    for tensor in (*batch.values(), labels):
        assert (tensor.shape, tensor.dtype) == ((3, 2, 16), torch.int64)


def test_fixed_random_samples_fill_their_sequences() -> None:
    batch, labels = next(iter(train(fixed_random_dataset_seqlen=True)))
    assert [bounds.tolist() for bounds in batch["cu_seqlens"]] == [[0, 16, 32]] * 3
    assert ((labels == -100).nonzero()[:, 1].view(3, 2) == torch.tensor([15, 31])).all()


def test_types_are_those_of_the_folders(folder: str) -> None:
    loader, types = build_train_loader(data(train_folder=folder), vocab_size=50, seed=7, replica=ALONE)
    assert types == loader.types == ["code", "en"]
    seen = set()
    for batch, labels in loader:
        ids, type_ids = batch["input_ids"][labels != -100], batch["type_ids"][labels != -100]
        assert (ids[type_ids == 1] <= 10).all()
        seen |= set(type_ids.tolist())
    assert seen == {0, 1}


def test_the_tokenizer_of_tokenized_data_fits_the_model(folder: str, sentencepiece_model: Path, tmp_path: Path) -> None:
    settings = data(train_folder=folder, tokenizer_path=str(sentencepiece_model))
    for vocab_size in (320, 384):  # as large as the tokenizer, and padded
        build_train_loader(settings, vocab_size=vocab_size, seed=7, replica=ALONE)
    with pytest.raises(DataError, match=r"data\.tokenizer_path: the tokenizer has ids up to 319, but .* is 319\. Set "):
        build_train_loader(settings, vocab_size=319, seed=7, replica=ALONE)
    with pytest.raises(DataError, match="none: no such file or folder"):
        train(train_folder=folder, tokenizer_path=str(tmp_path / "none"))


# -- a function of the step alone


@pytest.mark.parametrize("num_worker", [0, 1, 4])
@pytest.mark.parametrize("settings", [{}, {"rampup_batch_size": "1 1 4", "skip_batches": "2-5,9"}])
def test_seeking_equals_going_straight_on(num_worker: int, settings: dict[str, str]) -> None:
    straight = list(train(num_worker=0, **settings))
    loader = train(num_worker=num_worker, **settings)
    for start in (0, 1, 7, 19, 20):
        loader.seek(start)
        assert len(loader) == 20 - start
        assert same(list(loader), straight[start:])
        resumed = train(num_worker=num_worker, **settings)
        resumed.resume(loader.position(start))
        assert same(list(resumed), straight[start:])


@pytest.mark.parametrize("num_worker", [0, 4])
@pytest.mark.parametrize("read", [0, 1])
def test_an_iterator_made_before_resuming_is_refused(num_worker: int, read: int) -> None:
    loader = train(num_worker=num_worker)
    batches = iter(loader)
    for _ in range(read):
        next(batches)
    loader.resume(loader.position(2))
    with pytest.raises(UserError, match=r"^train_dl: the run was resumed after .*\. Resume before iter\("):
        next(batches)
    assert len(list(loader)) == 18


def test_the_data_goes_on_in_the_next_epoch(folder: str) -> None:
    """535 tokens, which is 17 rows of 32 and a few epochs in all, however the steps fall."""
    steps = list(train(train_folder=folder))
    epochs = [torch.cat([batch["input_ids"] for batch, _ in steps])[17 * i : 17 * (i + 1)] for i in range(3)]
    first, second, third = (sorted(epoch.flatten().tolist()) for epoch in epochs)
    assert first == second == third
    assert not epochs[0].equal(epochs[1])


@pytest.mark.parametrize("settings", [{}, {"skip_batches": "1,3-4"}])
def test_the_global_batch_does_not_depend_on_the_ranks(folder: str, settings: dict[str, str]) -> None:
    """12 rows a step, ramped up from 6, on 1, 2 and 6 ranks."""
    whole = [
        [
            of_all_ranks(
                [
                    train(rank, size, train_folder=folder, micro_num=12 // size, **settings, **ramp).read(step)
                    for rank in range(size)
                ]
            )
            for step in range(8)
        ]
        for size, ramp in (
            (1, {"rampup_batch_size": "6 6 2"}),
            (2, {"rampup_batch_size": "3 3 2"}),
            (6, {"rampup_batch_size": "1 1 2"}),
        )
    ]
    for other in whole[1:]:
        for left, right in zip(whole[0], other, strict=True):
            assert all(a.equal(b) for a, b in zip(left, right, strict=True))


def test_a_run_may_go_on_with_another_global_batch() -> None:
    before, after = train(micro_num=3), train(micro_num=2)
    after.resume(before.position(5))
    assert after.read(5)[0]["input_ids"].equal(before.read(5)[0]["input_ids"][:2])
    assert after.read(6)[0]["input_ids"][0].equal(before.read(5)[0]["input_ids"][2])


def test_another_seed_gives_another_order(folder: str) -> None:
    one, other = train(train_folder=folder), train(train_folder=folder, seed=8)
    assert one.fingerprint() == other.fingerprint()
    assert not one.read(0)[0]["input_ids"].equal(other.read(0)[0]["input_ids"])


# -- validation


def test_validation_reads_each_type_once_in_order(folder: str) -> None:
    loaders = valid(valid_folder=folder)
    assert list(loaders) == ["code", "en"]
    batches = list(loaders["en"])
    assert len(batches) == len(loaders["en"]) == 1
    batch, labels = batches[0]
    assert batch["input_ids"].flatten()[:70].tolist() == [i + 1 for i in range(10) for _ in range(7)]
    assert (labels != -100).sum() == 10 * 6
    assert batch["type_ids"].eq(0).all()


@pytest.mark.parametrize("micro_num", [None, 1, 5])
def test_all_ranks_get_as_many_validation_batches(folder: str, micro_num: int | None) -> None:
    alone = valid(valid_folder=folder, valid_micro_num=1)["code"]
    rows = [batch["input_ids"][0] for batch, _ in alone]
    for size in (2, 3, 8):
        ranks = [valid(rank, size, valid_folder=folder, valid_micro_num=micro_num)["code"] for rank in range(size)]
        batches = [list(loader) for loader in ranks]
        assert len({len(of_rank) for of_rank in batches}) == 1
        assert all(len(labels) == (micro_num or 3) for of_rank in batches for _, labels in of_rank)
        by_step = [row for step in zip(*batches, strict=True) for batch, _ in step for row in batch["input_ids"]]
        assert all(a.equal(b) for a, b in zip(rows, by_step, strict=False))
        labels = torch.cat([labels for step in zip(*batches, strict=True) for _, labels in step])
        assert len(rows) <= len(labels)
        assert labels[len(rows) :].eq(-100).all()


def test_validation_may_be_bounded(folder: str) -> None:
    loader = valid(valid_folder=folder, valid_max_batches=2, num_worker=2)["code"]
    assert len(list(loader)) == len(loader) == 2


def test_random_validation_differs_from_training() -> None:
    loaders = valid(valid_max_batches=1)
    assert list(loaders) == ["val"]
    batch, _ = next(iter(loaders["val"]))
    assert not batch["input_ids"].equal(train().read(0)[0]["input_ids"])


def test_no_validation_without_a_folder_beside_one_for_training(folder: str) -> None:
    assert valid(train_folder=folder) == {}


# -- pinned memory


@dataclass(frozen=True, kw_only=True)
class Pinning(DeviceKind):
    """Kind that pins a tensor by copying it, and records the copy and the thread."""

    pinned: dict[int, str] = field(default_factory=dict)
    copies: list[torch.Tensor] = field(default_factory=list)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.copies.append(tensor.clone())
        self.pinned[id(self.copies[-1])] = threading.current_thread().name
        return self.copies[-1]


@pytest.mark.parametrize("keys", [{}, {"use_packed_dataset": False}])
def test_all_tensors_of_a_batch_are_pinned_by_the_threads_that_read_ahead(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(train(total_steps=3, num_worker=0, **keys))
    kind = Pinning(name="cuda", backend="nccl")
    monkeypatch.setattr(loader_file, "device_kind", lambda: kind)
    batches = list(train(total_steps=3, num_worker=2, **keys))
    assert same(batches, expected)
    assert all(kind.pinned[id(tensor)].startswith("internlm-data") for tensor in flat(batches))


# -- errors


@pytest.mark.parametrize("num_worker", [0, 3])
def test_an_error_of_a_thread_reaches_the_caller(folder: str, num_worker: int) -> None:
    batches = iter(train(train_folder=folder, num_worker=num_worker))
    next(batches)
    os.truncate(Path(folder, "code/x.bin"), 40)
    with pytest.raises(DataError, match=r"code/x.bin:\d+ .* has changed since it was opened"):
        list(batches)


def test_the_index_may_lie_in_shared_memory(folder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    shm = tmp_path_factory.mktemp("shm") / "metacache"
    train(train_folder=f"local:{folder}", use_shm=True, shm_path=str(shm))
    assert len(list(shm.iterdir())) == 1


# -- names of torch's DataLoader


@pytest.mark.parametrize("rank", [0, 1])
def test_dataset_sampler_and_collate_fn_make_the_batches_of_the_loader(rank: int) -> None:
    loader = train(rank, 2, total_steps=4)
    loader.seek(1)
    batches = [loader.collate_fn([loader.dataset[row] for row in rows]) for rows in loader.batch_sampler]
    assert same(batches, list(loader))
    assert (len(loader.batch_sampler), loader.batch_sampler.batch_size) == (3, 3)


def test_a_dataset_has_the_rows_of_an_epoch(folder: str) -> None:
    loader = train(train_folder=folder)
    assert len(loader.dataset) == loader.dataset.per_epoch > 0
    held_out = valid(valid_folder=folder, micro_num=1)["code"]
    assert len(list(held_out.batch_sampler)) == len(held_out)
    assert len(held_out.dataset) == sum(len(labels) for _, labels in held_out) == 15


def test_the_views_of_a_loader_cannot_be_set() -> None:
    loader = train()
    for name in ("dataset", "collate_fn", "batch_sampler"):
        with pytest.raises(AttributeError):
            setattr(loader, name, None)
    with pytest.raises(UserError, match=r"BatchSampler\.load_state_dict: does not exist .*\. Use train_dl\.resume"):
        loader.batch_sampler.load_state_dict({})


def test_min_length_never_empties_a_type_of_the_validation_data(tmp_path: Path) -> None:
    """A type that is silently absent would look like one that was never asked for."""
    write_bin(tmp_path / "en" / "a.bin", [[1] * 60, [2] * 10])
    write_bin(tmp_path / "cn" / "a.bin", [[3] * 49, [4] * 20])
    folder = str(tmp_path)
    assert sorted(valid(valid_folder=folder, min_length=49)) == ["cn", "en"]
    with pytest.raises(DataError) as caught:
        valid(valid_folder=folder, min_length=50)
    assert str(caught.value) == (
        f"data.min_length: 50 leaves no sample of the dataset type 'cn' in {folder}. "
        "Lower it, or remove the folder of this type"
    )


def test_the_number_of_samples_that_are_dropped_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="internlm")
    write_bin(tmp_path / "a.bin", [[1] * 60, [2] * 10, [3] * 49])
    train(train_folder=str(tmp_path), min_length=50)
    # A set: the handler of the fixture may be at both loggers.
    assert set(caplog.messages) == {
        "data.train_folder: 2 of 3 samples have fewer than data.min_length = 50 tokens and are dropped",
        "data.train_folder: 2 rows per epoch, 6.25% padding, 100.00% of the samples cut (packed)",
    }


def test_all_missing_folders_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train(train_folder=f"local:{tmp_path}/a", valid_folder=f"{tmp_path}/b")
    assert str(caught.value).splitlines() == [
        f"local:{tmp_path}/a: no such folder. Set data.train_folder to an existing folder",
        f"{tmp_path}/b: no such folder. Set data.valid_folder to an existing folder",
    ]
