"""Dry runs of single ranks: all figures equal their formulas, and what would stall a device is named.

They run in a process of their own, since the pretended device is registered for the rest of a process.
"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from internlm.accelerator import device_type, to_host
from internlm.cli.main import main
from internlm.core.parallel.ledger import Entry
from internlm.dryrun.call_order import Call, order_problems
from internlm.dryrun.findings import not_compared, problems
from internlm.dryrun.one_rank import DryRun, dry_config, run_rank
from internlm.model import blocks
from internlm.ops.cpu import cpu_gemm
from internlm.train.hooks.stop import REQUESTS
from internlm.utils.errors import UserError
from internlm.utils.torch_private import in_backward
from tests.dist import test_pipeline_models as own_models
from tests.unit.dryrun.layouts import LAYOUTS, SMALL, WIDE, split_over, stages

assert own_models  # importing it registers models

T = TypeVar("T")
ROOT = Path(__file__).parents[3]


class Apart:
    """Process that runs dry runs."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return self.pool.submit(function, *arguments).result(timeout=120)

    def dry(self, world: int, rank: int, *overrides: str, steps: int = 2) -> DryRun:
        return self.call(_dry, world, rank, overrides, steps)

    def command(self, *arguments: str) -> tuple[Any, str, str]:
        """Return the exit code of ``internlm dryrun``, and what it printed."""
        return self.call(_command, arguments)


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        # The first backward pass of a process fixes for which devices autograd has threads: none here.
        pool.submit(_train_on_the_host).result()
        yield Apart(pool)


def _train_on_the_host() -> None:
    torch.ones(2, requires_grad=True).sum().backward()


def _dry(world: int, rank: int, overrides: Sequence[str], steps: int) -> DryRun:
    keys = ("model.dtype=torch.bfloat16", *overrides)
    return run_rank(dry_config(SMALL, keys, world), world, rank, steps)


def _command(arguments: Sequence[str]) -> tuple[Any, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code: Any = main(["dryrun", *arguments])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.wide] if name in WIDE else []) for name in LAYOUTS]
)
def test_every_layout_agrees_with_its_formulas(layout: str, apart: Apart) -> None:
    world, rank, overrides = LAYOUTS[layout]
    run = apart.dry(world, rank, *overrides)
    assert problems([run]) == []
    assert run.traffic  # the comparison was not empty
    assert run.host_reads == {"metrics of a step": 1}
    assert run.has_attention_kernel


DEBUG = sorted((ROOT / "configs" / "debug").glob("*.py"))
DEBUG_LAYOUTS = {"mtp": split_over("mtp", 2), "isp": split_over("isp", 2, 2), "1F1B": stages(2)}


def _debug_rows() -> Iterator[object]:
    for file, layout in itertools.product(DEBUG, DEBUG_LAYOUTS):
        marks = [] if (file.stem, layout) == ("olmo2", "mtp") else [pytest.mark.wide]
        yield pytest.param(file, layout, marks=marks, id=f"{file.stem}, {layout}")


@pytest.mark.parametrize(("file", "layout"), list(_debug_rows()))
def test_debug_configs(file: Path, layout: str, apart: Apart) -> None:
    run = apart.call(_dry_file, file, DEBUG_LAYOUTS[layout])
    assert problems([run]) == []
    assert not_compared(run) == []


def _dry_file(file: Path, overrides: Sequence[str]) -> DryRun:
    return run_rank(dry_config(file, overrides, 2), 2, 1, 2)


def test_host_syncs_and_kernels_by_number_of_micro_batches(apart: Apart) -> None:
    one, two = apart.dry(8, 0), apart.dry(8, 0, "data.micro_num=2")
    assert one.host_reads == two.host_reads
    # Of 2 layers wqkv, wo, w13 and w2: each forward and for both gradients. Of the head the logits of two chunks of
    # tokens, and both gradients. And the sums by dataset type.
    products = 3 * 2 * 4 + 2 + 2 + 1
    assert [sum(run.kernels[name] for name in run.flops) for run in (one, two)] == [products, 2 * products]


def test_the_exchange_of_requests_ends_each_step(apart: Apart) -> None:
    assert apart.dry(8, 0).events[-1] == Call(tuple(range(8)), "all-reduce", 8 * len(REQUESTS))


