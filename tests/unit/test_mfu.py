"""Speed of a model and its share of a device's peak."""

from __future__ import annotations

import pytest

from bench.mfu import MODELS, Speed, main, peak_flops
from internlm.config import load_config
from internlm.costs.flops import block_weights, vocab_weights


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L400", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(device: str, tflops: float | None) -> None:
    assert peak_flops(device) == (None if tflops is None else tflops * 1e12)


def test_mfu_is_the_share_of_the_peak() -> None:
    speed = Speed(
        device="NVIDIA H200", step_seconds=0.5, tokens_per_second=8e4, flops=4.947e14, peak_memory=30 * 2**30,
        planned_memory=27 * 2**30, loss=1.0, peak_flops=peak_flops("NVIDIA H200"),
    )  # fmt: skip
    assert speed.mfu == pytest.approx(0.5)
    assert str(speed) == (
        "NVIDIA H200: 80000 tokens/s, 500 ms a step, peak memory 30.00 GiB (planned 27.00 GiB), 495 TFLOP/s, "
        "MFU 50.0% of 989.4 TFLOP/s"
    )


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--steps", "0", "an integer of at least 1"),
        ("--micro-batches", "0", "an integer of at least 1"),
        ("--peak-tflops", "0", "a number above 0"),
        ("--peak-tflops", "nan", "a number above 0"),
        ("--peak-tflops", "many", "a number above 0"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(
    option: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mfu", "--model", "tiny", "--device", "cpu", option, value])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert f"argument {option}: expected {expected}, got {value!r}" in capsys.readouterr().err


def test_the_large_model_has_a_billion_parameters() -> None:
    model = load_config(MODELS["llama-1B"].config(), device_type="cuda").model
    assert model.num_layers * block_weights(model) + 2 * vocab_weights(model) == pytest.approx(1.12e9, rel=0.01)
