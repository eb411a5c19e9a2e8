"""Control of the device, copies to it, and memory of the host for it."""

from __future__ import annotations

import pytest
import torch

from internlm import accelerator
from internlm.core.context import ParallelMode
from internlm.core.context.random import RandomStreams, mode_seeds
from internlm.core.parallel.offload import host_memory
from tests.harness.gpu_table import on_cpu_and_gpu
from tests.unit.parallel.test_offload import Block, run

DEVICE = pytest.mark.gpu("device, backend, synchronisation, cache")
COPIES = pytest.mark.gpu("pinned batches, and copies that do not block")
OFFLOADING = pytest.mark.gpu("offloading through pinned memory")


@DEVICE
def test_accelerator_finds_the_device() -> None:
    assert accelerator.device_type() == "cuda"
    assert accelerator.default_backend() == "nccl"
    assert accelerator.device_count() == torch.cuda.device_count()
    assert accelerator.current_device() == torch.empty(0, device="cuda").device
    kind = accelerator.device_kind()
    assert kind.compute_capability == torch.cuda.get_device_capability()
    assert kind.device_id() == str(torch.cuda.get_device_properties(0).uuid)
    assert accelerator.device_memory() == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.05)


@DEVICE
def test_freed_memory_is_free_again_and_the_peak_is_remembered() -> None:
    size = 2**28
    before = accelerator.free_memory()
    assert before is not None
    x = torch.zeros(size, dtype=torch.uint8, device="cuda")
    assert before - accelerator.free_memory() >= size
    assert accelerator.peak_memory() >= size
    del x
    accelerator.synchronize()
    accelerator.empty_cache()
    # What the driver keeps for its first kernel is not much.
    assert accelerator.free_memory() > before - size // 2


@pytest.mark.gpu("times of a step and of a pipeline's actions")
def test_marks_measure_the_work_of_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    start = accelerator.Mark()
    for _ in range(20):
        x @ x
    end = accelerator.Mark()
    assert end.seconds_since(start) > 20 * 2 * 4096**3 / 2e15  # no GPU computes that many operations a second


@on_cpu_and_gpu("random streams of the device")
def test_the_state_of_the_random_streams_repeats_their_numbers(device: str) -> None:
    streams = RandomStreams(mode_seeds(1024, 0, 0, 0))
    state = streams.state_dict()
    drawn = torch.rand(7, device=device)
    with accelerator.fork_rng():
        torch.manual_seed(3)
        torch.rand(5, device=device)
    after = torch.rand(7, device=device)
    streams.load_state_dict(state)
    assert torch.equal(torch.rand(7, device=device), drawn)
    assert torch.equal(torch.rand(7, device=device), after)  # as if nothing had been drawn in the block
    with streams.use(ParallelMode.TENSOR):
        assert not torch.equal(torch.rand(7), drawn.cpu())


@COPIES
def test_copies_to_the_device_do_not_block_and_arrive() -> None:
    numbers = torch.arange(2**20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = accelerator.to_device(numbers, torch.device("cuda", 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert accelerator.to_host(copy, "test").equal(numbers)
    assert accelerator.device_kind().pin(numbers).is_pinned()


@on_cpu_and_gpu("pinned batches, and copies that do not block")
def test_values_that_were_copied_ahead_need_no_host_sync(device: str) -> None:
    values = accelerator.HostValues(torch.arange(3, device=device), "test")
    before = accelerator.host_reads()
    values.begin_copy()
    assert values.read_arrived() == [0, 1, 2]
    assert accelerator.host_reads() == before


@OFFLOADING
def test_host_memory_of_offloading_is_pinned() -> None:
    (parts,) = host_memory([3 * 2**25 + 5], torch.device("cuda"))
    assert [part.nbytes for part in parts] == [2**25] * 3 + [5]
    assert all(part.is_pinned() for part in parts)


@OFFLOADING
def test_offloaded_tensors_leave_the_device() -> None:
    blocks: list[Block] = [torch.sin, torch.exp, torch.tanh, torch.sin, torch.cos, torch.sin]
    x = torch.linspace(-1, 1, 2**22, device="cuda")
    gradients, memory = [], []
    for count in (0, 5):
        leaf = x.clone().requires_grad_()
        before = torch.cuda.memory_allocated()
        y = run(blocks, leaf, count, [leaf])
        memory.append(torch.cuda.memory_allocated() - before)
        y.sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        del y
    assert torch.equal(*gradients)
    # What exp, tanh and the second sin gave; cos gave what the last block saves.
    assert memory[0] - memory[1] == 3 * x.nbytes
