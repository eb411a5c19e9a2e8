"""Train the demo's model, and show its losses and texts: ``python tools/demo.py [--steps N] [--device cpu]``.

``tools/demo_corpus.py`` must have made the corpus. One process trains on each CUDA device, or two on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from internlm import accelerator
from internlm.accelerator import DEVICE_VARIABLE, processor
from internlm.checkpoint import load_weights
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.saved_checkpoint import find_checkpoints
from internlm.config import load_config
from internlm.data.tokenizer import load_tokenizer
from internlm.eval import generate
from internlm.ops.cpu.kernel_timing import bf16_slowdown
from internlm.pictures import loss_curve
from internlm.train.build_model import build_model

CONFIG = Path("configs/demo.py")
DATA = Path("data/demo")
RUN = Path("RUN/demo")
CPU_PROCESSES = 2
BF16_PAYS = 1.3  # gain of a product from which a whole step is faster
BF16_STEPS = 800  # steps in bfloat16 that take as long as those of the config in float32
PROMPTS = ("def __init__(self, ", "    Return the ", "import os\nimport ")


def bf16_gain() -> float:
    """Return how many times as fast this machine's processor multiplies in bfloat16 as in float32; 0 on a GPU."""
    if accelerator.device_count() or not processor.has_bf16(processor.processor_type()):
        return 0.0
    return 1 / bf16_slowdown()


def overrides_of(gain: float, steps: int | None) -> list[str]:
    """Return the overrides of the config: bfloat16, and more steps in the same time, where it pays."""
    pays = gain >= BF16_PAYS
    if steps is None and pays:
        steps = BF16_STEPS
    overrides = ["model.dtype=torch.bfloat16"] * pays
    if steps is not None:
        # Validate once halfway, and at the end.
        overrides += [f"data.total_steps={steps}", f"data.valid_every={max(1, steps // 2)}"]
    return overrides


def train(overrides: list[str]) -> float:
    """Run the training command, its processes sharing the cores evenly, and return the seconds it took."""
    processes = accelerator.device_count() or CPU_PROCESSES
    # torchrun sets one thread per process, which leaves cores idle.
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += ["train.py", "--config", str(CONFIG), "--launcher", "torch"]
    command += [word for override in overrides for word in ("--set", override)]
    # Records and checkpoints of an earlier demo would be taken for those of this one.
    shutil.rmtree(RUN, ignore_errors=True)
    print("$", " ".join(["torchrun", *command[3:]]), flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        sys.exit(done.returncode)  # the training has printed why
    return time.perf_counter() - start


def loss_table(records: list[dict[str, Any]], entropy: dict[str, float]) -> str:
    """Return a table of losses in nats per token: training (last steps), validation, and entropy of token counts."""
    steps = [record for record in records if "loss" in record][-20:]
    valid = next((record for record in reversed(records) if "valid/loss" in record), {})
    types = [name for name in entropy if name != "total"]
    train = {name: _mean(steps, [name]) for name in types} | {"total": _mean(steps, types)}
    lines = [f"{'type':8}{'train':>10}{'valid':>10}{'unigram entropy':>18}"]
    for name in [*types, "total"]:
        valid_loss = valid.get("valid/loss" if name == "total" else f"valid/loss/{name}", float("nan"))
        lines.append(f"{name:8}{train[name]:>10.3f}{valid_loss:>10.3f}{entropy[name]:>18.3f}")
    return "\n".join(lines)


def _mean(steps: list[dict[str, Any]], types: list[str]) -> float:
    """Return the loss per token of these types, weighted by tokens: a step may hold few of one type, or none."""
    tokens = sum(step[f"tokens/{name}"] for step in steps for name in types)
    return sum(step[f"loss/{name}"] * step[f"tokens/{name}"] for step in steps for name in types) / max(tokens, 1)


def picture(records: list[dict[str, Any]], entropy: dict[str, float]) -> Path:
    """Draw the losses of the run and return the path of the picture."""
    training = [(record["step"] + 1, float(record["loss"])) for record in records if "loss" in record]
    validation = [(record["step"] + 1, float(record["valid/loss"])) for record in records if "valid/loss" in record]
    level = ("unigram entropy", entropy["total"])
    path = RUN / "loss.svg"
    path.write_text(loss_curve("Loss of the demo", {"training": training}, {"validation": validation}, level))
    return path


def samples(overrides: list[str]) -> str:
    """Sample continuations of a few prompts from the final checkpoint."""
    folder = RUN / "checkpoints"
    newest = next(entry for entry in find_checkpoints(LocalStorage(folder)) if entry.is_committed)
    config = load_config(CONFIG, overrides, device_type=accelerator.device_type())
    model = build_model(config, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group, which is meant here
        load_weights(model, folder / newest.name)
    tokenizer = load_tokenizer(DATA / "tokenizer.model")
    texts = []
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for index, prompt in enumerate(PROMPTS):
        ids = generate(model, tokenizer.encode(prompt), 60, temperature=0.8, top_p=0.95, seed=index)
        texts.append(f"--- sample {index + 1}\n{prompt}{dim}{tokenizer.decode(ids)}{plain}")
    return "\n".join(texts)


def main() -> None:
    """Train, then print samples, the loss table and the path of the loss curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps (default: as in the config)")
    parser.add_argument("--device", choices=["cpu"], help="leave CUDA devices unused")
    args = parser.parse_args()
    if args.device:
        os.environ[DEVICE_VARIABLE] = args.device
    gain = bf16_gain()
    overrides = overrides_of(gain, args.steps)
    if gain:
        dtype = "bfloat16" if gain >= BF16_PAYS else "float32"
        print(f"{processor.processor_name()} multiplies {gain:.1f} times as fast in bfloat16: training in {dtype}")
    seconds = train(overrides)
    records = [json.loads(line) for path in RUN.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    entropy = json.loads((DATA / "stats.json").read_text())["unigram_entropy"]
    print(f"\n{samples(overrides)}\n\n{loss_table(records, entropy)}\n")
    last = [record for record in records if "loss" in record][-1]
    print(f"{last['step'] + 1} steps, {last['num_consumed_tokens']} tokens in {seconds:.0f} s; records in {RUN}")
    print(f"loss curve: {picture(records, entropy).resolve()}")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
