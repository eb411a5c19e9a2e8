"""``internlm train`` without ranks: the options of torchrun, and exit codes from those of ranks."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from internlm.cli import elastic
from internlm.cli.elastic import exit_code_of, run_ranks
from internlm.cli.launch_options import OPTIONS, train
from internlm.utils.common import FriendlyParser, parse_args, words_of
from internlm.utils.errors import LaunchError

#: What torchrun is to run, which is not for the user to say; and a way to start processes that commands don't have.
OURS = {"--module", "--no-python", "--run-path", "--start-method", "--help"}


def test_the_options_are_those_of_torchrun() -> None:
    flags = {action.option_strings[-1] for action in get_args_parser()._actions if action.option_strings}
    # The last spelling of most options has underscores.
    known = {f"--{flag.lstrip('-').replace('_', '-')}" for flag in flags}
    assert {option.flag for option in OPTIONS} == known - OURS


def test_options_of_torchrun_are_passed_on_in_both_spellings() -> None:
    parser = FriendlyParser()
    train(parser)
    words = ["--nproc_per_node", "2", "--standalone", "--rdzv-conf=a=1,b=2", "x.py", "--seed=3", "--max-restarts", "1"]
    args = parser.parse_args(words)
    assert args.launcher_words == ["--nproc-per-node=2", "--standalone", "--rdzv-conf=a=1,b=2", "--max-restarts=1"]
    assert (args.config_file, args.seed) == ("x.py", 3)
    assert parser.parse_args(["x.py"]).launcher_words == []
    torchruns = get_args_parser().parse_args([*args.launcher_words, "script.py"])
    assert (torchruns.nproc_per_node, torchruns.standalone, torchruns.max_restarts) == ("2", True, 1)


def test_the_words_of_arguments_are_parsed_to_the_same_arguments() -> None:
    words = ["--config", "x.py", "--seed", "7", "--ledger", "--set", "a.b=c d", "--set", "e=", "--pipeline-trace"]
    args = parse_args(words)
    assert parse_args(words_of(args)) == args
    assert words_of(parse_args([])) == []
    other = argparse.Namespace(**vars(args), config_file="y.py", launcher_words=["--standalone"])
    assert words_of(other) == words_of(args)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([2, 143], 2), ([2, -15, -9], 2), ([1, 3], 1), ([1, 143, -15], 1), ([7, -9], 1), ([-9], 3), ([-9, 3, 143], 3),
        ([3, 143], 3), ([-11, -15], 3), ([143, 143], 143), ([130, 130], 130), ([-15, 143], 143), ([-2], 130),
        ([130, 143], 143),
    ],
)  # fmt: skip
def test_the_most_telling_exit_code_counts(codes: list[int], expected: int) -> None:
    """When one rank fails, the launcher ends the others by SIGTERM, and then by SIGKILL."""
    assert exit_code_of(dict(enumerate(codes))) == expected


@pytest.mark.parametrize(
    ("codes", "left", "expected"),
    [([1], 1, True), ([-9, -15], 2, True), ([3], 1, True), ([3], 0, False), ([2], 2, False), ([143], 2, False),
     ([130, 143], 2, False)],
)  # fmt: skip
def test_ranks_are_restarted_if_it_may_help(codes: list[int], left: int, expected: bool) -> None:
    assert elastic._may_restart(dict(enumerate(codes)), left) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tee=7"], "internlm train: "),
        (["--local-ranks-filter=a"], "internlm train: --local_ranks_filter must be a comma-separated list of integers"),
        (["--rdzv-endpoint=127.0.0.1:x", "--rdzv-backend=c10d"], "internlm train: "),
        (["--rdzv-backend=c11d"], "internlm train: "),
        (["--nproc-per-node=gpu"], "internlm train: Cuda is not available. See: internlm train --help"),
    ],
)
def test_options_that_torchrun_refuses(options: list[str], expected: str) -> None:
    with pytest.raises(LaunchError) as error:
        run_ranks(options, ["-m", "internlm"])
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Restore the handlers that torch's launcher replaces."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("command", "code", "runs"),
    [
        ("exit 3", 3, 2),
        ("exit 1", 1, 2),
        ("kill -9 $$", 3, 2),
        ("exit 2", 2, 1),
        ("kill -15 $$", 143, 1),
        ("exit", 0, 1),
    ],
)
def test_a_job_is_restarted_if_it_may_help(command: str, code: int, runs: int, tmp_path: Path) -> None:
    """The ranks are shells, which start faster than training does."""
    script = ["--no-python", "sh", "-c", f"echo >> {tmp_path / 'runs'}; {command}"]
    assert run_ranks(["--max-restarts=1", "--monitor-interval=0.01"], script) == code
    assert (tmp_path / "runs").read_text() == "\n" * runs


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("rank_0", "code"),
    [
        ("begin; exit 2", 2),
        ("begin; kill -9 $$", 3),
        ("trap 'exit 2' TERM; begin; sleep 20 & wait", 2),  # its last save finds no space, for example
        ("trap 'exit 143' TERM; begin; sleep 20 & wait", 143),
        ("trap '' TERM; begin; exec sleep 20", 143),  # the launcher kills it in the end
    ],
)
def test_after_a_signal_to_the_launcher_the_codes_of_failed_ranks_count(
    rank_0: str, code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The launcher gets the signal before it sees that rank 0 has failed."""

    def stop() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    begin = f"begin() {{ > {tmp_path}/$RANK; }}"
    ranks = f"{begin}; test $RANK = 1 || {{ {rank_0}; }}; trap 'exit 143' TERM; begin; sleep 20 & wait"
    options = ["--nproc-per-node=2", "--monitor-interval=10", "--shutdown-timeout=1"]
    threading.Thread(target=stop, daemon=True).start()
    assert run_ranks(options, ["--no-python", "sh", "-c", ranks]) == code
    assert ("rank 0 was killed by SIGKILL" in caplog.text) == (code == 3)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("rank", "code"),
    [("begin; kill -STOP $$", 3), ("trap 'exit 143' TERM; begin; sleep 20 & wait", 143),
     ("trap 'exit 2' TERM; begin; sleep 20 & wait", 2)],
)  # fmt: skip
def test_the_loss_of_another_launchers_store_is_no_error_of_the_rendezvous(
    rank: str, code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that has failed by itself has said why."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]

    def end_store() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        stores.clear()

    threading.Thread(target=end_store, daemon=True).start()
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{stores[0].port}", "--rdzv-conf=is_host=0"]
    options += ["--monitor-interval=0.01", "--shutdown-timeout=1"]
    script = f"begin() {{ > {tmp_path}/up; }}; {rank}"
    assert run_ranks(options, ["--no-python", "sh", "-c", script]) == code
    assert ("lost the launcher of another machine" in caplog.text) == (code != 2)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)])
def test_a_closed_terminal_stops_a_job_except_under_nohup(handler: signal.Handlers, code: int) -> None:
    signal.signal(signal.SIGHUP, handler)
    rank = "kill -HUP $PPID; sleep 0.5"
    assert run_ranks(["--monitor-interval=0.01"], ["--no-python", "sh", "-c", rank]) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_before_the_ranks_are_started(number: int, code: int) -> None:
    script = "import sys, time\nfrom internlm.cli import training\nsys.modules['internlm.cli.elastic'] = sys\n"
    script += "sys.run_ranks = lambda *_: (print('ready', flush=True), time.sleep(15))\ntraining.launch([], [])"
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (code, f"{signal.Signals(number).name}: no rank was started, exiting {code}\n")


@pytest.mark.parametrize("command", ["train --help", "train x.py --nproc-per-nod=2", "train"])
def test_help_and_errors_do_not_import_torch(command: str) -> None:
    script = "import sys\nfrom internlm.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
    script += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, *command.split()], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in command else 2)
    assert "AssertionError" not in done.stderr
