"""Read rank, world size and rank 0's address from the environment variables of torchrun or Slurm.

All functions are pure: they take the environment as an argument, so that tests need no launcher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from internlm.utils.errors import LaunchError, Problem

Launcher: TypeAlias = Literal["torch", "slurm"]

# The first three variables in each tuple give rank, world size and local rank.
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")
HOW_TO_START = (
    "Start with: torchrun --nproc_per_node=N train.py --config CONFIG --launcher torch, "
    "or: srun python train.py --config CONFIG --launcher slurm"
)


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """Global and local rank of this process, the world size, and the rendezvous address on rank 0."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class ExplicitProcess:
    """Ranks and host that take precedence over the launcher's variables, and a port in case the launcher sets none.

    A field that is None is read from the launcher's variable.
    """

    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    host: str | None = None
    port: int = 8888


def find_process(
    environment: Mapping[str, str], launcher: Launcher | None = None, explicit: ExplicitProcess | None = None
) -> ProcessInfo:
    """Read the ranks of this process and rank 0's address.

    Args:
        environment: Environment variables of the process.
        launcher: Launcher whose variables are read. None: ``"torch"`` if ``explicit`` has a rank; otherwise, detect it.
        explicit: Ranks and host that take precedence over the launcher's variables.

    Raises:
        LaunchError: A variable is missing or malformed.
    """
    explicit = explicit or ExplicitProcess()
    launcher = launcher or ("torch" if explicit.rank is not None else detect_launcher(environment))
    names = SLURM_VARIABLES if launcher == "slurm" else TORCH_VARIABLES
    values = (explicit.rank, explicit.world_size, explicit.local_rank)
    replaced = {name: str(value) for name, value in zip(names, values, strict=False) if value is not None}
    if launcher == "slurm":
        return read_slurm_environment({**environment, **replaced}, explicit.host, explicit.port)
    if explicit.host is not None:
        replaced["MASTER_ADDR"] = explicit.host
    return read_torch_environment({**environment, **replaced}, explicit.port)


def detect_launcher(environment: Mapping[str, str]) -> Launcher:
    """Return the launcher whose variables are set; torchrun takes precedence, since it may run inside a Slurm job.

    Raises:
        LaunchError: Neither launcher has set its variables.
    """
    if "RANK" in environment:
        return "torch"
    if "SLURM_PROCID" in environment:
        return "slurm"
    raise LaunchError(Problem("RANK, SLURM_PROCID", "not set, so no launcher started this process", HOW_TO_START))


def read_torch_environment(environment: Mapping[str, str], port: int = 8888) -> ProcessInfo:
    """Read the variables that torchrun sets; ``port`` is used if ``MASTER_PORT`` is not set.

    Raises:
        LaunchError: A variable is missing or malformed.
    """
    _require_variables(TORCH_VARIABLES[:-1], environment)
    return ProcessInfo(
        rank=_integer(environment, "RANK"),
        world_size=_integer(environment, "WORLD_SIZE"),
        local_rank=_integer(environment, "LOCAL_RANK"),
        host=environment["MASTER_ADDR"],
        port=_integer({"MASTER_PORT": str(port), **environment}, "MASTER_PORT"),
    )


def read_slurm_environment(environment: Mapping[str, str], host: str | None, port: int) -> ProcessInfo:
    """Read the variables that srun sets; rank 0 listens on ``host`` (default: the job's first host) and ``port``.

    Raises:
        LaunchError: A variable is missing or malformed.
    """
    _require_variables(SLURM_VARIABLES, environment)
    try:
        first_host = expand_host_list(environment["SLURM_JOB_NODELIST"])[0]
    except ValueError as error:
        raise LaunchError(Problem("SLURM_JOB_NODELIST", str(error), "Pass rank 0's host with --host")) from None
    return ProcessInfo(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=_integer(environment, "SLURM_NPROCS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        host=host or first_host,
        port=port,
    )


def check_process(process: ProcessInfo) -> None:
    """Check that the ranks and the port are in range.

    Raises:
        LaunchError: A rank or the port is out of range.
    """
    for name, rank in (("rank", process.rank), ("local rank", process.local_rank)):
        if rank not in range(process.world_size):
            message = f"must be at least 0 and less than the world size {process.world_size}, got {rank}"
            raise LaunchError(Problem(name, message, HOW_TO_START))
    if process.port not in range(1, 2**16):
        message = f"expected a port from 1 to 65535, got {process.port}"
        raise LaunchError(Problem("port", message, "Start with torchrun --standalone, or pass a valid --port"))


def device_index(local_rank: int, devices: int | None) -> int:
    """Return the index of this process's device among the ``devices`` that are visible to it (None: no accelerator).

    It is the local rank, or 0 if only one device is visible: launchers such as ``srun --gpus-per-task=1`` give each
    process a device of its own.

    Raises:
        LaunchError: Several devices are visible, but fewer than processes on this machine.
    """
    if devices is None or devices == 1:
        return 0
    if local_rank >= devices:
        message = f"must be less than the number of visible devices ({devices}), got {local_rank}"
        todo = f"Start at most {devices} processes per machine, or make exactly one device visible to each process"
        raise LaunchError(Problem("LOCAL_RANK", message, todo))
    return local_rank


def _require_variables(names: Sequence[str], environment: Mapping[str, str]) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        present = [name for name in names if name in environment]
        others = f" (set: {', '.join(present)})" if present else ""
        raise LaunchError(Problem(", ".join(missing), f"not set{others}", HOW_TO_START))


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise LaunchError(Problem(name, f"expected an integer, got {environment[name]!r}", HOW_TO_START)) from None


# -- Slurm host lists -------------------------------------------------------------------------------------------------
def expand_host_list(text: str) -> list[str]:
    """Expand a Slurm host list: ``gpu[003-005,9],login`` is gpu003, gpu004, gpu005, gpu9 and login.

    Raises:
        ValueError: ``text`` is malformed.
    """
    if text.count("[") != text.count("]"):
        raise ValueError(f"{text!r} has unbalanced brackets")
    items = re.split(r",(?![^\[]*\])", text.strip())  # at commas outside brackets
    hosts = [host for item in items for host in _expand_brackets(item)]
    if not all(re.fullmatch(r"[^\s\[\]]+", host) for host in hosts):
        raise ValueError(f"{text!r} is not a host list such as 'gpu[003-005,9]'")
    return hosts


def _expand_brackets(item: str) -> Iterator[str]:
    """Expand the first bracket of ``item``, then the rest recursively: a host name may have several brackets."""
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", item)
    if match is None:
        yield item.strip()
        return
    prefix, ranges, rest = match.groups()
    for index in (index for limits in ranges.split(",") for index in _expand_range(limits)):
        for suffix in _expand_brackets(rest):
            yield f"{prefix}{index}{suffix}"


def _expand_range(limits: str) -> list[str]:
    """Expand ``"003-005"`` to 003, 004, 005: leading zeros are part of the host names."""
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", limits)
    if match is None:
        raise ValueError(f"{limits!r} is not an integer or a range such as '003-005'")
    first, last = match.group(1), match.group(2) or match.group(1)
    if int(last) < int(first):
        raise ValueError(f"the range {limits!r} is empty: its end is less than its start")
    return [str(index).zfill(len(first)) for index in range(int(first), int(last) + 1)]
