"""The table of CPU kernels: the rule, the user's choice, the measurement and the cache file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internlm.accelerator import processor
from internlm.ops.cpu import cpu_gemm, kernel_choice, kernel_start, kernel_timing
from internlm.ops.cpu.kernel_choice import CASES, KERNELS, Case, forced, from_plain, rule, to_plain
from internlm.utils.errors import ConfigError
from tests.unit.ops.parity import randn, relative_error

XEON = "GenuineIntel 6 207 avx2 avx512f avx512_bf16 amx_bf16 torch:AVX512"
OLD_XEON = "GenuineIntel 6 85 avx2 avx512f torch:AVX512"
ZEN = "AuthenticAMD 26 2 avx2 avx512f avx512_bf16 torch:AVX512"
ARM = "0x41 0xd40 asimd sve bf16 torch:DEFAULT"


@pytest.fixture(autouse=True)
def _installed_table() -> Iterator[None]:
    """Put back the table of the test session."""
    yield
    kernel_choice.install(None)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process group of one rank, no forced kernels, small products to measure; yields the cache file."""
    monkeypatch.delenv(processor.KERNELS_VARIABLE)
    monkeypatch.setenv(processor.CACHE_VARIABLE, str(tmp_path))
    for name, value in (("_TOKENS", 64), ("_SHAPES", ((64, 64),)), ("_LENGTH", 32), ("_REPEATS", 2)):
        monkeypatch.setattr(kernel_timing, name, value)
    monkeypatch.setattr(kernel_start, "_by_processor", {})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield tmp_path / "cpu_kernels.json"
    dist.destroy_process_group()


# -- the rule


@pytest.mark.parametrize(
    ("processor_type", "large", "of_bf16"),
    [
        (XEON, dict.fromkeys(("linear", "grad_input", "grad_weight"), "torch") | {"attention": "sdpa"}, "bfloat16"),
        (OLD_XEON, dict.fromkeys(("linear", "grad_input", "grad_weight"), "torch") | {"attention": "sdpa"}, "float32"),
        (ZEN, dict.fromkeys(("linear", "grad_input", "grad_weight"), "onednn") | {"attention": "blocked"}, "bfloat16"),
        (ARM, dict.fromkeys(("linear", "grad_input", "grad_weight"), "onednn") | {"attention": "blocked"}, "bfloat16"),
    ],
)
def test_rule_by_processor(processor_type: str, large: dict[str, str], of_bf16: str) -> None:
    table = rule(processor_type)
    one_thread = {case: kernel for case, kernel in table.items() if case.large and not case.threaded}
    assert {case.operation: kernel for case, kernel in one_thread.items() if case.dtype == "float32"} == large
    assert one_thread[Case("grad_weight", "bfloat16", True, False)] == of_bf16


@pytest.mark.parametrize("processor_type", [XEON, ZEN, ARM])
def test_small_cases_have_the_same_kernels_everywhere(processor_type: str) -> None:
    small = {case: kernel for case, kernel in rule(processor_type).items() if not case.large and not case.threaded}
    assert small == {case: "sdpa" if case.operation == "attention" else KERNELS[case[:2]][0] for case in small}
    assert len(small) == len(KERNELS)