def test_ranks_of_a_job_call_the_same_collectives_in_the_same_order(apart: Apart) -> None:
    overrides = (*stages(2, "hybrid_zero_optimizer.overlap_sync_param=True"), *split_over("msp", 2))
    runs = [apart.dry(8, rank, *overrides) for rank in (0, 1, 2, 4)]
    assert problems(runs) == []
    groups = {event.group for run in runs for event in run.events}
    assert {(0, 1), (0, 2), (0, 4)} < groups


def test_a_pipeline_of_ones_own_model(apart: Apart) -> None:
    overrides = stages(2, "data.use_packed_dataset=False")
    run = apart.dry(2, 1, "model_type=FORETOLD", *overrides)
    assert problems([run]) == []
    assert not_compared(run) == [
        "rank 1: not compared: activations, peak, traffic and FLOP, because the model has no formulas"
    ]
    message = r"shape is unknown\. Give the model a method hidden_like\(inputs\) that returns it"
    with pytest.raises(UserError, match=message):
        apart.dry(2, 1, "model_type=CHAIN", *overrides)


# -- the order of collectives


def _all_reduce(*ranks: int) -> Call:
    return Call(ranks, "all-reduce", 8)


def test_collectives_in_different_orders_are_named() -> None:
    whole, pair = _all_reduce(0, 1, 2), _all_reduce(0, 1)
    assert order_problems({0: [whole, pair], 1: [whole, pair], 2: [whole]}) == []
    assert order_problems({0: [whole, pair], 1: [pair, whole]}) == [
        "ranks 0 and 1, collectives: number 0 is all-reduce of 8 bytes over ranks 0, 1, 2 on one and "
        "all-reduce of 8 bytes over ranks 0, 1 on the other"
    ]
    assert order_problems({0: [whole], 2: [whole, whole]}) == [
        "ranks 0 and 2, collectives: 1 on one and 2 on the other"
    ]


def test_transfers_are_compared_by_direction() -> None:
    there, back = Call((0, 1), "transfer", 4), Call((1, 0), "transfer", 4)
    assert order_problems({0: [there, back], 1: [back, there]}) == []
    (problem,) = order_problems({0: [there], 1: [Call((0, 1), "transfer", 8)]})
    assert problem.startswith("ranks 0 and 1, transfers from 0 to 1: number 0 is transfer of 4 bytes")


# -- faults


def _reads_a_value(x: Tensor) -> None:
    if x.sum() > 0:
        x.add_(1)


def _copies_to_the_host(x: Tensor) -> None:
    x.detach().cpu()


def _computes_on_the_host(x: Tensor) -> None:
    torch.ones(3)


def _copies_a_host_tensor(x: Tensor) -> None:
    if not in_backward():
        torch.tensor([1.0, 2.0], device=x.device)


def _calls_a_kernel_of_the_cpu(x: Tensor) -> None:
    cpu_gemm.matmul(x, x.mT)


def _reads_twice(x: Tensor) -> None:
    to_host(x.detach(), "a second look")


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (_reads_a_value, "reads a value of a device tensor (.item(), int(), if)"),
        (_copies_to_the_host, "copies a device tensor to the host (aten::_to_copy). Use accelerator.to_host"),
        (_computes_on_the_host, "computes on the host (aten::ones). Create the tensor on the device"),
        (_copies_a_host_tensor, "copies a host tensor with a blocking copy. Use accelerator.to_device"),
        (_calls_a_kernel_of_the_cpu, "runs a kernel of internlm.ops.cpu on device tensors"),
        (_reads_twice, "a step waits more than once for the device: a second look (4), metrics of a step (1)"),
    ],
)
def test_a_planted_fault_is_named(plant: Callable[[Tensor], None], message: str, apart: Apart) -> None:
    found = [line for line in problems([apart.call(_dry_with, plant)]) if message in line]
    assert len(found) == 1
    if plant is not _reads_twice:
        line = plant.__code__.co_firstlineno + 1 + (plant is _copies_a_host_tensor)
        assert found[0].startswith(f"rank 0: tests/unit/dryrun/test_dryrun.py:{line}: ")


