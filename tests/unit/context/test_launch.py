"""Starting a process: the command line and the launcher's environment."""

from __future__ import annotations

import argparse
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm import accelerator
from internlm.accelerator import DeviceKind, pretending
from internlm.config import load_config
from internlm.initialize import environment as variables
from internlm.initialize import get_default_parser, initialize_distributed_env, launch, rendezvous
from internlm.initialize.environment import ProcessInfo, detect_launcher
from internlm.initialize.launch import parse_args
from internlm.utils.common import parse_args as common_parse_args
from internlm.utils.errors import ConfigError, LaunchError
from tests.harness.ports import free_port
from tests.unit.config.samples import SMALLEST

TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "host-a", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NPROCS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[003-005,9],login",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCH, *SLURM]:
        monkeypatch.delenv(name, raising=False)


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


# -- command line


def test_defaults() -> None:
    assert vars(parse_args([])) == {
        "config": None,
        "launcher": None,
        "host": None,
        "port": 8888,
        "world_size": None,
        "rank": None,
        "local_rank": None,
        "backend": None,
        "seed": 1024,
        "profiling": False,
        "ledger": False,
        "pipeline_trace": False,
        "set": [],
    }


def test_arguments_are_typed() -> None:
    line = (
        "--config a.py --launcher slurm --host h --port 1 --world_size 2 --rank 1 --local_rank 0 --seed 3 --profiling"
    )
    args = parse_args([*line.split(), "--set", "data.micro_num=2", "--set=adam.lr=1e-3"])
    assert (args.config, args.launcher, args.host, args.profiling) == ("a.py", "slurm", "h", True)
    assert (args.port, args.world_size, args.rank, args.local_rank, args.seed) == (1, 2, 1, 0, 3)
    assert args.set == ["data.micro_num=2", "adam.lr=1e-3"]


def test_users_add_their_own_arguments() -> None:
    parser = get_default_parser()
    parser.add_argument("--notes", type=str, default="none")
    args = parser.parse_args(["--notes", "mine"])
    assert isinstance(args, argparse.Namespace)
    assert (args.notes, args.port) == ("mine", 8888)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confg", "a.py"], "--confg: unknown argument. Did you mean '--config'?"),
        (["--world-size=8"], "--world-size: unknown argument. Did you mean '--world_size'?"),
        (["--launcher", "mpi"], "--launcher: 'mpi' is unknown. Pass one of slurm, torch"),
        (["--port", "http"], "argument --port: invalid int value: 'http'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_parse_args_is_found_in_utils_common() -> None:
    assert common_parse_args is parse_args


# -- environment


@pytest.mark.parametrize(
    ("environment", "launcher"), [(TORCH, "torch"), (SLURM, "slurm"), (TORCH | SLURM, "torch")], ids=str
)
def test_the_launcher_is_found_out(environment: dict[str, str], launcher: str) -> None:
    assert detect_launcher(environment) == launcher


def test_no_launcher_at_all() -> None:
    with pytest.raises(LaunchError, match=r"no launcher started this process\. Start with: torchrun .* or: srun "):
        detect_launcher({})


def test_torch_environment() -> None:
    assert variables.read_torch_environment(TORCH) == ProcessInfo(
        rank=5, world_size=8, local_rank=1, host="host-a", port=29500
    )


@pytest.mark.parametrize(
    ("host", "expected"), [(None, "gpu003"), ("10.0.0.1", "10.0.0.1")], ids=["first of the job", "as given"]
)
def test_slurm_environment(host: str | None, expected: str) -> None:
    assert variables.read_slurm_environment(SLURM, host, 8888) == ProcessInfo(
        rank=5, world_size=8, local_rank=1, host=expected, port=8888
    )


def test_torchs_port_may_come_from_the_command_line() -> None:
    assert variables.read_torch_environment(without(TORCH, "MASTER_PORT"), 7777).port == 7777


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR: not set. Start with: torchrun "),
        (
            without(TORCH, "WORLD_SIZE", "MASTER_PORT"),
            "WORLD_SIZE: not set (set: RANK, LOCAL_RANK, MASTER_ADDR). Start with: torchrun ",
        ),
        (TORCH | {"RANK": "first"}, "RANK: expected an integer, got 'first'. Start with: torchrun "),
        (TORCH | {"MASTER_PORT": ""}, "MASTER_PORT: expected an integer, got ''. Start with: torchrun "),
    ],
)
def test_wrong_torch_environments(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        variables.read_torch_environment(environment)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            without(SLURM, "SLURM_JOB_NODELIST"),
            "SLURM_JOB_NODELIST: not set (set: SLURM_PROCID, SLURM_NPROCS, SLURM_LOCALID). Start with: ",
        ),
        (SLURM | {"SLURM_NPROCS": "8x"}, "SLURM_NPROCS: expected an integer, got '8x'. Start with: "),
        (
            SLURM | {"SLURM_JOB_NODELIST": "gpu[003-"},
            "SLURM_JOB_NODELIST: 'gpu[003-' has unbalanced brackets. Pass rank 0's host with --host",
        ),
    ],
)
def test_wrong_slurm_environments(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        variables.read_slurm_environment(environment, None, 8888)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("environment", "launcher"), [({}, None), (TORCH, "torch"), (SLURM, "slurm"), (TORCH | SLURM, "slurm")]
)
def test_arguments_take_precedence_over_variables(environment: dict[str, str], launcher: variables.Launcher) -> None:
    explicit = variables.ExplicitProcess(rank=3, world_size=4, local_rank=2, host="host-b", port=7777)
    expected = ProcessInfo(rank=3, world_size=4, local_rank=2, host="host-b", port=7777)
    given = without(environment, "MASTER_PORT")
    assert variables.find_process(given, launcher, explicit) == expected