@pytest.mark.parametrize("processor_type", [XEON, ZEN, ARM])
@pytest.mark.parametrize("fastest", [0, 1])
@pytest.mark.usefixtures("alone")
def test_no_choice_picks_a_kernel_that_collapses_on_a_busy_machine(
    processor_type: str, fastest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever kernel wins the measurement on an idle machine, attention on several threads has few regions."""
    times = [2.0 - fastest, 1.0 + fastest]
    monkeypatch.setattr(kernel_timing, "shortest", lambda runs, end: times[: len(runs)])
    by_rule = rule(processor_type)
    for table in (by_rule, {**by_rule, **kernel_timing.measure(by_rule, torch.float32)}):
        assert {kernel for case, kernel in table.items() if case[0] == "attention" and case.threaded} == {"sdpa"}
        assert not kernel_choice.collapses(table)
    assert kernel_choice.collapses({**by_rule, **forced("attention=blocked")})


def test_processor_type_of_this_machine_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    first = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nflags\t\t: fpu avx512_bf16 avx2\n"
    )
    cpuinfo.write_text(f"{first}\n{first.replace('26', '99')}")
    capability = torch.backends.cpu.get_cpu_capability()
    assert processor.processor_type(cpuinfo) == f"AuthenticAMD 26 2 avx2 avx512_bf16 torch:{capability}"
    assert processor.processor_type(tmp_path / "missing")


def test_processor_name_for_reports_is_that_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9555\n")
    assert processor.processor_name(tmp_path / "cpuinfo") == "AMD EPYC 9555"
    assert processor.processor_name(tmp_path / "missing")


# -- the user's choice


def test_forced_kernels_hold_for_all_sizes_and_threads() -> None:
    table = forced("gemm=torch, attention=sdpa")
    assert {(case.operation, case.dtype): kernel for case, kernel in table.items()} == {
        ("linear", "float32"): "torch",
        ("grad_input", "float32"): "torch",
        ("grad_weight", "float32"): "torch",
        ("attention", "float32"): "sdpa",
    }
    assert len(table) == 4 * 4
    assert set(forced("grad_weight=bfloat16").items()) == {
        (case, "bfloat16") for case in CASES if case[:2] == ("grad_weight", "bfloat16")
    }


@pytest.mark.parametrize("value", ["", "measure", "rule"])
def test_modes_force_nothing(value: str) -> None:
    assert forced(value) == {}


@pytest.mark.parametrize("value", ["gemm=blocked", "conv=torch", "fastest", "gemm=torch,,"])
def test_unknown_kernels_are_refused_with_those_that_exist(value: str) -> None:
    with pytest.raises(ConfigError, match=r"INTERNLM_CPU_KERNELS: .* names no operation and kernel") as error:
        forced(value)
    assert "linear=onednn|torch" in str(error.value)


@pytest.mark.parametrize("kernel", ["onednn", "torch"])
def test_each_kernel_of_a_linear_layer_is_right(kernel: str) -> None:
    kernel_choice.install({**rule(ZEN), **forced(f"gemm={kernel}")})
    x, weight, dy = randn(130, 96).detach(), randn(160, 96, seed=1).detach(), randn(130, 160, seed=2).detach()
    out = torch.ones(160, 96)
    cpu_gemm.accumulate_grad_weight(out, dy, x)
    assert relative_error(cpu_gemm.linear(x, weight), x.double() @ weight.double().t()) < 1e-6
    assert relative_error(cpu_gemm.grad_input(dy, weight), dy.double() @ weight.double()) < 1e-6
    assert relative_error(out, 1 + dy.double().t() @ x.double()) < 1e-6


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kernel", KERNELS["grad_weight", "bfloat16"])
def test_weight_gradients_of_bfloat16_are_summed_in_float32(kernel: str, accumulate: bool) -> None:
    x, dy = (randn(300, n, dtype=torch.bfloat16, seed=n).detach() for n in (64, 96))
    out = torch.full((96, 64), 1000.0)  # in bfloat16 the sum would be a multiple of 4
    before = torch.backends.mkldnn.matmul.fp32_precision
    cpu_gemm.WIDE_GRAD_WEIGHT[kernel](out, dy, x, accumulate)
    assert relative_error(out, 1000.0 * accumulate + dy.double().t() @ x.double()) < 1e-6
    assert torch.backends.mkldnn.matmul.fp32_precision == before


# -- the measurement


def test_the_rule_decides_between_kernels_that_are_nearly_as_fast() -> None:
    assert kernel_timing._preferred("torch", {"onednn": 0.95, "torch": 1.0}) == "torch"
    assert kernel_timing._preferred("torch", {"onednn": 0.90, "torch": 1.0}) == "onednn"
    assert kernel_timing._preferred("onednn", {"onednn": 0.90, "torch": 1.0}) == "onednn"


def test_the_slower_function_has_the_longer_time() -> None:
    small, large = torch.ones(8, 8), torch.ones(512, 512)
    times = kernel_timing.shortest([lambda: small @ small, lambda: large @ large])
    assert times is not None
    assert 0 <= times[0] < times[1]


def test_a_limit_ends_the_measurement_and_the_rule_decides_what_is_left(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    first = lambda: calls.append("first")  # noqa: E731
    second = lambda: (calls.append("second"), time.sleep(0.02))  # noqa: E731
    assert kernel_timing.shortest([first, second], time.perf_counter() + 0.01) is None
    assert calls == ["first", "second"]
    assert kernel_timing.shortest([first], time.perf_counter() + 10.0) is not None
    monkeypatch.setattr(kernel_timing, "LIMIT", 0.0)
    assert kernel_timing.measure(rule(ZEN), torch.float32) == {}
    kernel_start.choose_kernels(torch.float32)
    assert kernel_choice.current() == rule(processor.processor_type())


def test_a_measurement_leaves_threads_and_random_numbers_alone(alone: Path) -> None:
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        kernel_timing.measure(rule(ZEN), torch.float32)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("dtype", "operations"),
    [
        (torch.float32, {"linear", "grad_input", "grad_weight", "attention"}),
        (torch.bfloat16, {"grad_weight"}),
        (torch.float64, set()),
    ],
)
@pytest.mark.usefixtures("alone")
def test_only_large_cases_of_the_run_are_measured(dtype: torch.dtype, operations: set[str]) -> None:
    measured = kernel_timing.measure(rule(ZEN), dtype)
    assert {case.operation for case in measured} == operations
    assert all(case.large and case.dtype == str(dtype).removeprefix("torch.") for case in measured)
    assert not any(case.threaded for case in measured if case.operation == "attention")


# -- the start of a run


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_choice_is_measured_once_and_then_read(alone: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kernel_start.choose_kernels(torch.float32)
    (key,) = json.loads(alone.read_text())
    assert key == f"{processor.processor_type()}, torch {torch.__version__}, torch.float32, 1 thread"
    other = {str(case): KERNELS[case[:2]][1] for case in CASES}  # sdpa
    alone.write_text(json.dumps({key: other}))
    kernel_start.choose_kernels(torch.float32)
    assert to_plain(kernel_choice.current()) == other
    assert kernel_start.kernels_of_job() == {processor.processor_type(): other}
    kernel_start.choose_kernels(torch.bfloat16)  # not in the file yet
    assert len(json.loads(alone.read_text())) == 2
    sources = [message.partition("(")[2].partition(";")[0] for message in caplog.messages]
    measured = [source.replace(f", kept in {alone}", "").split() for source in sources if source != f"from {alone}"]
    assert [(words[:2], words[3:]) for words in measured] == [(["measured", "in"], ["s"])] * 2
    assert all(0 <= float(words[2]) <= kernel_timing.LIMIT + 1 for words in measured)
    assert sources[1] == f"from {alone}"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_each_number_of_threads_has_its_own_entry_without_kernels_that_collapse(alone: Path) -> None:
    torch.set_num_threads(3)
    try:
        kernel_start.choose_kernels(torch.float32)
        (key,) = json.loads(alone.read_text())
        assert key.endswith(", torch.float32, 3 threads")
        alone.write_text(json.dumps({key: to_plain({**rule(ZEN), **forced("attention=blocked")})}))
        kernel_start.choose_kernels(torch.float32)
        assert not kernel_choice.collapses(kernel_choice.current())
        torch.set_num_threads(2)
        kernel_start.choose_kernels(torch.float32)
        assert len(json.loads(alone.read_text())) == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_damaged_file_is_measured_anew(alone: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    alone.write_text(content)
    kernel_start.choose_kernels(torch.float32)
    assert f"{alone}: cannot be read. The CPU kernels are measured anew" in caplog.messages
    assert len(json.loads(alone.read_text())) == 1


def test_a_folder_that_cannot_be_written_to_is_no_error(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = alone.with_name("file")
    blocker.write_text("")
    monkeypatch.setenv(processor.CACHE_VARIABLE, str(blocker / "folder"))
    kernel_start.choose_kernels(torch.float32)
    assert kernel_start.kernels_of_job()


@pytest.mark.parametrize(("processor_type", "warns"), [(OLD_XEON, True), (XEON, False)])
def test_emulated_bfloat16_is_reported_with_its_cost(
    processor_type: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_start._warn_of_emulation(processor_type, torch.bfloat16)
    kernel_start._warn_of_emulation(OLD_XEON, torch.float32)
    assert [message[:60] for message in caplog.messages] == [
        "model.dtype: this processor has no instructions for bfloat16"
    ] * warns


# -- a resumed run


def test_a_resumed_run_has_the_kernels_of_its_checkpoint(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processor.KERNELS_VARIABLE, "rule")
    kernel_start.choose_kernels(torch.float32)
    other = to_plain({case: KERNELS[case[:2]][1] for case in CASES})
    kernel_start.resume_kernels({processor.processor_type(): other, "another": {}})
    assert to_plain(kernel_choice.current()) == other
    assert kernel_start.kernels_of_job() == {processor.processor_type(): other, "another": {}}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_that_moves_to_another_processor_says_so(
    alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(processor.KERNELS_VARIABLE, "rule")
    kernel_start.choose_kernels(torch.float32)
    before = kernel_choice.current()
    kernel_start.resume_kernels({ZEN + "x": to_plain(rule(ZEN))})
    (message,) = warnings_of(caplog)
    assert message.startswith(f"the checkpoint was saved on another processor ({ZEN}x; now ")
    assert message.endswith("the run continues with other rounding errors, not bit by bit")
    assert kernel_choice.current() == before


def test_a_record_of_another_version_on_the_same_processor_says_so(
    alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(processor.KERNELS_VARIABLE, "rule")
    kernel_start.choose_kernels(torch.float32)
    before, recorded = kernel_choice.current(), to_plain(rule(processor.processor_type()))
    recorded.popitem()
    kernel_start.resume_kernels({processor.processor_type(): recorded})
    assert warnings_of(caplog) == [
        "the checkpoint records the CPU kernels of another version of this project: the run continues with other "
        "rounding errors, not bit by bit"
    ]
    assert kernel_choice.current() == before


def test_forced_kernels_hold_in_a_resumed_run(
    alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(processor.KERNELS_VARIABLE, "linear=torch")
    kernel_start.choose_kernels(torch.float32)
    recorded = {processor.processor_type(): to_plain({**rule(ZEN), **forced("gemm=onednn")})}
    kernel_start.resume_kernels(recorded)
    (message,) = warnings_of(caplog)
    assert message.startswith("INTERNLM_CPU_KERNELS selects other kernels than the checkpoint was saved with")
    assert kernel_choice.current()[Case("linear", "float32", True, False)] == "torch"
    assert kernel_choice.current()[Case("grad_input", "float32", True, False)] == "onednn"


@pytest.mark.parametrize("plain", [None, [], {}, {"linear": "onednn"}])
def test_a_record_of_another_version_is_none(plain: object) -> None:
    assert from_plain(plain) is None
    assert from_plain(to_plain(rule(ZEN))) == rule(ZEN)
