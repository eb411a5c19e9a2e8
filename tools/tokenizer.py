"""Turn text files into tokenized data; the same as ``internlm tokenize``."""

from __future__ import annotations

import argparse

from internlm.cli.tokenize import DESCRIPTION, add_arguments, main
from internlm.utils.errors import exit_on_user_error

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add_arguments(parser)
    exit_on_user_error(main)(parser.parse_args())