# -- what is refused before any process group exists


def problems_of_launch(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str] | None = None, **options: Any
) -> str:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**alone, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, LaunchError)) as caught:
        initialize_distributed_env(**{"config": SMALLEST, "launcher": "torch", **options})
    assert not dist.is_initialized()
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_PORT": "99999"}, "port: expected a port from 1 to 65535, got 99999. "),
        ({"MASTER_PORT": "0"}, "port: expected a port from 1 to 65535, got 0. "),
        ({"RANK": "3"}, "rank: must be at least 0 and less than the world size 1, got 3. "),
        ({"WORLD_SIZE": "0"}, "rank: must be at least 0 and less than the world size 0, got 0. "),
    ],
)
def test_environments_that_make_no_sense(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems_of_launch(monkeypatch, environment).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": None}, "--config: not given. Pass a config file"),
        ({"config": "missing.py"}, "missing.py: "),
        ({"backend": "glo"}, "--backend: 'glo' is not available in this build of torch. Use "),
        ({"backend": "cpu:gloo,cuda:ncl"}, "--backend: 'ncl' is not available in this build of torch. Use "),
        ({"seed": -1}, "--seed: must be at least 0, got -1. "),
        ({"overrides": ["adam.lr=0"]}, "adam.lr: "),
        (
            {"overrides": ["model_type=INTERNLM4"]},
            "model_type: nothing is registered as 'INTERNLM4'. Known: ",
        ),
        (
            {"overrides": ["model.attention_backend=flash", "model.dtype=bf16"]},
            "model.attention_backend: 'flash' requires a CUDA device and torch.float16 or torch.bfloat16, got cpu and "
            "torch.bfloat16. Set it to 'auto'",
        ),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of_launch(monkeypatch, {}, **options).startswith(message)


@pytest.mark.parametrize("version", ["1.13.1+cpu", "2.9.1"])
def test_too_old_a_torch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert problems_of_launch(monkeypatch, {}) == f"torch: expected at least 2.13, got {version}. Upgrade torch"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.13.0", True), ("2.14.0a0+git1", True), ("3.0", True), ("2.9.1", False)]
)
def test_versions_of_torch(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    if fits:
        launch._check_torch()
    else:
        with pytest.raises(LaunchError):
            launch._check_torch()


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use(busy_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    message = problems_of_launch(monkeypatch, {"MASTER_PORT": str(busy_port)})
    assert message == f"127.0.0.1:{busy_port}: is in use. Choose another port with --port"


def _free_port() -> str:
    return str(free_port())


UNREACHABLE: dict[str, tuple[str, str, str]] = {
    "rank 0 waits in vain": (
        "0",
        "127.0.0.1",
        "only 1 of 2 ranks joined within 0.5 s, without rank 1. Check --host and ",
    ),
    "rank 0 waits in vain, with an address that is wrong": (
        "0",
        "host.invalid",
        "only 1 of 2 ranks joined within 0.5 ",
    ),
    "rank 0 is not there": ("1", "127.0.0.1", "cannot be reached within 0.5 s (Connection refused). Check --host"),
    "no such host": ("1", "host.invalid", "cannot be reached within 0.5 s (Name or service not known). Check --host"),
    "no host name": ("1", "a" * 70, "cannot be reached within 0.5 s ("),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_rank_that_never_comes(case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    rank, host, message = UNREACHABLE[case]
    environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": _free_port()}
    problems = problems_of_launch(monkeypatch, environment, overrides=["parallel.timeout=0.5"])
    assert problems.startswith(f"{host}:{environment['MASTER_PORT']}: {message}")
    assert len(problems.splitlines()) == 1
    assert "frame #" not in capfd.readouterr().err  # no C++ stack traces around that line


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"", None])
def test_a_server_that_is_not_rank_0(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It answers something else, closes each connection or, with None, never answers."""
    kept: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):  # closed below
            while True:
                kept.append(listener.accept()[0])
                with suppress(OSError):  # the first connection is closed at once
                    if answer is not None:
                        kept[-1].sendall(answer)
                        kept[-1].shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        problems = problems_of_launch(monkeypatch, environment, overrides=["parallel.timeout=0.5"])
        listener.shutdown(socket.SHUT_RDWR)
    assert problems == (
        f"127.0.0.1:{port}: cannot be reached within 0.5 s (what listens there does not answer as rank 0 does). "
        "Check --host and --port, and that rank 0 is running"
    )
    assert capfd.readouterr().err == ""
    for connection in kept:
        connection.close()


def test_a_long_wait_for_rank_0_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_BEFORE_WARNING", 0.1)
    port = int(_free_port())
    monkeypatch.setattr(launch.get_logger(), "propagate", True)
    with pytest.raises(LaunchError):
        rendezvous.connect("127.0.0.1", port, timedelta(seconds=1))
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for rank 0 at 127.0.0.1:{port} (Connection refused)"
    ]


def test_a_long_wait_of_rank_0_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_BEFORE_WARNING", 0.1)
    monkeypatch.setattr(launch.get_logger(), "propagate", True)
    process = ProcessInfo(rank=0, world_size=3, local_rank=0, host="127.0.0.1", port=int(_free_port()))
    with pytest.raises(LaunchError):
        rendezvous.make_store(process, timedelta(seconds=0.5))
    (message,) = (record.getMessage() for record in caplog.records if "ranks joined" in record.getMessage())
    assert message == f"waiting at 127.0.0.1:{process.port}: only 1 of 3 ranks joined, without ranks 1-2"


def _join(ranks: Sequence[int], world_size: int, seconds: float, after: float = 0.0) -> list[str]:
    """Let processes with ``ranks`` join one job, ``after`` seconds after the first; return their errors."""
    first = ProcessInfo(rank=ranks[0], world_size=world_size, local_rank=0, host="127.0.0.1", port=int(_free_port()))

    def join(rank: int) -> str:
        time.sleep(0 if rank == ranks[0] else after)
        try:
            stores.append(rendezvous.make_store(replace(first, rank=rank), timedelta(seconds=seconds)))
        except LaunchError as error:
            return str(error).removeprefix(f"127.0.0.1:{first.port}: ")
        return ""

    stores: list[dist.Store] = []  # kept, since rank 0's server ends with its store
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(join, ranks))


def test_all_ranks_name_those_that_are_missing() -> None:
    """One of them prints it."""
    errors = _join([0, 1, 4], 6, seconds=1)
    assert len(set(errors)) == 1
    assert errors[0].startswith(
        "only 3 of 6 ranks joined within 1 s, without ranks 2-3, 5. Check --host and --port, and "
    )


def test_two_processes_with_one_rank_are_refused() -> None:
    errors = _join([0, 1, 1], 3, seconds=2)
    message = "two processes have rank 1. Give every process another rank, and every job another port"
    assert errors == [message] * 3


def test_a_rank_0_that_is_missing_is_reported_by_others() -> None:
    """Unless rank 0 does, each host reports what is wrong."""
    process = ProcessInfo(rank=1, world_size=2, local_rank=0, host="host", port=1)
    with pytest.raises(LaunchError, match=r"only 1 of 2 ranks joined within 0\.1 s, without rank 0") as caught:
        rendezvous._wait_until_joined(dist.HashStore(), process, 0.1)
    assert not caught.value.same_on_all_ranks


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.0\r\n\r\n"])
def test_a_stranger_on_the_port_holds_nobody_up(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it sends nothing or something else."""
    strangers: list[socket.socket] = []
    real = rendezvous._watch_ranks

    def watch(store: dist.Store, process: ProcessInfo, timeout: float) -> tuple[str, bool]:
        strangers.append(socket.create_connection((process.host, process.port)))
        strangers[0].sendall(words)
        return real(store, process, timeout)

    monkeypatch.setattr(rendezvous, "_watch_ranks", watch)
    assert _join([0, 1], 2, seconds=5, after=0.2) == ["", ""]
    strangers[0].close()


def test_an_attempt_does_not_see_what_an_earlier_one_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps the store through all of them."""
    whole = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    process = ProcessInfo(rank=0, world_size=1, local_rank=0, host="127.0.0.1", port=whole.port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    seen = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = rendezvous.make_store(process, timedelta(seconds=5))
        seen.append(store.check(["address"]))
        store.set("address", attempt)
    assert seen == [False, False]
    assert store.get("address") == b"1"


def test_a_published_launch_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the keyword for a check that is always made, which finds what is wrong all the same."""
    assert problems_of_launch(monkeypatch, {"RANK": "3"}, args_check=False).startswith("rank: must be at least 0")


# -- devices


@pytest.mark.parametrize(
    ("local_rank", "devices", "index"),
    [(0, None, 0), (3, None, 0), (0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)],
)
def test_a_process_takes_the_device_of_its_local_rank_or_the_only_one(
    local_rank: int, devices: int | None, index: int
) -> None:
    assert variables.device_index(local_rank, devices) == index


@pytest.mark.parametrize(("local_rank", "devices"), [(2, 2), (8, 4), (0, 0)])
def test_more_processes_than_devices_are_refused(local_rank: int, devices: int) -> None:
    with pytest.raises(LaunchError, match=rf"visible devices \({devices}\), got {local_rank}\. Start at"):
        variables.device_index(local_rank, devices)


@pytest.mark.parametrize(
    ("devices", "refused"),
    [
        (["a", "b", "c"], ""),
        (["a", "b", "b"], r"ranks (1 and 2|2 and 1) both use b, but NCCL refuses several ranks on one device"),
        (["a"] * 3, r"ranks \d and \d both use a, but NCCL refuses several ranks on one device"),
    ],
)
def test_all_ranks_refuse_a_device_that_two_of_them_share(devices: list[str], refused: str) -> None:
    store = dist.HashStore()

    def check(rank: int) -> str:
        try:
            launch.check_devices_differ(store, rank, len(devices), devices[rank])
        except LaunchError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(devices)) as pool:
        messages = list(pool.map(check, range(len(devices))))
    if refused:
        assert all(re.match(f"CUDA_VISIBLE_DEVICES: {refused}", message) for message in messages)
    else:
        assert messages == [""] * len(devices)


def test_the_reason_why_a_device_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.why_no_device("cpu") == ""
    assert ("torch" in accelerator.why_no_device("cuda")) is not torch.backends.cuda.is_built()
    with pretending(DeviceKind(name="sim", backend="fake")):
        assert accelerator.why_no_device("sim") == ""
    monkeypatch.setenv(accelerator.DEVICE_VARIABLE, "cpu")
    assert accelerator.why_no_device("cuda") == "INTERNLM_DEVICE is 'cpu'"


@pytest.mark.parametrize(("workspace", "wanted", "refused"), [
    (":0:0", True, True), (":4096:8", True, False), (":16:8", True, False), (":0:0", False, False),
])  # fmt: skip
def test_deterministic_kernels_need_a_workspace_of_cublas(
    workspace: str, wanted: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config({**SMALLEST, "cudnn_deterministic": wanted}, device_type="cpu")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    expected = r"CUBLAS_WORKSPACE_CONFIG: expected :4096:8 or :16:8 with cudnn_deterministic=True, got ':0:0'\. Unset"
    outcome = pytest.raises(ConfigError, match=expected) if refused else nullcontext()
    with pretending(DeviceKind(name="sim", backend="fake")), outcome:
        launch.check_determinism(config)
    monkeypatch.setenv(accelerator.DEVICE_VARIABLE, "cpu")
    launch.check_determinism(config)  # the CPU has no cuBLAS


# -- the flight recorder


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}),
        ({"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}, {}),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "10"}, {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}),
    ],
)
def test_the_flight_recorder_is_on_unless_the_user_has_set_it(
    environment: dict[str, str], added: dict[str, str]
) -> None:
    recorded = dict(environment)
    launch._record_collectives(recorded)
    assert recorded == {**environment, **added}
