"""Torch traces of a few steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARMUP, ACTIVE = 1, 1, 3  # steps


class StepTrace:
    """Traces steps 2–4 of a run into ``folder``, one file a rank, to be opened in Perfetto or chrome://tracing."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"trace-rank{rank}.json"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self._path)),
            record_shapes=True,
        )

    def start(self) -> None:
        """Begin with the first step."""
        self._profile.start()

    def step(self) -> None:
        """A step is done."""
        self._profile.step()

    def stop(self) -> None:
        """The run is over."""
        self._profile.stop()
