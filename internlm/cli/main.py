"""``internlm``: the console command, a table of sub-commands."""

from __future__ import annotations

from collections.abc import Sequence

import internlm
from internlm.cli import config, memory, schedule, tokenize, verify
from internlm.utils.common import FriendlyParser
from internlm.utils.errors import exit_on_user_error

#: Modules with ``add_parser(subparsers)``, which sets ``run``: a function of the parsed arguments.
COMMANDS = (config, memory, schedule, tokenize, verify)


def get_parser() -> FriendlyParser:
    """The parser of the command and all its sub-commands."""
    parser = FriendlyParser(prog="internlm", description="Pretrain large language models.")
    parser.add_argument("--version", action="version", version=f"internlm {internlm.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command line (or ``arguments``); the exit code, where None is success."""
    parsed = get_parser().parse_args(arguments)
    return parsed.run(parsed)
