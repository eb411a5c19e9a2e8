"""Start of a run: config, default process group, parallel groups and seeds."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import random
from collections.abc import MutableMapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from internlm import accelerator
from internlm.accelerator.host_memory import keep_freed_memory
from internlm.config import Config, check_registered, check_runnable, config_hash, resolve
from internlm.core.context import global_context as gpc
from internlm.initialize.environment import (
    ExplicitProcess,
    Launcher,
    ProcessInfo,
    check_process,
    device_index,
    find_process,
)
from internlm.initialize.rendezvous import CHECK_RANK_0, ending_after, make_store
from internlm.ops import why_unavailable
from internlm.ops.cpu.kernel_start import check_request, choose_kernels
from internlm.utils.common import get_default_parser as get_default_parser
from internlm.utils.common import parse_args as parse_args
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import ConfigError, LaunchError, Problem, format_by_rank
from internlm.utils.logger import get_logger
from internlm.utils.lost_ranks import end_beacons, start_beacons
from internlm.utils.progress import dump_stack_on_signal, enter_phase, exit_code_after_lost_peer
from internlm.utils.torch_private import default_store

OLDEST_TORCH = (2, 13)
#: Variable of cuBLAS, and its values for which torch's matmuls on a GPU are deterministic.
CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
#: Collectives that the flight recorder keeps for each rank.
RECORDED_COLLECTIVES = 2000

ConfigLike = str | Path | dict[str, Any] | Config


# -- launch -----------------------------------------------------------------------------------------------------------
def initialize_distributed_env(
    config: ConfigLike,
    launcher: Launcher | None = None,
    master_port: int = 8888,
    seed: int = 1024,
    args_check: bool = True,
    *,
    host: str | None = None,
    backend: str | None = None,
    overrides: Sequence[str] = (),
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
) -> None:
    """Resolve ``config``, join the default process group, make the parallel groups and seed all random generators.

    Args:
        config: Path of a config file, nested dict of keys, or resolved :class:`Config`.
        launcher: ``"torch"`` or ``"slurm"``. None: detect it.
        master_port: Port of rank 0 if the launcher sets none.
        seed: Seed of initial values, data order and dropout.
        args_check: Ignored, because the config is always checked; existing InternEvo scripts pass it.
        host: Address of rank 0, instead of the launcher's.
        backend: Backend of ``torch.distributed``; default: nccl on CUDA, gloo on CPU.
        overrides: Config overrides as strings ``"key=value"``.
        rank: Rank of this process, instead of the launcher's.
        world_size: Number of processes, instead of the launcher's.
        local_rank: Rank on this machine, instead of the launcher's.

    Raises:
        ConfigError: The config, backend or seed is invalid (raised before any process group exists), or the ranks have
            different configs or seeds.
        LaunchError: torch is too old, the launcher's variables are missing or wrong, the machine has fewer devices than
            processes, rank 0 cannot be reached, or NCCL would connect several ranks on one device.
    """
    explicit = ExplicitProcess(rank=rank, world_size=world_size, local_rank=local_rank, host=host, port=master_port)
    try:
        process = find_process(os.environ, launcher, explicit)
    except LaunchError:
        # Report config mistakes first, for users who try a config without a launcher.
        _resolve(config, None, overrides)
        raise
    # Run all local checks before joining: after that, an error on one rank leaves the others blocked.
    _check_torch()
    backend = backend or accelerator.default_backend()
    _check_arguments(backend, seed)
    check_request()
    check_process(process)
    resolved = _resolve(config, process, overrides)
    check_registered(resolved)
    # NCCL binds a communicator to the device that is current when its group is made.
    accelerator.set_device(device_index(process.local_rank, accelerator.device_count()))
    check_determinism(resolved)
    _check_attention(resolved)  # after that, since it reads the capability of the current device
    _join(process, backend, resolved.parallel.timeout)
    _check_agreement(resolved, seed)
    if accelerator.device_kind().is_host:
        keep_freed_memory()
        choose_kernels(torch_dtype(str(resolved.model.dtype)))
    _seed_generators(seed)
    _set_determinism(resolved.cudnn_deterministic)
    torch.backends.cudnn.benchmark = resolved.cudnn_benchmark
    gpc.initialize(resolved, seed)
    enter_phase("loading")


def _seed_generators(seed: int) -> None:
    """Seed Python's and NumPy's generators for users' code; the framework draws from its own streams only."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _set_determinism(wanted: bool) -> None:
    """Ask torch, cuDNN, cuBLAS and FlashAttention for deterministic kernels, if wanted."""
    torch.backends.cudnn.deterministic = wanted
    if not wanted:  # leave alone what a script has asked for itself
        return
    # Not only cuDNN: on a GPU, the backward pass of attention adds gradients in any order unless this is set.
    torch.use_deterministic_algorithms(True)
    # Every torch.empty would be filled, at the cost of a kernel.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # The algorithms of cuBLAS depend on its workspace; torch refuses matmuls without this variable.
    os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])


