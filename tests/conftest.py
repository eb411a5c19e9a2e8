"""Configuration of every test: threads, hypothesis profiles, marks and the end of worker processes."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported
# The same kernels on all processors, and no measurement at the start of a run.
os.environ["INTERNLM_CPU_KERNELS"] = "gemm=onednn,grad_weight=float32,attention=blocked"

import gc
import sys
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.harness import gpu_table, scoreboard

#: Examples of a property, without and with ``--wide``.
EXAMPLES, MANY_EXAMPLES = 50, 300
#: Tests on ranks, which keep all cores busy: two at a time take more than twice as long.
ON_RANKS = "tests/dist/"
#: Those among them with few ranks, or with ranks that mostly wait.
LIGHT = tuple(
    f"{ON_RANKS}test_{name}.py"
    for name in (
        "checkpoint_trouble",
        "compile",
        "host_reads",
        "pool",
        "published_families",
        "resume",
        "verify",
        "vocab_parallel",
    )
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--wide``, which includes the rows that are marked so."""
    parser.addoption("--wide", action="store_true", help="run the widest sweeps too (make test-all)")


def pytest_configure(config: pytest.Config) -> None:
    """Set how many examples properties are tried with; in CI always the same ones."""
    examples = MANY_EXAMPLES if config.getoption("--wide") else EXAMPLES
    settings.register_profile("session", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=examples)
    settings.load_profile("session")


@pytest.hookimpl(tryfirst=True)  # marks that are added here can be selected with -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the widest sweeps, unless they are asked for, and skip what needs CUDA where there is none."""
    if not config.getoption("--wide"):
        wide = [item for item in items if item.get_closest_marker("wide")]
        config.hook.pytest_deselected(items=wide)
        items[:] = [item for item in items if not item.get_closest_marker("wide")]
    scoreboard.mark_more_tests(items)
    scoreboard.note_rows(item for item in items if item.get_closest_marker("fault"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    gpu_table.note_rows(marked)
    from internlm.accelerator import why_no_device  # here: collecting a few pure tests should not import torch

    if reason := why_no_device("cuda"):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"no CUDA device: {reason}"))


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of all further collections of garbage, which look at nothing else."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print a table after a run of the tests on a GPU alone (``make test-gpu``), or of faults (``make faults``)."""
    groups = terminalreporter.stats.values()
    reports = [report for group in groups for report in group if isinstance(report, pytest.TestReport)]
    lines: Iterable[str] = ()
    if config.getoption("markexpr") == "gpu":
        terminalreporter.section("rows of doc/gpu.md")
        lines = gpu_table.table(gpu_table.rows(), gpu_table.outcomes(reports))
    elif config.getoption("markexpr") == "fault":
        terminalreporter.section("faults of doc/testing.md")
        lines = scoreboard.board(scoreboard.rows(), scoreboard.outcomes(reports))
    for line in lines:
        terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Return the scheduler of ``--dist=loadscope``: one process runs most tests on ranks, others the other files."""
    return _RanksTogether(config, log)


class _RanksTogether(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return ON_RANKS if file.startswith(ON_RANKS) and file not in LIGHT else file


@pytest.fixture(scope="session", autouse=True)
def _end_workers() -> Iterator[None]:
    """End the worker pools, if any test started them."""
    yield
    if "tests.harness.pool" in sys.modules:
        sys.modules["tests.harness.pool"].close_pools()
