"""Saving and loading on two processes, beside the same bytes written, read and copied plainly, and beside DCP.

``python -m bench.checkpoint [--model bench-30M bench-300M] [--rounds 5] [--folder DIR]`` prints JSON. All measurements
of a model take turns in one run. Figures are medians over the rounds of the slower rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash

from bench.ours import Ours, free_port
from bench.yardsticks import LLAMA_30M, YARDSTICKS, Yardstick
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.planners import LogicalSavePlanner, bytes_of
from internlm.checkpoint.tensor_writer import BLOCK_BYTES, memory_of
from internlm.config.schema import CkptConfig
from internlm.core.context import global_context as gpc
from internlm.core.train_state import TrainState
from internlm.data import build_train_loader_with_data_type
from internlm.data.batch_plan import Position

WORLD = 2
#: Seconds after which the ranks must have sent their results.
LONGEST = 900
LARGE = dict(num_layers=20, hidden_size=1024, num_attention_heads=16, num_kv_attention_heads=16, mlp_ratio=2.75)
#: Models of 30 and 300 million parameters. Steps are short, since what counts is the size of the state.
MODELS = {
    "bench-30M": replace(YARDSTICKS["bench-30M"], seq_len=128, micro_bsz=2),
    "bench-300M": Yardstick(name="bench-300M", vocab_size=32000, seq_len=64, micro_bsz=2, model=LLAMA_30M | LARGE),
}


class NoData:
    """Sampler without data, which has no position to find."""

    state_is_sharded = False

    def position(self, step: int) -> Position:
        """Return the position at ``step``."""
        return Position(step, step, step)

    def resume(self, position: Position) -> None:
        """Do nothing."""


class Bench:
    """The measurements of one rank."""

    def __init__(self, yardstick: Yardstick, rank: int, port: int, folder: Path) -> None:
        self.ours = Ours(yardstick, (), rank, WORLD, port, data_size=WORLD)
        self.folder, self.rank = folder, rank
        for _ in range(2):
            self.ours.step()
        self.state = TrainState(step=2)
        self.managers = {background: self._manager(background) for background in (False, True)}
        self.tensors = self.managers[False].content.tensors()
        self.times: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}

    def _manager(self, background: bool) -> CheckpointManager:
        config = CkptConfig(
            enable_save_ckpt=True,
            save_ckpt_folder=str(self.folder / ("background" if background else "saved")),
            checkpoint_every=1,
            async_upload=background,
        )
        trainer = self.ours.trainer
        return CheckpointManager(
            config,
            trainer.model,
            trainer.optimizer,
            gpc.random_streams,
            10**6,
            run_info={"config": gpc.config.model_dump(mode="json"), "data": "", "seed": 0},
            sampler=NoData(),
        )

    # -- one measurement ----------------------------------------------------------------------------------------------
    def measure(self, name: str, action: Callable[[], Any], forget: bool = False) -> None:
        """Measure the time of ``action``, which all ranks begin together.

        Args:
            name: Name of the measurement.
            action: What is measured.
            forget: Whether the system must read the last checkpoint from the disk again.
        """
        self._delete_old()
        if forget and self.rank == 0:
            for path in self.last().iterdir():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()
        start = time.perf_counter()
        action()
        self.times.setdefault(name, []).append(time.perf_counter() - start)

    def save(self, background: bool) -> None:
        """Save the checkpoint of the next step."""
        self.state.step += 1
        self.managers[background].save(self.state)

    def _delete_old(self) -> None:
        """Delete all checkpoints but that which is loaded, which takes time itself."""
        if self.rank == 0:
            for path in [*self.folder.glob("background/step-*"), *self.folder.glob("saved/step-*")]:
                if path != self.last():
                    shutil.rmtree(path)
            for path in self.folder.glob("plain-*"):
                path.unlink()
            os.sync()

    def last(self, background: bool = False) -> Path:
        """Return the folder of the last checkpoint."""
        return self.folder / ("background" if background else "saved") / f"step-{self.state.step}"

    def write_plainly(self) -> None:
        """Write and hash as many bytes as this rank saves, and flush them to the disk."""
        data, hasher = memory_of(self.staged), xxhash.xxh3_128()
        descriptor = os.open(self.folder / f"plain-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            hasher.update(block)
            while len(block):
                block = block[os.write(descriptor, block) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def copy(self) -> None:
        """Copy as many bytes as this rank saves: one half of the memory for them to the other, twice."""
        one, other = self.staged.chunk(2)
        for _ in range(2):
            one[: len(other)].copy_(other)

    def read_plainly(self) -> None:
        """Read as many bytes as this rank loads into the tensors that it loads into, but at any place.

        The rank reads its own file first: together, the ranks read all files. Afterwards the state must be loaded.
        """
        own = f"rank-{self.rank:05}.bin"
        paths = sorted(self.last().glob("rank-*.bin"), key=lambda path: path.name != own)
        with ExitStack() as stack:
            files = itertools.cycle([stack.enter_context(path.open("rb", buffering=0)) for path in paths])
            file = next(files)
            for memory in self.loaded:
                while len(memory):
                    count = file.readinto(memory[:BLOCK_BYTES])
                    memory = memory[count:]
                    if not count:
                        file = next(files)
                        file.seek(0)

    def load(self) -> None:
        """Load the last checkpoint."""
        self.managers[False].load(self.last(), self.state, ("all",))

    def save_with_dcp(self) -> None:
        """Save the same tensors with torch's own writer."""
        writer = dcp.FileSystemWriter(self.folder / "dcp", overwrite=True)
        dcp.save(dict(self.tensors), storage_writer=writer, planner=LogicalSavePlanner())

    def steps_during_a_save(self) -> None:
        """Train until a save in the background is committed; record the time lost and the time of the commit."""
        self._delete_old()
        dist.barrier()
        start = time.perf_counter()
        self.save(background=True)
        saver, steps, busy = self.managers[True]._saver, 0, torch.ones(1)
        committed: list[float] = []
        watch = threading.Thread(target=lambda: (saver._thread.join(), committed.append(time.perf_counter() - start)))
        watch.start()
        while busy.item():
            self.ours.step()
            steps += 1
            busy.fill_(saver.is_busy)
            dist.all_reduce(busy)
        seconds = time.perf_counter() - start
        watch.join()
        self.times.setdefault("commit of a save in the background", []).extend(committed)
        self.times.setdefault("lost by the steps", []).append(seconds - steps * median(self.times["step"]))

    @contextmanager
    def peak_memory(self, name: str) -> Iterator[None]:
        """Record by how much resident memory rises in the ``with`` block."""
        Path("/proc/self/clear_refs").write_text("5")  # makes the peak the present value
        before = _status("VmRSS")
        yield
        self.memory[name] = _status("VmHWM") - before

    # -- all measurements ---------------------------------------------------------------------------------------------
    def run(self, rounds: int) -> dict[str, Any]:
        """Take all measurements in turns; return the results of this rank."""
        with self.peak_memory("synchronous save"):
            self.save(background=False)
        with self.peak_memory("save in the background"):
            self.save(background=True)
            self.managers[True].wait_async_upload_finish()
        plan = self.managers[False]._saver._plan.own
        # The memory of the run serves all purposes: two ranks of the large model leave no room for more.
        self.staged = self.managers[True]._saver._memory[: bytes_of(plan)]
        self.loaded = [memory_of(x) for t in self.tensors.values() for x in t.slices.values()]
        for _ in range(5):
            self.measure("step", self.ours.step)
        for _ in range(rounds):
            self.measure("copy", self.copy)
            self.measure("blocked by a save in the background", lambda: self.save(background=True))
            self.managers[True].wait_async_upload_finish()
            cpu = time.process_time()
            self.measure("plain write", self.write_plainly)
            self.times.setdefault("CPU time of a plain write", []).append(time.process_time() - cpu)
            self.measure("save", lambda: self.save(background=False))
            self.measure("DCP save", self.save_with_dcp)
            for name, forget in (("", False), (" from the disk", True)):
                self.measure(f"plain read{name}", self.read_plainly, forget)
                self.measure(f"load{name}", self.load, forget)
            for _ in range(3):
                self.measure("step", self.ours.step)
            self.steps_during_a_save()
        return {"times": self.times, "memory": self.memory, "bytes": bytes_of(plan)}


