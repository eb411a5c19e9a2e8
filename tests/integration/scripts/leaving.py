"""Trains, and in the end prints the names of its threads, one a line."""

import atexit
from pathlib import Path


def print_threads():
    for task in Path("/proc/self/task").iterdir():
        print((task / "comm").read_text().strip())


atexit.register(print_threads)  # what is registered first is called last

from tests.integration.scripts.own_model import main  # noqa: E402

main()
