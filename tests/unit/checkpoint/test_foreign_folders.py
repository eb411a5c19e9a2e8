"""Folders with checkpoints of other software are named, and never taken for empty ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from internlm.checkpoint.foreign_folders import (
    ForeignCheckpoint,
    NamesIn,
    find_foreign,
    foreign_save_folder,
    foreign_source,
)
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.saved_checkpoint import open_checkpoint, plain_names
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.samples import save

OLDER, HUGGING_FACE = "older versions of InternEvo", "Hugging Face Transformers"
DCP = "torch.distributed.checkpoint"


def names_in(root: Path) -> NamesIn:
    return partial(plain_names, LocalStorage(root))


def make(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return root


#: Files of a folder, and what is found in it: software, path and step.
FOREIGN: dict[str, tuple[tuple[str, ...], tuple[str, str, int | None]]] = {
    "steps of InternEvo": (
        ("1/model_tp0_pp0.pt", "2/model_tp0_pp0.pt", "10/model_tp0_pp0.pt", "10/context.pt"),
        (OLDER, "10", 10),
    ),
    "its newest step failed before a model": (("1/model_tp1_pp3.pt", "2/log.txt"), (OLDER, "1", 1)),
    "a step of InternEvo": (("model_tp0_pp0.pt", "topo_tp0_pp0.json", "optimizer_tp0_pp0_zo0.pt"), (OLDER, "", None)),
    "isp": (("5/model_wp0_pp0.pt", "5/optimizer_wp0_pp0_zo0.pt"), (OLDER, "5", 5)),
    "topology alone": (("5/topo_tp0_pp0.json",), (OLDER, "5", 5)),
    "context alone": (("5/context.pt",), (OLDER, "5", 5)),
    "schedule alone": (("5/schedulder.pt",), (OLDER, "5", 5)),
    "sampler alone": (("5/sampler_0.pt",), (OLDER, "5", 5)),
    "model config alone": (("5/model_config.pt",), (OLDER, "5", 5)),
    "snapshots of InternEvo": (
        ("snapshot/0/model_tp0_pp0.pt", "snapshot/1/model_tp0_pp0.pt"),
        (OLDER, "snapshot/1", None),
    ),
    "steps come before snapshots": (("snapshot/1/context.pt", "3/context.pt"), (OLDER, "3", 3)),
    "a model of Hugging Face": (("config.json", "model.safetensors"), (HUGGING_FACE, "", None)),
    "shards of Hugging Face": (
        ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        (HUGGING_FACE, "", None),
    ),
    "pickles of Hugging Face": (("config.json", "pytorch_model.bin"), (HUGGING_FACE, "", None)),
    "a run of Hugging Face": (
        ("checkpoint-500/config.json", "checkpoint-500/model.safetensors", "checkpoint-1000/trainer_state.json"),
        (HUGGING_FACE, "checkpoint-500", 500),
    ),
    "a run of Megatron-LM": (
        ("latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"),
        ("Megatron-LM", "iter_0000100", 100),
    ),
    "the file of Megatron-LM alone": (("latest_checkpointed_iteration.txt",), ("Megatron-LM", "", None)),
    "an iteration of Megatron-LM": (("mp_rank_00_001/model_optim_rng.pt",), ("Megatron-LM", "", None)),
    "its distributed format": (
        ("iter_0000200/.metadata", "iter_0000200/__0_0.distcp", "iter_0000200/common.pt"),
        ("Megatron-LM", "iter_0000200", 200),
    ),
    "a run of DeepSpeed": (
        ("latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt", "global_step30/x_optim_states.pt"),
        ("DeepSpeed", "global_step30", 30),
    ),
    "a step of DeepSpeed": (("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",), ("DeepSpeed", "", None)),
    "Llama": (("consolidated.00.pth", "params.json", "tokenizer.model"), ("Llama's release", "", None)),
    "torch alone": ((".metadata", "__0_0.distcp"), (DCP, "", None)),
}

#: Files of folders that hold nothing foreign.
OTHERS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "a checkpoint of format 1": (".metadata", "__0_0.distcp", "state.json", "COMMITTED"),
    "a run of format 1": ("step-4/.metadata", "step-4/__0_0.distcp", "step-4/state.json", "step-4/COMMITTED"),
    "records of runs": ("2024/log.txt", "internlm/metrics.jsonl", "config.json", "latest"),
    "an adapter's config": ("config.json", "notes.bin"),
    "names that contain such a name": ("1.old/model_tp0_pp0.pt", "my_iter_10/mp_rank_00", "x.metadata", "y.distcp"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_folders_are_found(name: str, tmp_path: Path) -> None:
    files, expected = FOREIGN[name]
    assert find_foreign(names_in(make(tmp_path, *files))) == ForeignCheckpoint(*expected)


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is(name: str, tmp_path: Path) -> None:
    assert find_foreign(names_in(make(tmp_path, *OTHERS[name]))) is None


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert find_foreign(names_in(tmp_path / "none")) is None


def test_the_error_of_a_save_folder_names_the_newest_step(tmp_path: Path) -> None:
    make(tmp_path, *(f"{step}/model_tp0_pp0.pt" for step in (1, 2, 3)))
    assert str(foreign_save_folder(str(tmp_path), names_in(tmp_path))) == (
        f"{tmp_path}: holds no checkpoint of this version to resume from, but checkpoints in the format of older "
        "versions of InternEvo (the newest: 3/, step 3). Choose another ckpt.save_ckpt_folder, or set "
        "ckpt.auto_resume=False to start a new run in this one"
    )


def test_the_error_of_a_source_names_its_format(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "model.safetensors")
    assert str(foreign_source(str(tmp_path), names_in(tmp_path))) == (
        f"{tmp_path}: not a checkpoint of this version: it holds a checkpoint in the format of Hugging Face "
        "Transformers. Choose a step-N folder that a run has saved, or set ckpt.load_ckpt_info.ckpt_type='hf' (to make "
        "a checkpoint of it: internlm convert from-hf)"
    )


@pytest.mark.parametrize(
    ("folder", "files", "expected"),
    [
        (
            "7",
            ("model_tp0_pp0.pt",),
            f"it holds a checkpoint in the format of {OLDER}.*from-internevo",
        ),
        ("dcp", (".metadata", "__0_0.distcp"), f"it holds a checkpoint in the format of {DCP}"),
        ("step-7", (".metadata", "__0_0.distcp"), "unfinished: the save was interrupted"),
        ("step-7", ("config.json", "model.safetensors"), f"it holds a checkpoint in the format of {HUGGING_FACE}"),
    ],
)
def test_reading_a_foreign_folder(folder: str, files: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(LocalStorage(make(tmp_path / folder, *files).parent), folder)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "step-7"
    file.write_text("")
    with pytest.raises(CheckpointError, match=f"^{file}: is not a folder, or is below a file. Choose a step-N folder"):
        open_checkpoint(LocalStorage(tmp_path), "step-7")


def test_a_folder_of_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "snapshot-0"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    expected = "runs: is a folder of checkpoints, with step-10, step-9, snapshot-0. Pass one of them, such as "
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(LocalStorage(tmp_path), "runs")


def test_a_complete_checkpoint_is_read_whatever_lies_beside_it(tmp_path: Path) -> None:
    make(save(tmp_path / "step-7", {}, 7), "config.json", "model.safetensors")
    assert open_checkpoint(LocalStorage(tmp_path), "step-7").state.train_state.step == 7
