"""Jobs for tests: torchrun as a user starts it, with a bound on its time and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Seconds that helper processes get to see that their parent has gone.
LAST_WORDS = 2.0
#: Marks every process of a job: torchrun's workers have sessions of their own, where a kill of its group won't reach.
_MARK = "INTERNLM_TEST_JOB"


@dataclass(frozen=True)
class Job:
    """A finished job."""

    returncode: int
    stdout: str
    stderr: str
    left_behind: int
    """Processes that outlived torchrun; they have been killed."""


def torchrun(
    nproc: int,
    script: str | Path,
    *args: str,
    timeout: float = 240,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Job:
    """Run ``script args`` on ``nproc`` gloo ranks of this machine, on a free port, as :func:`run_job` does.

    ``options`` go to torchrun itself.
    """
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", *rendezvous, *options]
    return run_job([*launcher, str(script), *args], timeout=timeout, env=env, cwd=cwd)


def run_job(
    command: Sequence[str],
    *,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Job:
    """Run a command that starts processes of its own.

    ``env`` is added to the environment, ``timeout`` is in seconds. Raises ``TimeoutError`` with what was printed, after
    every process of the job has been killed.
    """
    job = uuid.uuid4().hex
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", _MARK: job, **(env or {})}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=cwd, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            name = " ".join(command)
            raise TimeoutError(f"{name}: not finished after {timeout:g} s\n{_text(out)}\n{_text(err)}") from None
        finally:
            left_behind = _end(process, job)
        return Job(process.returncode, _text(out), _text(err), left_behind)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _end(process: subprocess.Popen[bytes], job: str) -> int:
    """Kill what is left of a job, and return how many processes outlived ``process`` by more than a moment."""
    deadline = time.monotonic() + LAST_WORDS
    while process.poll() is not None and _processes(job) and time.monotonic() < deadline:
        time.sleep(0.02)
    count = 0
    while left := _processes(job):  # again, for those that were being started
        count += len(left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    process.wait()
    return count


def _processes(job: str) -> list[int]:
    """The processes that have the mark of ``job`` in their environment."""
    mark = f"{_MARK}={job}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
