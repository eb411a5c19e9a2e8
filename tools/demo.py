"""Train the demo's model and show what it has learnt: ``python tools/demo.py [--steps N] [--device cpu]``.

``tools/demo_corpus.py`` must have run. One process trains on each CUDA device, or two on the CPU.
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
from internlm.accelerator.device import DEVICE_VARIABLE
from internlm.checkpoint import load_weights
from internlm.checkpoint.save_folder import is_complete, steps_in
from internlm.config import load_config
from internlm.data.tokenizer import load_tokenizer
from internlm.eval import generate
from internlm.train.build_model import build_model

CONFIG = Path("configs/demo.py")
DATA = Path("data/demo")
RUN = Path("RUN/demo")
CPU_PROCESSES = 2
PROMPTS = ("def __init__(self, ", "    Return the ", "import os\nimport ")


def train(steps: int | None) -> float:
    """Run the training command; seconds it took. The processes share the cores evenly."""
    processes = accelerator.device_count() or CPU_PROCESSES
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += ["train.py", "--config", str(CONFIG), "--launcher", "torch"]
    command += ["--set", f"data.total_steps={steps}"] * (steps is not None)
    shutil.rmtree(RUN, ignore_errors=True)
    print("$", " ".join(["torchrun", *command[3:]]), flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        sys.exit(done.returncode)  # what went wrong was said above
    return time.perf_counter() - start


def loss_table(records: list[dict[str, Any]], entropy: dict[str, float]) -> str:
    """Losses in nats per token: training (over the last steps), validation, and what word counts alone would give."""
    steps = [record for record in records if "loss" in record][-20:]
    valid = next((record for record in reversed(records) if "valid/loss" in record), {})
    types = [name for name in entropy if name != "total"]
    seen = {name: _mean(steps, [name]) for name in types} | {"total": _mean(steps, types)}
    lines = [f"{'type':8}{'train':>10}{'valid':>10}{'unigram entropy':>18}"]
    for name in [*types, "total"]:
        held_out = valid.get("valid/loss" if name == "total" else f"valid/loss/{name}", float("nan"))
        lines.append(f"{name:8}{seen[name]:>10.3f}{held_out:>10.3f}{entropy[name]:>18.3f}")
    return "\n".join(lines)


def _mean(steps: list[dict[str, Any]], types: list[str]) -> float:
    """Loss per token of these types: a step may hold few tokens of one, or none."""
    tokens = sum(step[f"tokens/{name}"] for step in steps for name in types)
    return sum(step[f"loss/{name}"] * step[f"tokens/{name}"] for step in steps for name in types) / max(tokens, 1)


def samples() -> str:
    """Continuations of a few prompts, sampled from the final checkpoint."""
    checkpoint = next(path for _, path in steps_in(RUN / "checkpoints") if is_complete(path))
    config = load_config(CONFIG, device_type=accelerator.device_type())
    model = build_model(config, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no processes are joined, which is meant
        load_weights(model, checkpoint)
    tokenizer = load_tokenizer(DATA / "tokenizer.model")
    texts = []
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for number, prompt in enumerate(PROMPTS):
        ids = generate(model, tokenizer.encode(prompt), 60, temperature=0.8, top_p=0.95, seed=number)
        texts.append(f"--- sample {number + 1}\n{prompt}{dim}{tokenizer.decode(ids)}{plain}")
    return "\n".join(texts)


def main() -> None:
    """Train, then print the loss table and the samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps (default: as in the config)")
    parser.add_argument("--device", choices=["cpu"], help="leave CUDA devices unused")
    args = parser.parse_args()
    if args.device:
        os.environ[DEVICE_VARIABLE] = args.device
    seconds = train(args.steps)
    records = [json.loads(line) for path in RUN.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    entropy = json.loads((DATA / "stats.json").read_text())["unigram_entropy"]
    print(f"\n{samples()}\n\n{loss_table(records, entropy)}\n")
    last = [record for record in records if "loss" in record][-1]
    print(f"{last['step'] + 1} steps, {last['num_consumed_tokens']} tokens in {seconds:.0f} s; records in {RUN}")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