def launch_from_torch(
    config: ConfigLike, backend: str | None = None, seed: int = 1024, overrides: Sequence[str] = ()
) -> None:
    """Call :func:`initialize_distributed_env` with the launcher ``"torch"``, for processes started by torchrun."""
    initialize_distributed_env(config, "torch", seed=seed, backend=backend, overrides=overrides)


def launch_from_slurm(
    config: ConfigLike,
    host: str | None = None,
    port: int = 8888,
    backend: str | None = None,
    seed: int = 1024,
    overrides: Sequence[str] = (),
) -> None:
    """Call :func:`initialize_distributed_env` with the launcher ``"slurm"``, for processes started by srun.

    Rank 0 listens on ``host`` (default: the job's first host) and ``port``.
    """
    initialize_distributed_env(config, "slurm", port, seed, host=host, backend=backend, overrides=overrides)


# -- checks -----------------------------------------------------------------------------------------------------------
def _check_torch() -> None:
    version = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise LaunchError(Problem("torch", f"expected at least {oldest}, got {torch.__version__}", "Upgrade torch"))


def _check_arguments(backend: str, seed: int) -> None:
    problems = []
    names = [entry.rpartition(":")[2] for entry in backend.split(",")]  # such as "cpu:gloo,cuda:nccl"
    for name in names:
        if not dist.is_backend_available(name):
            todo = f"Use {accelerator.default_backend()}"
            problems.append(Problem("--backend", f"{name!r} is not available in this build of torch", todo))
    if seed < 0:
        problems.append(Problem("--seed", f"must be at least 0, got {seed}", "Choose another seed"))
    if problems:
        raise ConfigError(*problems)


def _check_device_is_not_shared(process: ProcessInfo, backend: str) -> None:
    """Check that no two ranks use the same device, if NCCL connects them."""
    device = accelerator.device_kind().device_id()
    if device is not None and "nccl" in backend:
        check_devices_differ(default_store(), process.rank, process.world_size, device)


def check_devices_differ(store: dist.Store, rank: int, world_size: int, device: str) -> None:
    """Check that every rank has a device of its own; all ranks call this, each with the identifier of its device.

    Raises:
        LaunchError: Two ranks have the same device. It is raised on all ranks, since NCCL would block those that have a
            device of their own.
    """
    # By the store, since a collective would fail for the very reason that is checked here.
    key, shared = f"internlm/device/{device}", "internlm/device/shared"
    if store.add(key, 1) == 1:
        store.set(f"{key}/rank", str(rank))
    else:
        other = store.get(f"{key}/rank").decode()
        store.set(shared, f"ranks {other} and {rank} both use {device}")
    if store.add("internlm/device/checked", 1) == world_size:
        store.set("internlm/device/all", "")
    store.wait(["internlm/device/all"])
    if store.check([shared]):
        todo = "Start at most one process per GPU, and make another GPU visible to each, or pass --backend gloo"
        message = f"{store.get(shared).decode()}, but NCCL refuses several ranks on one device"
        raise LaunchError(Problem("CUDA_VISIBLE_DEVICES", message, todo))


def check_determinism(config: Config) -> None:
    """Check that a run that asks for deterministic kernels can have them.

    Raises:
        ConfigError: The user has set another workspace of cuBLAS, with which torch refuses all matmuls on a GPU.
    """
    workspace = os.environ.get(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    wanted = config.cudnn_deterministic and not accelerator.device_kind().is_host
    if wanted and workspace not in DETERMINISTIC_WORKSPACES:
        expected = " or ".join(DETERMINISTIC_WORKSPACES)
        message = f"expected {expected} with cudnn_deterministic=True, got {workspace!r}"
        raise ConfigError(Problem(CUBLAS_WORKSPACE, message, "Unset it, or set cudnn_deterministic=False"))


def _check_attention(config: Config) -> None:
    model = config.model
    backend, dtype = model.attention_backend, torch_dtype(str(model.dtype))
    # The config was checked for the type of the device and the dtype already, but not for the package that the kernel
    # needs, nor for its limits.
    reason = why_unavailable(backend, accelerator.device_type(), dtype, model.head_size) if backend != "auto" else ""
    if reason:
        raise ConfigError(Problem("model.attention_backend", reason, "Set it to 'auto'"))


def _check_agreement(config: Config, seed: int) -> None:
    """Check that all ranks have the same resolved config and seed.

    Ranks with different configs would block in the middle of a step; ranks with different seeds would train different
    models.

    Raises:
        ConfigError: The ranks have different configs or seeds.
    """
    # Compare hashes, since whole configs are long; 12 hexadecimal digits suffice.
    own = {"config": f"SHA-256 {config_hash(config)[:12]}", "--seed": str(seed)}
    all_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_ranks, own)
    problems = []
    for setting in own:
        values = [of_rank[setting] for of_rank in all_ranks]
        if len(set(values)) > 1:
            todo = "Pass the same config file, overrides and seed on every rank"
            problems.append(Problem(setting, f"differs between ranks ({format_by_rank(values)})", todo))
    if problems:
        raise ConfigError(*problems)


