"""Print speed, peak memory and MFU of training a Llama of 1.1 billion parameters in bfloat16 on one device.

``python -m bench.mfu [--model tiny] [--device cpu] [--steps 8] [--micro-batches 4] [--peak-tflops 989.4]``. A step has
``--micro-batches`` micro-batches of four sequences. FLOPs are those of the model (``internlm/costs/flops.py``): without
recomputation, and with all keys of a sequence for each query.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from bench.ours import Ours
from bench.yardsticks import Yardstick
from internlm import accelerator
from internlm.accelerator import processor
from internlm.cli.parsers import count
from internlm.costs.flops import model_flops_per_token
from internlm.costs.memory_plan import format_bytes
from internlm.train.hooks.log import own_plan
from internlm.utils.errors import exit_on_user_error
from internlm.verify.configs import Devices
from internlm.verify.processes import run_world

WARMUP, STEPS, MICRO_BATCHES = 3, 8, 4
TIMEOUT = 300.0  # seconds
BF16 = "model.dtype=torch.bfloat16"
LLAMA_1B: dict[str, Any] = dict(
    num_layers=22,
    hidden_size=2048,
    num_attention_heads=16,
    num_kv_attention_heads=4,
    mlp_ratio=5632 / 2048,
    max_position_embeddings=2048,
)
TINY = LLAMA_1B | dict(num_layers=2, hidden_size=64, num_attention_heads=4, num_kv_attention_heads=2, multiple_of=16)
#: Models by name, with the sequences of one micro-batch.
MODELS = {
    "llama-1B": Yardstick(name="llama-1B", vocab_size=32000, seq_len=2048, micro_bsz=4, model=LLAMA_1B),
    "tiny": Yardstick(name="tiny", vocab_size=256, seq_len=32, micro_bsz=4, model=TINY),
}
#: TFLOP/s of dense bfloat16 products by the data sheets, by device name; of several names that begin a device's name,
#: the longest counts.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA A800": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H20": 148.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H800": 989.4,
    "NVIDIA H800 PCIe": 756.0,
    "NVIDIA B200": 2250.0,
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measurement of a model on one device."""

    device: str
    step_seconds: float  # median
    tokens_per_second: float
    flops: float  # of the model, in a second
    peak_memory: int  # bytes
    planned_memory: int  # bytes
    loss: float  # of the last step
    peak_flops: float | None = None  # of the device, in a second

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization; None if the peak of the device is unknown."""
        return None if self.peak_flops is None else self.flops / self.peak_flops

    def __str__(self) -> str:
        if self.mfu is None or self.peak_flops is None:
            utilization = "MFU unknown (no peak of this device is known: python -m bench.mfu --peak-tflops N)"
        else:
            utilization = f"MFU {self.mfu:.1%} of {self.peak_flops / 1e12:g} TFLOP/s"
        memory = f"peak memory {format_bytes(self.peak_memory)} (planned {format_bytes(self.planned_memory)})"
        return (
            f"{self.device}: {self.tokens_per_second:.0f} tokens/s, {self.step_seconds * 1e3:.0f} ms a step, {memory}, "
            f"{self.flops / 1e12:.3g} TFLOP/s, {utilization}"
        )


def peak_flops(device: str) -> float | None:
    """Return the FLOP/s of dense bfloat16 products of the device with this name; None if they are not known."""
    names = [name for name in PEAK_TFLOPS if f"{device} ".startswith((f"{name} ", f"{name}-"))]
    return PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else None


def measure(rank: int, world_size: int, model: Yardstick, steps: int, micro_batches: int) -> Speed:
    """Train ``model`` on the device of this process, and time steps after the first :data:`WARMUP`."""
    whole = replace(model, micro_bsz=model.micro_bsz * micro_batches)
    ours = Ours(whole, [BF16], rank, world_size, micro_num=micro_batches)
    seconds = []
    for _ in range(WARMUP + steps):
        start = time.perf_counter()
        loss = ours.step()  # on the host, so the device has done the forward and backward passes
        accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    step_seconds = median(seconds[WARMUP:])
    tokens_per_second = whole.tokens / step_seconds
    is_host = accelerator.device_kind().is_host
    device = processor.processor_name() if is_host else torch.cuda.get_device_name()
    return Speed(
        device=device,
        step_seconds=step_seconds,
        tokens_per_second=tokens_per_second,
        flops=model_flops_per_token(ours.config.model, model.seq_len) * tokens_per_second,
        peak_memory=accelerator.peak_memory(),
        planned_memory=sum(own_plan(ours.trainer.model).values()),
        loss=loss,
        peak_flops=peak_flops(device),
    )


def _positive(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


@exit_on_user_error
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-1B")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=count, default=STEPS)
    parser.add_argument("--micro-batches", type=count, default=MICRO_BATCHES)
    parser.add_argument(
        "--peak-tflops", type=_positive, help="of dense bfloat16 products, for a device without a known one"
    )
    args = parser.parse_args()
    devices = Devices.of_this_machine(args.device)
    work = MODELS[args.model], args.steps, args.micro_batches
    (speed,) = run_world(1, measure, work, TIMEOUT, devices.type)
    if args.peak_tflops is not None:
        speed = replace(speed, peak_flops=args.peak_tflops * 1e12)
    print(speed)


if __name__ == "__main__":
    main()