def _dry_with(plant: Callable[[Tensor], None]) -> DryRun:
    """Run a step in which ``plant`` is called before each gated activation."""
    gated = blocks.gated

    def planted(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        plant(x)
        return gated(x, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "gated", planted)
        return _dry(8, 0, (), 1)


def _needs_values(x: Tensor) -> None:
    x.nonzero()


def _mixes_devices(x: Tensor) -> None:
    x * torch.ones(x.shape)


@pytest.mark.parametrize("plant", [_needs_values, _mixes_devices])
def test_an_operator_that_cannot_run_ends_the_dry_run_in_words(plant: Callable[[Tensor], None], apart: Apart) -> None:
    where = rf"^tests/unit/dryrun/test_dryrun\.py:{plant.__code__.co_firstlineno + 1}: "
    with pytest.raises(UserError, match=where + r"cannot run on the pretended device \("):
        apart.call(_dry_with, plant)


def test_wrong_traffic_and_memory_are_named(apart: Apart) -> None:
    run = apart.dry(8, 0, steps=1)
    assert run.expected is not None
    key = next(iter(run.expected))
    run.expected = {**run.expected, key: Entry(1, 2)}
    run.plan = {**run.plan, "parameters": 3, "activations": 4}
    first, second, third, fourth = problems([run])
    assert first.endswith(f"parameters take {run.held['parameters']} bytes, 3 by formula")
    assert second.startswith("rank 0: activations take ")
    assert third.startswith("rank 0: the peak is ")
    assert fourth.endswith(", by formula 1 calls, 2 bytes")


def test_the_process_is_as_before(apart: Apart) -> None:
    assert apart.call(_afterwards) == ("cpu", Tensor, "cpu")


def _afterwards() -> tuple[str, type, str]:
    _dry(8, 0, (), 1)
    tensor = torch.ones(2)
    return tensor.device.type, type(tensor), device_type()


# -- the command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "small.py"
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in SMALL.items()))
    return file


def test_the_command_prints_a_table_and_writes_json(config: Path, tmp_path: Path, apart: Apart) -> None:
    file = tmp_path / "out.json"
    overrides = [argument for pair in stages(2) for argument in ("--set", pair)]
    code, text, _ = apart.command(str(config), "--world", "8", "--stages", "--json", str(file), *overrides)
    assert (code, text.splitlines()[-1]) == (0, "Everything agrees with its formula")
    assert "rank 0 of 8, stage 0" in text
    assert "rank 4 of 8, stage 1" in text
    written = json.loads(file.read_text())
    assert [run["stage"] for run in written["runs"]] == [0, 1]
    assert written["problems"] == []
    for run in written["runs"]:
        assert run["traffic"] == run["expected"] != {}


def test_what_cannot_be_compared_is_said(config: Path, apart: Apart) -> None:
    arguments = "--world", "8", "--steps", "1", "--set", "model.attention_backend=reference"
    code, text, _ = apart.command(str(config), *arguments)
    assert code == 0
    assert text.splitlines()[-2:] == [
        "rank 0: not compared: activations, peak and FLOP, because attention does not run as one operator",
        "Everything that was compared agrees",
    ]


#: Runs the command, and prints the peak of its process: the kernel's ``ru_maxrss`` would begin with that of pytest.
WITH_PEAK = r"""
import re, sys
from pathlib import Path
from internlm.cli.main import main

code = main(sys.argv[1:])
print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


@pytest.mark.wide
@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("7B_internlm2.py", ("--world", "1024", "--rank", "517")),
        ("7B_isp_sft.py", ("--world", "64", "--rank", "63", "--steps", "1")),
    ],
)
def test_a_model_at_its_own_size_takes_no_more_than_2_gb(file: str, layout: tuple[str, ...]) -> None:
    """Takes a minute: all operators of two steps of 32 layers run, if only for shapes."""
    command = [sys.executable, "-c", WITH_PEAK, "dryrun", str(ROOT / "configs" / file), *layout]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    *_, verdict, peak = run.stdout.splitlines()
    assert verdict == "Everything agrees with its formula"
    assert int(peak) * 2**10 <= 2 * 10**9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "8", "--rank", "8"], "--rank: 8 is not a rank of the run. Pass a rank below --world, 8"),
        (["--world", "8", "--set", "parallel.tensor.size=3"], "parallel.tensor.size"),
        (["--world", "2", "--set", f"model.hidden_size={2**62}"], f"model.hidden_size: {2**62} makes a parameter with"),
        (["--world", "2", "--set", "model.mlp_ratio=1e300"], "model.mlp_ratio: 1e+300 makes a parameter with more"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], message: str, config: Path, apart: Apart) -> None:
    code, _, text = apart.command(str(config), *arguments)
    assert code == 2
    assert message in text
