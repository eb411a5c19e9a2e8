"""Signals in each phase of a training process, also while its main thread is blocked in C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

#: Start of each script. ``block`` blocks the main thread where no signal can interrupt it, as C++ code does.
START = """
import ctypes, os, signal, sys, time
from internlm.utils import progress, stop_signals
from internlm.utils.stop_requests import Inbox, Request
os.environ["RANK"] = "1"
inbox = Inbox()

def block():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def ready():
    print("ready", flush=True)

def train_until(request):
    ready()
    while request not in (taken := inbox.take()):
        assert not taken
        time.sleep(0.01)
    print("requested", flush=True)
"""
#: As START, with the repeated signals of a request within half a second.
CATCH = "stop_signals.REPEAT_SECONDS = 0.5\nsignals = stop_signals.catch_signals()\n"
#: Seconds in which a process ends that does nothing, with a margin for a busy machine.
SOON = 8.0


@dataclass(frozen=True)
class Ended:
    """A script that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    """Time from the first signal to the end."""


def run(script: str, *numbers: int, apart: float = 0.0, catch: str = CATCH) -> Ended:
    """Run a script that prints "ready", and send it signals, ``apart`` seconds."""
    command = [sys.executable, "-c", START + catch + script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(apart)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    return Ended(process.returncode, out, err, time.monotonic() - start)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_before_the_first_step_a_signal_ends_the_process_by_an_exception(number: int, code: int) -> None:
    ended = run("try:\n    ready()\n    time.sleep(15)\nfinally:\n    print('cleaned up')", number)
    assert (ended.code, ended.out) == (code, "cleaned up\n")
    name = signal.Signals(number).name
    (line,) = ended.err.splitlines()
    assert line.endswith(f"{name} on rank 1 before the first step: nothing to save, exiting {code}")
    assert ended.seconds < SOON


def test_a_signal_while_the_config_is_executed_is_not_an_error_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(15)")
    ended = run(f"from internlm.config.load import execute_file\nexecute_file('{tmp_path}/config.py')", signal.SIGTERM)
    assert ended.code == 143
    assert ended.err.count("\n") == 1


def test_before_the_first_step_a_process_that_is_blocked_in_c_ends_too() -> None:
    ended = run("ready()\nblock()", signal.SIGTERM)
    assert ended.code == 143
    assert "before the first step" in ended.err
    assert ended.seconds < SOON


@pytest.mark.parametrize(
    ("number", "request_name"),
    [
        (signal.SIGTERM, "TERMINATE"),
        (signal.SIGINT, "INTERRUPT"),
        (signal.SIGHUP, "HANG_UP"),
        (signal.SIGUSR1, "SAVE"),
    ],
)
def test_in_training_a_signal_is_a_request(number: int, request_name: str) -> None:
    ended = run(f"signals.begin_training(inbox)\ntrain_until(Request.{request_name})", number)
    assert (ended.code, ended.out) == (0, "requested\n")
    acknowledged = "finishing the step before exiting" in ended.err
    assert acknowledged is (number != signal.SIGUSR1)


def test_signals_in_quick_succession_are_one_request() -> None:
    script = "signals.begin_training(inbox)\ntrain_until(Request.TERMINATE)\ntime.sleep(1)\nassert not inbox.take()"
    ended = run(script, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, apart=0.01)
    assert (ended.code, ended.out) == (0, "requested\n")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("blocked", ["block()", "time.sleep(15)"])
def test_in_training_a_later_signal_quits_at_once(blocked: str) -> None:
    ended = run(f"signals.begin_training(inbox)\nready()\n{blocked}", signal.SIGINT, signal.SIGINT, apart=0.7)
    assert ended.code == 130
    first, second = ended.err.splitlines()
    assert "SIGINT on rank 1: finishing the step before exiting 130; another signal after" in first
    assert second.endswith("SIGINT on rank 1 again: exiting 130 at once. Complete checkpoints stay intact")


def orphan(script: str, **environment: str) -> tuple[str, str]:
    """Run a script that prints "ready", kill the shell that started it, and return what it writes to its end."""
    command = ["sh", "-c", '"$@" & wait', "sh", sys.executable, "-c", START + CATCH + script]
    environment = {**os.environ, **environment}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        return launcher.communicate(timeout=20)


@pytest.mark.parametrize("blocked", ["block()", "time.sleep(15)"])
def test_before_the_first_step_a_rank_ends_with_its_launcher(blocked: str) -> None:
    script = f"try:\n    ready()\n    {blocked}\nexcept SystemExit as end:\n    print('code', end.code)\n    raise"
    out, err = orphan(script, TORCHELASTIC_RUN_ID="x")
    assert out == ("" if blocked == "block()" else "code 143\n")
    assert err.endswith("the launcher of rank 1 died before the first step: nothing to save, exiting 143\n")


@pytest.mark.parametrize(
    ("begin", "environment", "died"),
    [
        ("signals.begin_training(inbox)", {"TORCHELASTIC_RUN_ID": "x"}, True),  # which the ranks find after the step
        ("pass", {}, False),  # of a process without a launcher
    ],
)
def test_a_process_goes_on_without_its_parent(begin: str, environment: dict[str, str], died: bool) -> None:
    script = f"parent = os.getppid()\n{begin}\nready()\nwhile os.getppid() == parent:\n    time.sleep(0.01)\n"
    out, _ = orphan(script + "time.sleep(0.7)\nprint(progress.launcher_has_died())", **environment)
    assert out == f"{died}\n"


AFTER = "signals.begin_training(inbox)\nsignals.end_training('step 8 is saved', {code})\nready()\ntime.sleep(0.5)\n"


def test_after_the_last_step_a_signal_sets_the_exit_code() -> None:
    ended = run(AFTER.format(code=0) + "print('closed')\nsys.exit(signals.final_exit_code())", signal.SIGTERM)
    assert (ended.code, ended.out) == (143, "closed\n")
    (line,) = ended.err.splitlines()
    assert line.endswith("SIGTERM on rank 1 after the last step: step 8 is saved, exiting 143")


def test_a_signal_after_the_main_function_returned_sets_the_exit_code() -> None:
    late = "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
    ended = run(AFTER.format(code=0) + late + "sys.exit(signals.final_exit_code())")
    assert ended.code == 143
    assert "after the last step: step 8 is saved, exiting 143" in ended.err


def test_the_launchers_signal_after_a_stop_changes_nothing() -> None:
    ended = run(AFTER.format(code=130) + "sys.exit(130)", signal.SIGTERM, signal.SIGTERM, apart=0.1)
    assert (ended.code, ended.err) == (130, "")


def test_the_launchers_signal_after_an_error_keeps_its_exit_code() -> None:
    ended = run("progress.end_within_limit(2)\nready()\ntime.sleep(0.5)\nsys.exit(2)", signal.SIGTERM)
    assert (ended.code, ended.err) == (2, "")


def test_a_handler_of_the_script_is_left_alone() -> None:
    own = "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))\n"
    script = "signals.begin_training(inbox)\nready()\ntime.sleep(0.5)\nassert not inbox.take()"
    ended = run(script, signal.SIGTERM, catch=own + CATCH)
    assert (ended.code, ended.out) == (0, "mine\n")
    assert "SIGTERM does not save and stop this run, since it is ignored or has a handler already" in ended.err


def test_under_nohup_a_closed_terminal_does_nothing_and_no_line_warns_of_it() -> None:
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    script = "signals.begin_training(inbox)\nready()\ntime.sleep(0.5)\nassert not inbox.take()"
    ended = run(script, signal.SIGHUP, catch=nohup + CATCH)
    assert (ended.code, ended.err) == (0, "")


LOOP = """
import asyncio
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, lambda: print('mine', flush=True))
    with stop_signals.catching_signals():
        stop_signals.stop_signals().begin_training(inbox)
        ready()
        while Request.TERMINATE not in inbox.take():
            await asyncio.sleep(0.01)
asyncio.run(main())
"""


def test_an_event_loop_of_the_script_keeps_its_signals() -> None:
    """Its handlers are called through the one socket that the interpreter writes to."""
    ended = run(LOOP, signal.SIGUSR2, signal.SIGTERM, apart=0.3, catch="")
    assert (ended.code, ended.out) == (0, "mine\n")


def test_previous_handlers_are_restored_after_the_block() -> None:
    script = "with stop_signals.catching_signals():\n    pass\nready()\ntime.sleep(15)"
    assert run(script, signal.SIGTERM, catch="").code == -signal.SIGTERM


STOPPED_BLOCK = """
with stop_signals.catching_signals():
    stop_signals.stop_signals().end_training('step 8 is saved', 143)
ready()
time.sleep(0.5)
sys.exit(143)
"""


def test_signals_are_ignored_after_a_block_in_which_the_run_was_stopped() -> None:
    assert run(STOPPED_BLOCK, signal.SIGTERM, catch="").code == 143


def test_a_signal_of_a_forked_child_is_not_one_of_its_parent() -> None:
    script = """
signals.begin_training(inbox)
child = os.fork()
if not child:
    time.sleep(15)
    os._exit(9)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.3)
assert not inbox.take()
"""
    assert run("ready()" + script).out == f"{-signal.SIGTERM}\n"


def test_sigusr2_prints_the_stacks_of_all_threads() -> None:
    ended = run("def forward():\n    ready()\n    time.sleep(1)\nforward()", signal.SIGUSR2)
    assert ended.code == 0
    assert "in forward" in ended.err