def _status(key: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


#: Name of each ratio: (time, time that it is divided by)
RATIOS = {
    "blocked / copy (wanted 1.3)": ("blocked by a save in the background", "copy"),
    "lost / CPU time of a plain write (wanted 1.2)": ("lost by the steps", "CPU time of a plain write"),
    "commit / save (wanted 2)": ("commit of a save in the background", "save"),
    "save / plain write (wanted 1.3)": ("save", "plain write"),
    "load / plain read (wanted 1.3)": ("load", "plain read"),
    "load / plain read, from the disk (wanted 1.3)": ("load from the disk", "plain read from the disk"),
    "DCP save / save": ("DCP save", "save"),
}


def _rank(rank: int, port: int, model: str, rounds: int, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        results.put(Bench(MODELS[model], rank, port, folder).run(rounds))
    except BaseException:
        results.put(None)
        raise
    dist.barrier()


def _next(results: Any, ranks: Sequence[BaseProcess]) -> dict[str, Any]:
    """Return the next result; end the ranks if one of them has died, as for lack of memory."""
    for _ in range(LONGEST):
        with suppress(queue.Empty):
            found: dict[str, Any] | None = results.get(timeout=1)
            if found is not None:
                return found
        if any(process.exitcode for process in ranks):
            break
    codes = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
    for process in ranks:
        process.kill()
    raise SystemExit(f"exit codes of the ranks that have failed: {codes}. -9: out of memory?")


def measure(model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Run the ranks; return medians of the slower rank, in seconds, and their ratios."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, model, rounds, folder, results)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    found = [_next(results, ranks) for _ in ranks]
    for process in ranks:
        process.join()
    times = {name: max(median(of_rank["times"][name]) for of_rank in found) for name in found[0]["times"]}
    return {
        "megabytes saved by a rank": round(found[0]["bytes"] / 1e6, 1),
        "seconds": {name: round(seconds, 4) for name, seconds in times.items()},
        "ratios": {name: round(times[one] / times[other], 2) for name, (one, other) in RATIOS.items()},
        "extra megabytes": {name: round(max(r["memory"][name] for r in found) / 1e6, 1) for name in found[0]["memory"]},
    }


#: Steps at which resuming is timed.
STEPS = (10, 1_000, 100_000, 900_000)


def _resume_times(folder: Path, results: Any) -> None:
    """Send the milliseconds from resuming at a step to the first batch, for each of :data:`STEPS`."""
    torch.set_num_threads(1)
    (folder / "en").mkdir()
    lines = [json.dumps({"tokens": [(i * 7 + j) % 8000 for j in range(200)]}) + "\n" for i in range(20_000)]
    (folder / "en" / "a.bin").write_text("".join(lines))
    ends = np.cumsum([len(line) for line in lines])
    np.save(folder / "a.npy", np.stack([ends - [len(line) for line in lines], np.full(len(lines), 200)], axis=1))
    (folder / "a.npy").rename(folder / "en" / "a.bin.meta")
    Ours(MODELS["bench-30M"], (f"data.train_folder={folder}", "data.use_packed_dataset=True", "data.micro_bsz=1"))
    times: dict[int, list[float]] = {step: [] for step in STEPS}
    for _ in range(7):
        for step in STEPS:
            loader, _ = build_train_loader_with_data_type()
            start = time.perf_counter()
            loader.resume(Position(step, step, step))
            loader.seek(step)
            next(iter(loader))
            times[step].append(time.perf_counter() - start)
    results.put({step: round(median(seconds) * 1e3, 2) for step, seconds in times.items()})


def resume_times(folder: Path) -> dict[int, float]:
    """Return the milliseconds from resuming to the first batch, by the step resumed at."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_resume_times, args=(folder, results), daemon=True)
    process.start()
    found: dict[int, float] = results.get(timeout=LONGEST)
    process.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: the current folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder or Path.cwd()) as folder:
        print(json.dumps({"milliseconds to the first batch after resuming at": resume_times(Path(folder))}, indent=1))
    for model in args.model:
        with tempfile.TemporaryDirectory(dir=args.folder or Path.cwd()) as folder:
            print(json.dumps({model: measure(model, args.rounds, Path(folder))}, indent=1), flush=True)


if __name__ == "__main__":
    main()