# -- steps of the launch ----------------------------------------------------------------------------------------------
def _resolve(config: ConfigLike, process: ProcessInfo | None, overrides: Sequence[str]) -> Config:
    """Resolve and check the config; ``process`` is None if the world size is unknown."""
    if config is None:  # the default of --config
        raise ConfigError(Problem("--config", "not given", "Pass a config file, such as configs/demo.py"))
    keys = {**config.model_dump(), **config.variables} if isinstance(config, Config) else config
    world_size = process.world_size if process else None
    result = resolve(keys, overrides, world_size=world_size, device_type=accelerator.device_type())
    check_runnable(result.config)
    if process and process.rank == 0:
        for warning in result.warnings:
            get_logger().warning(warning)
    return result.config


def _join(process: ProcessInfo, backend: str, timeout: float) -> None:
    """Join the default process group, or keep the one that exists already (in a test or a notebook)."""
    if dist.is_initialized():
        _start_beacons(timeout)
        return
    # torch, NCCL and users' code read these variables, which Slurm does not set.
    endpoint = f"{process.host}:{process.port}"
    os.environ.update(
        RANK=str(process.rank), WORLD_SIZE=str(process.world_size), LOCAL_RANK=str(process.local_rank),
        MASTER_ADDR=process.host, MASTER_PORT=str(process.port),
    )  # fmt: skip
    try:
        if "nccl" in backend:
            _record_collectives(os.environ)
        with ending_after(timeout, endpoint):
            store = make_store(process, timedelta(seconds=timeout))
        with ending_after(timeout, endpoint):
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=timeout),
                store=store,
                rank=process.rank,
                world_size=process.world_size,
            )
    except dist.DistError as error:
        # torch has no exception class for a port in use.
        in_use = "EADDRINUSE" in str(error)
        message = "is in use" if in_use else f"cannot be reached ({str(error).splitlines()[0]})"
        todo = "Choose another port with --port" if in_use else CHECK_RANK_0
        raise LaunchError(Problem(endpoint, message, todo)) from None
    _start_beacons(timeout)
    if backend == "gloo":
        leave_at_exit()
    _check_device_is_not_shared(process, backend)


def _start_beacons(timeout: float) -> None:
    """Publish this rank's progress, in a job of several ranks, by which the ranks find one that is lost."""
    if dist.get_world_size() > 1 and dist.get_backend() != "fake":
        end_beacons_at_exit()
        dump_stack_on_signal()
        # The host of an accelerator does not wait for collectives, so that no wait of it fails.
        watches = not accelerator.device_kind().is_host
        start_beacons(dist.get_rank(), dist.get_world_size(), timeout, watches)


@functools.cache  # registered before leave_at_exit and so called after it: the thread ends a process that blocks there
def end_beacons_at_exit() -> None:
    """Stop the thread of the beacons when the interpreter ends."""
    atexit.register(end_beacons)


def _record_collectives(environment: MutableMapping[str, str]) -> None:
    """Switch on torch's flight recorder, which keeps the last collectives and writes them when one has timed out.

    Under NCCL a wait returns at once, so that only the watchdog of the process group finds a lost peer. Settings of the
    user are kept.
    """
    if not environment.keys() & {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}:
        environment["TORCH_FR_BUFFER_SIZE"] = str(RECORDED_COLLECTIVES)
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


@functools.cache  # registered once: handlers that a script registers later may still use the groups
def leave_at_exit() -> None:
    """Destroy the process groups when the interpreter ends.

    The threads of a gloo group end with the last reference to it; a thread that frees a tensor while the interpreter
    shuts down aborts the process, so gloo's groups are always destroyed. NCCL's are destroyed after a successful run
    only: this blocks until all ranks do so, and a failed rank never does.
    """
    atexit.register(_leave)


def _leave() -> None:
    if exit_code_after_lost_peer() is not None:  # the process ends without its cleanup
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    gpc.destroy()
    gc.collect()
