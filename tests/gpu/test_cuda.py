"""What differs on CUDA. Run on a machine that has it: ``make test-gpu``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from internlm import accelerator
from internlm.core.parallel.dropout import keep_mask
from internlm.core.parallel.offload import host_memory
from internlm.ops import PackedSequences, attention, gemm, why_unavailable
from tests.harness.launch import torchrun

pytestmark = pytest.mark.gpu
LENGTHS = [3, 64, 17, 200, 1]


@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa", "auto"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_equals_reference(backend: str, kv_heads: int) -> None:
    if backend != "auto" and (reason := why_unavailable(backend, "cuda", torch.bfloat16, 64)):
        pytest.skip(reason)
    torch.manual_seed(0)
    total = sum(LENGTHS)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    sequences = PackedSequences.from_cu_seqlens(cu)
    shapes = [(total, 8, 64), (total, kv_heads, 64), (total, kv_heads, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    ours = attention(*inputs, sequences, backend=backend)
    exact = attention(*doubles, sequences, backend="reference")
    grad = torch.randn_like(ours)
    ours.backward(grad)
    exact.backward(grad.double())
    torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)
    for x, y in zip(inputs, doubles, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
def test_attention_backward_is_deterministic_if_asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_unavailable(backend, "cuda", torch.bfloat16):
        pytest.skip(reason)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sequences = PackedSequences.uniform(2, 4096, "cuda")
    inputs = [
        torch.randn(8192, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    ]
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            found.append(torch.autograd.grad(attention(*inputs, sequences, backend=backend).square().sum(), inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(again, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [True, False])
def test_weight_gradient_is_added_in_float32(dtype: torch.dtype, accumulate: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(1000, size, device="cuda", generator=generator).to(dtype) for size in (292, 1001))
    out = torch.randn(1001 * 292 + 1, device="cuda", generator=generator)[1:].view(1001, 292)  # not aligned
    exact = dy.double().t() @ x.double() + (out.double() if accumulate else 0)
    gemm.accumulate_grad_weight(out, dy, x, accumulate)
    assert ((out - exact).norm() / exact.norm()).item() < 1e-5


def test_dropout_masks_are_those_of_the_cpu() -> None:
    masks = [keep_mask(2**63 - 5, range(7, 1007), 1001, 6554, torch.device(device)) for device in ("cuda", "cpu")]
    assert torch.equal(masks[0].cpu(), masks[1])


def test_accelerator_finds_the_device() -> None:
    assert accelerator.device_type() == "cuda"
    assert accelerator.default_backend() == "nccl"
    assert accelerator.device_count() == torch.cuda.device_count()
    kind = accelerator.device_kind()
    assert kind.compute_capability == torch.cuda.get_device_capability()
    assert kind.device_id() == str(torch.cuda.get_device_properties(0).uuid)
    assert accelerator.device_memory() == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.05)


def test_marks_measure_the_work_of_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    start = accelerator.Mark()
    for _ in range(20):
        x @ x
    end = accelerator.Mark()
    assert end.seconds_since(start) > 20 * 2 * 4096**3 / 2e15  # no GPU computes that many operations a second


def test_host_memory_of_offloading_is_pinned() -> None:
    (parts,) = host_memory([3 * 2**25 + 5], torch.device("cuda"))
    assert [part.nbytes for part in parts] == [2**25] * 3 + [5]
    assert all(part.is_pinned() for part in parts)


def test_copies_to_the_device_do_not_block_and_arrive() -> None:
    numbers = torch.arange(2**20)
    assert accelerator.to_device(numbers, torch.device("cuda", 0)).cpu().equal(numbers)
    assert accelerator.device_kind().pin(numbers).is_pinned()


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.tf32", "torch.bfloat16"])
def test_training_by_nccl_learns_and_resumes(tmp_path: Path, dtype: str) -> None:
    options = [
        f"model.dtype={dtype}",
        "ckpt.enable_save_ckpt=True",
        f"ckpt.save_ckpt_folder={tmp_path}/ckpt",
        "ckpt.checkpoint_every=10",
        f"log_folder={tmp_path}/run",
        "data.total_steps=20",
    ]
    arguments = [word for option in options for word in ("--set", option)]
    processes = torch.cuda.device_count()
    for _ in range(2):  # the second run resumes at the last step and has nothing left to do
        job = torchrun(processes, "train.py", "--config", "configs/debug/internlm2.py", *arguments, timeout=240)
        assert job.returncode == 0, job.stderr
    (records,) = [p.read_text().splitlines() for p in tmp_path.glob("run/*/*/metrics.jsonl") if p.stat().st_size]
    losses = [json.loads(line)["loss"] for line in records if '"loss"' in line]
    assert losses[-1] < losses[0]
    assert "resumed from" in job.stderr
