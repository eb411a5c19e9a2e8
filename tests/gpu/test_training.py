"""Training on a GPU: as on the CPU, the same in every layout, without host syncs, and how fast."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch

from bench import mfu
from internlm import accelerator
from internlm.cli.main import main
from internlm.utils.errors import UserError
from internlm.verify.compare import compare
from internlm.verify.configs import Devices, make_plan
from internlm.verify.processes import run_world
from internlm.verify.run import run_rank
from tests.dist.tiny import TINY
from tests.gpu.training import STEPS, Trained, train
from tests.harness.gpu_table import FIGURES, on_cpu_and_gpu
from tests.harness.launch import torchrun
from tests.harness.pool import run_ranks

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs" / "debug" / "internlm2.py")
SYNCS, PINNED, ADAMW = "host syncs of a step", "offloading through pinned memory", "fused AdamW"
NCCL, ENDS = "NCCL process groups", "flight recorder, process groups at the end of a run"
BF16 = "model.dtype=torch.bfloat16"
#: MFU that every device with a known peak must reach.
LEAST_MFU = 0.1
FIRST_START = 120  # seconds, since each process imports torch and loads the kernels of the GPU


@functools.cache
def trained(device: str, *overrides: str) -> Trained:
    """Return the record of a run on one rank. Deterministic kernels: what differs is what the overrides change."""
    always = ("cudnn_deterministic=True", *overrides)
    (record,) = run_ranks(1, train, always, timeout=FIRST_START, device_type=device)
    return record


#: Overrides that change how a step is computed, and not what.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "recomputed": ("model.checkpoint=True",),
    "attention recomputed": ("model.checkpoint=selective",),
    "offloaded": ("model.cpu_offloading=2",),
    "overlapped": tuple(f"hybrid_zero_optimizer.overlap_sync_{what}=True" for what in ("grad", "param")),
    "fully sharded": ("parallel.zero1.fsdp=True",),
    "isp": ("parallel.tensor.mode=isp", "parallel.weight.overlap=True"),
    "compiled": ("model.compile=True",),
}
ON_GPU = [
    pytest.param(name, "cuda", marks=pytest.mark.gpu(SYNCS, *(PINNED,) * (name == "offloaded"))) for name in LAYOUTS
]
ON_CPU = [(name, "cpu") for name in ("offloaded", "fully sharded")]


@pytest.mark.parametrize(("layout", "device"), [*ON_GPU, *ON_CPU])
def test_a_layout_trains_as_the_plain_one_without_host_syncs(layout: str, device: str) -> None:
    plain, other = trained(device, BF16), trained(device, BF16, *LAYOUTS[layout])
    assert other.losses == pytest.approx(plain.losses, rel=1e-3)
    assert other.norms == pytest.approx(plain.norms, rel=2e-2)
    assert len(set(plain.losses)) == STEPS


#: Overrides that change the numbers, with the relative difference of a loss from the CPU's that rounding explains.
#: Initial values that a GPU draws may differ by rounding, too.
NUMBERS = [
    pytest.param(("model.dtype=torch.float64",), 1e-5, marks=pytest.mark.gpu(ADAMW), id="float64"),
    pytest.param(("model.dtype=torch.float32",), 1e-4, marks=pytest.mark.gpu(ADAMW), id="float32"),
    pytest.param(("model.dtype=torch.tf32",), 5e-3, marks=pytest.mark.gpu(ADAMW), id="tf32"),
    pytest.param((BF16,), 5e-3, marks=pytest.mark.gpu(ADAMW), id="bfloat16"),
    pytest.param(("model.dtype=torch.float16",), 5e-3, marks=pytest.mark.gpu(ADAMW), id="float16"),
    pytest.param((BF16, "data.use_packed_dataset=False"), 5e-3, marks=pytest.mark.gpu(SYNCS), id="padded"),
    pytest.param((BF16, "loss.label_smoothing=0.1"), 5e-3, marks=pytest.mark.gpu(SYNCS), id="label smoothing"),
    pytest.param((BF16, "model.drop_rate=0.1"), 1e-2, marks=pytest.mark.gpu(SYNCS), id="dropout"),
    pytest.param(("model.dtype=torch.float32", "optimizer.type=Muon"), 1e-3, marks=pytest.mark.gpu(SYNCS), id="Muon"),
    pytest.param(("model.dtype=torch.float32", "optimizer.type=Lion"), 1e-2, marks=pytest.mark.gpu(SYNCS), id="Lion"),
]


@pytest.mark.parametrize(("overrides", "tolerance"), NUMBERS)
def test_training_equals_that_on_the_cpu(overrides: tuple[str, ...], tolerance: float) -> None:
    ours, theirs = (trained(device, *overrides) for device in ("cuda", "cpu"))
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance)
    assert ours.norms[0] == pytest.approx(theirs.norms[0], rel=10 * tolerance)


@on_cpu_and_gpu(ADAMW, SYNCS)
def test_steps_with_too_large_a_loss_scale_are_skipped_without_a_host_sync(device: str) -> None:
    scale = ("fp16.initial_scale=1e12", "max_scale=1e12", "hysteresis=1", "backoff_factor=0.00390625")
    run = trained(device, "model.dtype=torch.float16", *(f"grad_scaler.{setting}" for setting in scale))
    assert 1 <= run.skipped < STEPS
    assert math.isfinite(run.losses[-1])


@pytest.mark.gpu(SYNCS)
def test_a_step_of_many_tokens_has_no_host_sync() -> None:
    """Torch has another backward pass of an embedding from 3072 tokens on."""
    run = trained("cuda", BF16, "data.seq_len=2048", "model.max_position_embeddings=2048")
    assert run.losses[-1] < run.losses[0]


@pytest.mark.gpu("pinned batches, and copies that do not block")
def test_batches_are_pinned() -> None:
    assert trained("cuda", BF16).is_pinned
    assert not trained("cpu", BF16).is_pinned


@on_cpu_and_gpu("memory report")
def test_the_memory_report_has_the_bytes_of_the_plan(device: str) -> None:
    run = trained(device, BF16)
    assert sum(run.held.values()) > 0
    assert run.held == {row: run.plan[row] for row in run.held}
    assert ("peak of the device" in run.report) is (device == "cuda")


def _world(rank: int, world_size: int) -> tuple[int | None, str | None, str, float]:
    device = accelerator.current_device()
    value = torch.ones((), device=device)
    torch.distributed.all_reduce(value)
    return device.index, accelerator.device_kind().device_id(), torch.distributed.get_backend(), value.item()


@pytest.mark.gpu(NCCL, "the device of a process")
def test_each_process_has_a_device_of_its_own_and_nccl_connects_them() -> None:
    count = torch.cuda.device_count()
    indices, identifiers, backends, sums = zip(
        *run_ranks(count, _world, timeout=FIRST_START, device_type="cuda"), strict=True
    )
    assert indices == tuple(range(count))
    assert len(set(identifiers)) == count
    assert set(backends) == {"nccl"}
    assert set(sums) == {float(count)}


@pytest.mark.gpu("a device that two ranks share")
def test_nccl_is_refused_for_two_ranks_on_one_device() -> None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    job = torchrun(2, ROOT / "train.py", "--config", DEBUG, env={"CUDA_VISIBLE_DEVICES": first}, cwd=ROOT)
    assert job.returncode
    assert "but NCCL refuses several ranks on one device" in job.stderr
    assert job.left_behind == 0


@pytest.mark.gpu(NCCL, ENDS)
def test_training_by_nccl_learns_resumes_and_ends(tmp_path: Path) -> None:
    options = [
        BF16,
        "ckpt.enable_save_ckpt=True",
        f"ckpt.save_ckpt_folder={tmp_path}/ckpt",
        "ckpt.checkpoint_every=10",
        f"log_folder={tmp_path}/run",
        "data.total_steps=20",
    ]
    arguments = [word for option in options for word in ("--set", option)]
    for _ in range(2):  # the second run resumes at the last step and has nothing left to do
        job = torchrun(torch.cuda.device_count(), ROOT / "train.py", "--config", DEBUG, *arguments, cwd=ROOT)
        assert job.returncode == 0, job.stderr
        assert job.left_behind == 0
        assert "destroy_process_group" not in job.stderr  # a warning of torch where it was not called
    (records,) = [p.read_text().splitlines() for p in tmp_path.glob("run/*/*/metrics.jsonl") if p.stat().st_size]
    losses = [json.loads(line)["loss"] for line in records if '"loss"' in line]
    assert losses[-1] < losses[0]
    assert "resumed from" in job.stderr


#: Print how many collectives the flight recorder has kept.
RECORDER = """
import pickle
import torch
from internlm.initialize import launch_from_torch
launch_from_torch(config=CONFIG)
torch.distributed.all_reduce(torch.ones((), device="cuda"))
torch.cuda.synchronize()
print("recorded", len(pickle.loads(torch._C._distributed_c10d._dump_nccl_trace())["entries"]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.gpu(ENDS)
def test_the_flight_recorder_keeps_collectives(tmp_path: Path) -> None:
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER.replace("CONFIG", repr(DEBUG)))
    job = torchrun(1, script, env={"PYTHONPATH": str(ROOT)})
    assert job.returncode == 0, job.stderr
    assert int(job.stdout.partition("recorded ")[2].split()[0]) > 0


@pytest.mark.gpu("`internlm verify --device cuda`")
def test_verify_passes_on_one_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    options = ("--device", "cuda", "--world", "1", "--steps", "2", "--json", str(report))
    assert main(["verify", DEBUG, *options]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "PASS"
    assert json.loads(report.read_text())["device"] == "cuda"


#: Overrides of layouts of two ranks, with the row of doc/gpu.md that each shows.
PAIRS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data parallel, overlapped": ("collectives that overlap with a product", LAYOUTS["overlapped"]),
    "mtp": ("collectives that overlap with a product", ("parallel.tensor.size=2",)),
    "isp": ("weight prefetching", (*LAYOUTS["isp"], "parallel.tensor.size=2", "parallel.weight.size=2")),
    "1F1B": ("channels between pipeline stages", ("parallel.pipeline.size=2",)),
    "ZB-V": (
        "channels between pipeline stages",
        ("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "model.num_chunks=2", "model.num_layers=4"),
    ),
}
PAIRS_ON_GPUS = [pytest.param(name, "cuda", marks=pytest.mark.gpu(row, NCCL)) for name, (row, _) in PAIRS.items()]


@pytest.mark.parametrize(("pair", "device"), [*PAIRS_ON_GPUS, ("isp", "cpu")])
def test_two_ranks_equal_one(pair: str, device: str) -> None:
    count = torch.cuda.device_count() if device == "cuda" else None
    if count == 1:
        pytest.skip("needs 2 GPUs, this machine has 1")
    plan = make_plan(TINY, ("data.micro_num=2", *PAIRS[pair][1]), 2, steps=2, devices=Devices(device, count))
    common = {"timeout": FIRST_START, "device_type": device}
    (alone,) = run_ranks(1, run_rank, plan.reference, plan.seed, plan.steps, plan.data_size, **common)
    ranks = run_ranks(2, run_rank, plan.config, plan.seed, plan.steps, **common)
    assert compare(plan.config, alone, ranks).failures == []


# -- speed


@pytest.mark.parametrize(
    ("model", "device"),
    [
        ("tiny", "cpu"),
        pytest.param("llama-1B", "cuda", marks=pytest.mark.gpu("MFU of a model of 1.1 billion parameters")),
    ],
)
def test_speed_and_mfu(model: str, device: str, record_property: pytest.RecordProperty) -> None:
    work = mfu.MODELS[model], mfu.STEPS if device == "cuda" else 1, mfu.MICRO_BATCHES
    try:
        if device == "cpu":
            (speed,) = run_ranks(1, mfu.measure, *work)
        else:  # in a process that ends, and gives its memory back
            (speed,) = run_world(1, mfu.measure, work, mfu.TIMEOUT, device)
    except UserError as error:
        if "of memory, but only" not in str(error):
            raise
        pytest.skip(str(error))
    record_property(FIGURES, str(speed))
    assert math.isfinite(speed.loss)
    assert speed.tokens_per_second == pytest.approx(work[2] * work[0].tokens / speed.step_seconds)
    is_listed = device == "cuda" and mfu.peak_flops(torch.cuda.get_device_name()) is not None
    assert (speed.mfu is not None) is is_listed
    if speed.mfu is not None:
        assert LEAST_MFU < speed.mfu < 1
