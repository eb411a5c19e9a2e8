"""Launcher of ranks, by torchrun's API, with the exit codes of the ranks, which torchrun itself does not return."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from internlm.utils.errors import EXIT_USER_ERROR, LaunchError, Problem
from internlm.utils.logger import get_logger
from internlm.utils.lost_ranks import EXIT_FAILURE, EXIT_LOST_PEER
from internlm.utils.stop_signals import STOP_SIGNALS
from internlm.utils.torch_private import deciding_on_restarts

#: Exit codes of ranks that were stopped by a signal, by the code that the launcher sees. Before a rank handles signals,
#: a signal kills it, which the launcher reports as a negative number.
STOPPED = {code: 128 + number for number in STOP_SIGNALS for code in (128 + number, -number)}
log = get_logger()


def run_ranks(options: Sequence[str], script: Sequence[str]) -> int:
    """Run a script on the ranks of this machine, and return the exit code of the job.

    Args:
        options: Options of torchrun.
        script: Script with its arguments, as torchrun takes them.

    Raises:
        LaunchError: An option is wrong, or the rendezvous has failed.
    """
    if "LOGLEVEL" not in os.environ:  # of torchrun, whose account of a failure has ten lines
        for name in logging.root.manager.loggerDict:
            if name.startswith(("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    # torchrun replaces macros such as ${local_rank} in the arguments of the script.
    arguments = torchrun.parse_args([*options, *(word.replace("$", "$$") for word in script)])
    # torchrun handles ignored signals as well, such as SIGHUP under nohup.
    names = [name.strip() for name in arguments.signals_to_handle.split(",")]
    ignored = {number.name for number in signal.Signals if signal.getsignal(number) is signal.SIG_IGN}
    arguments.signals_to_handle = ",".join(name for name in names if name not in ignored)
    if arguments.shutdown_timeout is not None:  # for the ranks, which compare it with the time of a step
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(arguments.shutdown_timeout)
    ended: dict[int, int | None] = {}
    try:
        with deciding_on_restarts(_may_restart, ended):
            torchrun.run(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        _log_killed(codes)
        return exit_code_of(codes)
    except SignalException as error:
        # Ranks may have failed before the signal, or in the save that it has caused.
        return _code_of_failed(ended) or 128 + error.sigval
    except (RendezvousError, dist.DistError) as error:
        if ended:
            if code := _code_of_failed(ended):  # these ranks have said why
                return code
            log.error("lost the launcher of another machine: it has ended, or cannot be reached")
            # Others have saved, since the whole job was stopped or since this launcher has sent them SIGTERM.
            return max((code for code in ended.values() if code and code > 0), default=EXIT_LOST_PEER)
        message = f"the launchers have not found each other ({str(error).splitlines()[0].rstrip('.')})"
        todo = "Check --rdzv-endpoint, --master-addr, --master-port and --nnodes"
        raise LaunchError(Problem("rendezvous", message, todo)) from None
    except (ValueError, OSError) as error:
        raise LaunchError(Problem("internlm train", str(error).strip(), "See: internlm train --help")) from None
    return 0


def exit_code_of(codes: Mapping[int, int]) -> int:
    """Return the exit code of a job from those of its failed ranks: 2, 1, 3, or 128 + the number of a signal.

    When one rank fails, the launcher ends the others, so the most telling code counts.

    Args:
        codes: Exit codes by rank, as the launcher sees them: negative if a signal has killed the rank.
    """
    values = set(codes.values())
    if EXIT_USER_ERROR in values:
        return EXIT_USER_ERROR
    lost = {code for code in values if code < 0 or code == EXIT_LOST_PEER} - STOPPED.keys()
    if values - lost - STOPPED.keys():
        return EXIT_FAILURE
    return EXIT_LOST_PEER if lost else max(STOPPED[code] for code in values)


def _code_of_failed(ended: Mapping[int, int | None]) -> int:
    """Return the exit code of a job that the launcher ends, from those of its ranks; 0 if none has failed by itself."""
    codes = {rank: code for rank, code in ended.items() if code}
    _log_killed(codes)
    return exit_code_of(codes) if {*codes.values()} - STOPPED.keys() else 0


def _may_restart(codes: Mapping[int, int], left: int) -> bool:
    """Return whether the ranks may be restarted after some have failed; ``left`` restarts are left."""
    code = exit_code_of(codes)
    if code == EXIT_USER_ERROR or code in STOPPED:
        return False
    if left:
        _log_killed(codes)
        log.warning(f"restarting all ranks, since {_format(codes)}; {left - 1} more restarts are left")
    return bool(left)


def _log_killed(codes: Mapping[int, int]) -> None:
    """Log the ranks that a signal has killed, since they could not log it themselves."""
    killed = {rank: code for rank, code in codes.items() if code < 0 and code not in STOPPED}
    if killed:
        log.error(f"{_format(killed)}. A rank that is out of host memory gets SIGKILL")


def _format(codes: Mapping[int, int]) -> str:
    return ", ".join(f"rank {rank} {_end_of(code)}" for rank, code in sorted(codes.items()))


def _end_of(code: int) -> str:
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"
