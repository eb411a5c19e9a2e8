"""From a command line and an environment to a process that knows its config, its rank and its groups."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from internlm import accelerator
from internlm.config import Config, check_runnable, config_hash, resolve
from internlm.core.context import global_context as gpc
from internlm.utils.common import FriendlyParser
from internlm.utils.errors import ConfigError, LaunchError, Problem
from internlm.utils.hostlist import expand_host_list
from internlm.utils.logger import get_logger

OLDEST_TORCH = (2, 13)
# rank, world size, rank on this machine, …
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")
HOW_TO_START = (
    "Start with: torchrun --nproc_per_node=N train.py --config CONFIG --launcher torch, "
    "or: srun python train.py --config CONFIG --launcher slurm"
)

ConfigLike = str | Path | dict[str, Any] | Config


@dataclass(frozen=True)
class ProcessInfo:
    """What the launcher told this process."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


# -- command line -----------------------------------------------------------------------------------------------------
def get_default_parser() -> argparse.ArgumentParser:
    """The parser of the built-in arguments; add your own with ``add_argument`` before parsing."""
    parser = FriendlyParser(description="Train a model.")
    add = parser.add_argument
    add("--config", type=str, help="Python config file")
    add("--launcher", choices=["slurm", "torch"], help="who started the processes (default: found out)")
    add("--host", type=str, help="address of rank 0 (default: as the launcher says)")
    add("--port", type=int, default=8888, help="port of rank 0, where torchrun names none (default: %(default)s)")
    add("--world_size", type=int, help="number of processes (default: as the launcher says)")
    add("--rank", type=int, help="rank of this process (default: as the launcher says)")
    add("--local_rank", type=int, help="rank on this machine (default: as the launcher says)")
    add("--backend", type=str, help="torch.distributed backend (default: nccl on CUDA, gloo on CPU)")
    add("--seed", type=int, default=1024, help="seed of everything random (default: %(default)s)")
    add("--profiling", action="store_true", help="write torch traces and a memory report")
    add("--pipeline-trace", action="store_true", help="draw a step of the pipeline, measured beside simulated")
    add("--ledger", action="store_true", help="at the end, show what was sent between ranks, by mode and collective")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, such as data.micro_num=2",
    )
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the built-in arguments of the command line (or ``arguments``)."""
    return get_default_parser().parse_args(arguments)


# -- launch -----------------------------------------------------------------------------------------------------------
def initialize_distributed_env(
    config: ConfigLike,
    launcher: str | None = None,
    master_port: int = 8888,
    seed: int = 1024,
    *,
    host: str | None = None,
    backend: str | None = None,
    overrides: Sequence[str] = (),
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
) -> None:
    """Resolve ``config``, join the other processes, make the process groups and seed every random stream.

    ``config`` is a file, a dict of keys or a resolved :class:`Config`; ``overrides`` are ``"key=value"`` strings.
    ``launcher`` is ``"torch"``, ``"slurm"`` or None, which finds out. What is given of ``host``, ``rank``,
    ``world_size`` and ``local_rank`` stands for what the launcher says. Raises :class:`ConfigError` or
    :class:`LaunchError` before any process group exists where the fault can be seen by then.
    """
    given = (rank, world_size, local_rank)
    try:
        launcher = launcher or ("torch" if rank is not None else detect_launcher(os.environ))
        if launcher == "slurm":
            process = read_slurm_environment(_with_given(SLURM_VARIABLES, given), host, master_port)
        else:
            process = read_torch_environment(_with_given(TORCH_VARIABLES, (*given, host)), master_port)
    except LaunchError:
        _resolve(config, None, overrides)  # whatever is wrong there is what comes first
        raise
    _launch(config, process, backend, seed, overrides)


def _with_given(names: Sequence[str], given: Sequence[object]) -> dict[str, str]:
    """The environment, with what was given in place of what it says."""
    chosen = {name: str(value) for name, value in zip(names, given, strict=False) if value is not None}
    return {**os.environ, **chosen}


def detect_launcher(environment: Mapping[str, str]) -> str:
    """``"torch"`` or ``"slurm"``, by whose variables are there."""
    if "RANK" in environment:
        return "torch"
    if "SLURM_PROCID" in environment:
        return "slurm"
    raise LaunchError(Problem("RANK", "not set, nor is SLURM_PROCID: no launcher started this process", HOW_TO_START))


def launch_from_torch(
    config: ConfigLike, backend: str | None = None, seed: int = 1024, overrides: Sequence[str] = ()
) -> None:
    """As :func:`initialize_distributed_env`, for processes started by torchrun."""
    initialize_distributed_env(config, "torch", seed=seed, backend=backend, overrides=overrides)


def launch_from_slurm(
    config: ConfigLike,
    host: str | None = None,
    port: int = 8888,
    backend: str | None = None,
    seed: int = 1024,
    overrides: Sequence[str] = (),
) -> None:
    """As :func:`initialize_distributed_env`, for processes started by srun; rank 0 listens on ``host`` (the first of
    the job) and ``port``."""
    initialize_distributed_env(config, "slurm", port, seed, host=host, backend=backend, overrides=overrides)


def read_torch_environment(environment: Mapping[str, str], port: int = 8888) -> ProcessInfo:
    """What torchrun put into the environment; ``port`` where it names none."""
    _demand(TORCH_VARIABLES[:-1], environment)
    environment = {"MASTER_PORT": str(port), **environment}
    rank, local_rank, world, port = (
        _number(environment, k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    return ProcessInfo(rank, world, local_rank, environment["MASTER_ADDR"], port)


def read_slurm_environment(environment: Mapping[str, str], host: str | None, port: int) -> ProcessInfo:
    """What srun put into the environment."""
    _demand(SLURM_VARIABLES, environment)
    rank, world, local_rank = (_number(environment, k) for k in ("SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID"))
    try:
        first = expand_host_list(environment["SLURM_JOB_NODELIST"])[0]
    except ValueError as error:
        raise LaunchError(Problem("SLURM_JOB_NODELIST", str(error), "Name rank 0's machine with --host")) from None
    return ProcessInfo(rank, world, local_rank, host or first, port)


def _demand(names: Sequence[str], environment: Mapping[str, str]) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        there = [name for name in names if name in environment]
        found = f" (only {', '.join(there)})" if there else ""
        raise LaunchError(Problem(", ".join(missing), f"not set{found}", HOW_TO_START))


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise LaunchError(Problem(name, f"{environment[name]!r} is not a number", HOW_TO_START)) from None


def _launch(config: ConfigLike, process: ProcessInfo, backend: str | None, seed: int, overrides: Sequence[str]) -> None:
    _check_torch()
    backend = backend or accelerator.default_backend()
    _check_arguments(backend, seed)
    _check_process(process)
    resolved = _resolve(config, process, overrides)
    _check_devices(process)
    accelerator.set_device(process.local_rank)
    _join(process, backend, resolved.parallel.timeout)
    _check_agreement(resolved, seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.backends.cudnn.deterministic = resolved.cudnn_deterministic
    torch.backends.cudnn.benchmark = resolved.cudnn_benchmark
    gpc.initialize(resolved, seed)


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise LaunchError(Problem("torch", f"{torch.__version__} is too old", f"Install torch >= {oldest}"))


def _check_arguments(backend: str, seed: int) -> None:
    problems = []
    for part in (part.rpartition(":")[2] for part in backend.split(",")):  # such as "cpu:gloo,cuda:nccl"
        if not dist.is_backend_available(part):
            problems.append(
                Problem("--backend", f"{part!r} is not available here", f"Use {accelerator.default_backend()}")
            )
    if seed < 0:
        problems.append(Problem("--seed", f"{seed} is negative", "Give 0 or more"))
    if problems:
        raise ConfigError(*problems)


def _check_process(process: ProcessInfo) -> None:
    if process.rank not in range(process.world_size):
        raise LaunchError(Problem("rank", f"{process.rank}, but the world size is {process.world_size}", HOW_TO_START))
    if process.local_rank not in range(process.world_size):
        what = f"{process.local_rank}, but the world size is {process.world_size}"
        raise LaunchError(Problem("local rank", what, HOW_TO_START))
    if process.port not in range(1, 2**16):
        raise LaunchError(Problem("port", f"{process.port} is no port", "Give torchrun --standalone, or --port"))


def _resolve(config: ConfigLike, process: ProcessInfo | None, overrides: Sequence[str]) -> Config:
    """The resolved config; ``process`` None where nobody knows how many there are."""
    if config is None:  # as the parser leaves it
        raise ConfigError(Problem("--config", "not given", "Name a config file, such as configs/demo.py"))
    keys = config.model_dump() if isinstance(config, Config) else config
    world_size = process.world_size if process else None
    result = resolve(keys, overrides, world_size=world_size, device_type=accelerator.device_type())
    check_runnable(result.config)
    if process and process.rank == 0:
        for warning in result.warnings:
            get_logger().warning(warning)
    return result.config


def _check_devices(process: ProcessInfo) -> None:
    devices = accelerator.device_count()
    if devices is not None and process.local_rank >= devices:
        raise LaunchError(
            Problem(
                "LOCAL_RANK",
                f"{process.local_rank}, but this machine has {devices} devices",
                "Start one process a device",
            )
        )


def _join(process: ProcessInfo, backend: str, timeout: float) -> None:
    """Join the default process group; a group that is already there (a test's, a notebook's) is used as it is."""
    if dist.is_initialized():
        return
    endpoint = f"{process.host}:{process.port}"
    os.environ.update(
        RANK=str(process.rank), WORLD_SIZE=str(process.world_size), LOCAL_RANK=str(process.local_rank),
        MASTER_ADDR=process.host, MASTER_PORT=str(process.port),
    )  # fmt: skip
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **_store_of_attempt(process, timeout))
    except dist.DistError as error:
        in_use = "EADDRINUSE" in str(error)
        what = "is in use" if in_use else f"can't be reached ({str(error).splitlines()[0]})"
        todo = "Choose another with --port" if in_use else "Check --host and --port, and that rank 0 runs"
        raise LaunchError(Problem(endpoint, what, todo)) from None
    if backend == "gloo":
        atexit.register(_leave)


def _store_of_attempt(process: ProcessInfo, timeout: float) -> dict[str, Any]:
    """Where torchrun keeps the store through all attempts of a job (``--max-restarts``), a part of it for this one: in
    the whole there are the addresses of ranks that have died."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    limit = timedelta(seconds=timeout)
    whole = dist.TCPStore(process.host, process.port, process.world_size, is_master=False, timeout=limit)
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", whole)
    return {"store": store, "rank": process.rank, "world_size": process.world_size}


def _leave() -> None:
    """End gloo's threads, which they do with the last reference to their group: one that lets go of a tensor while the
    interpreter ends aborts the process. (With NCCL a rank that leaves would wait for the others, who may not come.)"""
    if dist.is_initialized():
        dist.destroy_process_group()
    gpc.destroy()
    gc.collect()


def _check_agreement(config: Config, seed: int) -> None:
    """Every rank must hold the same resolved config, or they would wait for one another in the middle of a step; and
    the same seed, or they would train different models."""
    mine = {"config": config_hash(config)[:12], "--seed": str(seed)}
    all_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_ranks, mine)
    problems = []
    for what in mine:
        if len({known[what] for known in all_ranks}) > 1:
            shown = ", ".join(f"rank {rank}: {known[what]}" for rank, known in enumerate(all_ranks))
            todo = "Give every rank the same file, overrides and seed"
            problems.append(Problem(what, f"the ranks disagree ({shown})", todo))
    if problems:
        raise ConfigError(*problems)
