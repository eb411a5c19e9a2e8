"""Arguments of commands that start ranks: those of a training script, and options that are passed on to torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from internlm.cli.parsers import count, natural
from internlm.utils.common import add_overrides, add_process_arguments, add_training_arguments


# -- values -----------------------------------------------------------------------------------------------------------
def machines(text: str) -> str:
    """Parse ``--nnodes``: a number of machines, or MIN:MAX."""
    try:
        numbers = [count(part) for part in text.split(":")]
    except argparse.ArgumentTypeError:
        numbers = []
    if len(numbers) not in (1, 2) or numbers != sorted(numbers):
        raise argparse.ArgumentTypeError(f"expected a number of machines or MIN:MAX, got {text!r}")
    return text


def processes(text: str) -> str:
    """Parse ``--nproc-per-node``: a number, or a word for the number of devices or cores."""
    if text not in ("auto", "cpu", "gpu", "xpu"):
        try:
            count(text)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"expected a number, auto, cpu, gpu or xpu, got {text!r}") from None
    return text


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return number


# -- options ----------------------------------------------------------------------------------------------------------
class LauncherOption(NamedTuple):
    """Option of torchrun; ``metavar`` is empty for one without a value."""

    flag: str
    metavar: str
    help: str
    parse: Callable[[str], Any] = str


#: Options of torchrun, without those that say what to run. A test compares them with torchrun's own.
OPTIONS = (
    LauncherOption("--nproc-per-node", "N", "processes on this machine: a number, auto, cpu, gpu or xpu", processes),
    LauncherOption("--nnodes", "N", "machines, or MIN:MAX for an elastic job (default: 1)", machines),
    LauncherOption("--max-restarts", "N", "restarts of all ranks after one has failed (default: 0)", natural),
    LauncherOption("--shutdown-timeout", "S", "seconds that ranks get to save after a signal (default: 30)", natural),
    LauncherOption("--standalone", "", "run on this machine alone, with a free port"),
    LauncherOption("--node-rank", "R", "rank of this machine, for a static rendezvous", natural),
    LauncherOption("--master-addr", "HOST", "address of machine 0, for a static rendezvous"),
    LauncherOption("--master-port", "PORT", "port of machine 0, for a static rendezvous", natural),
    LauncherOption("--local-addr", "HOST", "address of this machine"),
    LauncherOption("--rdzv-backend", "NAME", "rendezvous backend: static, c10d, etcd, …"),
    LauncherOption("--rdzv-endpoint", "HOST:PORT", "endpoint of the rendezvous"),
    LauncherOption("--rdzv-id", "ID", "name of the job, the same on all machines"),
    LauncherOption("--rdzv-conf", "K=V,…", "further settings of the rendezvous"),
    LauncherOption("--monitor-interval", "S", "seconds between two looks at the ranks", seconds),
    LauncherOption("--signals-to-handle", "NAMES", "signals that are passed on to the ranks"),
    LauncherOption("--role", "NAME", "role of the ranks"),
    LauncherOption("--log-dir", "FOLDER", "folder of the files that --redirects and --tee write"),
    LauncherOption("--redirects", "SPEC", "write output of ranks to files, as torchrun describes it"),
    LauncherOption("--tee", "SPEC", "write output of ranks to files, and print it"),
    LauncherOption("--local-ranks-filter", "RANKS", "print only the output of these local ranks"),
    LauncherOption("--logs-specs", "NAME", "entry point of another way to log"),
    LauncherOption("--duplicate-stdout-filters", "WORDS", "collect the lines of stdout that have one of these words"),
    LauncherOption("--duplicate-stderr-filters", "WORDS", "collect the lines of stderr that have one of these words"),
    LauncherOption("--event-log-handler", "NAME", "handler of torchrun's events"),
    LauncherOption("--numa-binding", "MODE", "bind each rank to the cores near its GPU"),
    LauncherOption("--virtual-local-rank", "", "make one GPU visible to each rank"),
)


class _PassOn(argparse.Action):
    """Collect the words of options that are passed on."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        word = self.option_strings[0] if self.nargs == 0 else f"{self.option_strings[0]}={values}"
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), word])


def train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm train``."""
    parser.description = (
        "Train on processes that this command starts, if an option of torchrun is given; otherwise in this process, as "
        "the only rank or as that of a launcher such as srun. Exit code: 0 at the end of the run, 2 for an error that "
        "you can fix, 3 if a rank was lost or is silent, 128 + the number of the signal that stopped the run (143, "
        "130, 129), 1 for any other failure."
    )
    parser.add_argument("config_file", metavar="CONFIG", nargs="?", help="Python config file; it is executed")
    add_training_arguments(parser)
    add_launcher_options(parser)


def evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm eval``."""
    parser.description = (
        "Evaluate a checkpoint on data.valid_folder and print loss, perplexity, accuracy and bits per byte by dataset "
        "type. Layout and number of processes may differ from those that saved; no optimizer state is built or read. "
        "Processes are started as by internlm train. Exit code: 0, or 2 for an error that you can fix."
    )
    parser.add_argument("config", metavar="CONFIG", help="Python config file; it is executed")
    folder = "checkpoint, or folder whose newest one is evaluated, or folder of Hugging Face or Meta"
    parser.add_argument("--ckpt", required=True, metavar="CHECKPOINT|FOLDER", help=folder)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_overrides(parser)
    add_process_arguments(parser)
    add_launcher_options(parser)


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of torchrun, which are collected as ``launcher_words``."""
    group = parser.add_argument_group("options of torchrun")
    for option in OPTIONS:
        flags = dict.fromkeys((option.flag, f"--{option.flag[2:].replace('-', '_')}"))
        kind: dict[str, Any] = {"metavar": option.metavar, "type": option.parse} if option.metavar else {"nargs": 0}
        group.add_argument(*flags, action=_PassOn, dest="launcher_words", default=[], help=option.help, **kind)
