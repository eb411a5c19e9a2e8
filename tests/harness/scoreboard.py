"""Scoreboard of injected faults: a line for each row of the table in ``doc/testing.md``, and how many were survived.

A test names the rows that it shows with ``@pytest.mark.fault("F3", …)``, or is listed in :data:`MORE_TESTS`. It counts
as one fault, unless it says by ``record_property("faults", n)`` that it injects more; by
``record_property("corruptions", "149/150")`` it adds how many changes of files were detected. Of a test that fails, no
fault counts as survived.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "doc" / "testing.md"
ROW, FAULTS, CORRUPTIONS = "fault row", "faults", "corruptions"

TESTS = Path(__file__).parents[1]
#: Rows of tests outside of ``tests/faults``, by file and start of the name.
MORE_TESTS: dict[str, dict[str, Sequence[str]]] = {
    "F1": {
        "dist/test_stop_requests.py": ["test_a_signal_", "test_signals_in_quick_", "test_on_an_accelerator_"],
        "integration/test_internlm_train.py": ["test_a_signal_to_the_launcher_", "test_ranks_whose_launcher_"],
        "integration/test_own_script.py": ["test_sigterm_to_"],
        "unit/utils/test_stop_signals.py": ["test_before_the_first_step_"],
    },
    "F2": {
        "dist/test_stop_requests.py": ["test_a_second_signal_quits_at_once"],
        "unit/utils/test_stop_signals.py": ["test_in_training_a_later_signal_"],
    },
    "F3": {
        "unit/checkpoint/test_local_commits.py": ["test_a_crash_at_any_system_call_"],
        "unit/checkpoint/test_object_checkpoints.py": ["test_a_manifest_that_arrives_", "test_parts_of_files_"],
    },
    "F4": {
        "integration/test_own_script.py": ["test_a_job_that_is_started_anew_goes_on"],
        "dist/test_lost_rank.py": ["test_a_killed_rank_is_gone"],
    },
    "F5": {
        "dist/test_saving.py": ["test_no_checkpoint_is_deleted_before_"],
        "dist/test_background_saves.py": ["test_a_save_that_fails_in_the_background_"],
        "unit/checkpoint/test_save_folder.py": ["test_neither_unfinished_checkpoints_nor_snapshots_count_"],
    },
    "F6": {"unit/checkpoint/test_verification.py": ["test_a_file_that_is_cut_off", "test_a_file_that_grew"]},
    "F7": {"unit/checkpoint/test_manifest.py": ["test_every_flipped_bit_is_found"]},
    "F8": {
        "dist/test_checkpoint_trouble.py": ["test_damage_is_found", "test_a_run_whose_checkpoints_all_fail"],
        "unit/checkpoint/test_verification.py": ["test_what_is_no_file_any_more", "test_a_file_of_another_step"],
    },
    "F9": {
        "dist/test_checkpoint_trouble.py": ["test_no_room_on_one_rank"],
        "unit/checkpoint/test_local_storage.py": ["test_a_full_disk_", "test_a_folder_without_write_permission"],
    },
    "F10": {
        "dist/test_training.py": ["test_a_bad_gradient_on_one_rank"],
        "dist/test_disturbances.py": ["test_a_loss_", "test_each_skipped_step_"],
    },
    "F11": {
        "dist/test_lost_rank.py": ["test_a_stopped_rank_", "test_a_rank_that_is_stuck_", "test_every_other_stage_"]
    },
    "F12": {
        "integration/test_wrong_starts.py": ["test_a_bad_sample_in_the_middle_of_a_run"],
        "dist/test_lost_rank.py": ["test_the_traceback_of_a_bug_", "test_an_error_that_the_user_can_fix_"],
    },
    "F13": {
        "unit/context/test_launch.py": ["test_a_port_in_use", "test_a_rank_that_never_comes", "test_a_server_that_"]
    },
    "F14": {"integration/test_internlm_train.py": ["test_a_rank_that_dies_three_times_"]},
    "F18": {"unit/checkpoint/test_lease.py": ["test_"]},
    "F19": {
        "unit/checkpoint/test_format_1.py": ["test_hostile_", "test_a_pickled_object_", "test_links_and_pipes_"],
        "unit/checkpoint/test_local_storage.py": ["test_links_", "test_what_is_no_regular"],
        "unit/checkpoint/test_storages.py": ["test_names_that_lead_out"],
    },
    "F21": {
        "dist/test_disturbances.py": ["test_training_takes_no_notice_of_webhooks"],
        "unit/monitor/test_alerts.py": ["test_a_webhook_that_", "test_a_dead_webhook_", "test_exchanges_that_hang"],
    },
    "F22": {"unit/monitor/test_writers.py": ["test_a_full_d", "test_records_go_on_", "test_a_writer_that_fails_"]},
    "F23": {
        "dist/test_stop_requests.py": ["test_training_goes_on_whatever_the_stop_file_holds"],
        "unit/train/test_stop_sources.py": ["test_other_contents_", "test_what_"],
    },
}


def rows(page: Path = PAGE) -> dict[str, str]:
    """Return the faults of the table of ``page`` by their numbers."""
    return dict(re.findall(r"^\| (F\d+) \| ([^|]+) \|", page.read_text(), re.MULTILINE))


def mark_more_tests(items: Iterable[pytest.Item]) -> None:
    """Mark the tests that are listed here with the rows that they show."""
    for item in items:
        file, name = item.path.relative_to(TESTS).as_posix(), item.name
        for row, files in MORE_TESTS.items():
            if any(name.startswith(start) for start in files.get(file, ())):
                item.add_marker(pytest.mark.fault(row))


def note_rows(items: Iterable[pytest.Item]) -> None:
    """Attach to each test the rows that it names, and check that the page has them."""
    known = rows()
    for item in items:
        named = [row for mark in item.iter_markers("fault") for row in mark.args]
        if unknown := [row for row in named if row not in known]:
            raise pytest.UsageError(f"{item.nodeid}: {PAGE.name} has no row {unknown[0]!r}")
        item.user_properties += [(ROW, row) for row in named]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one test."""

    rows: tuple[str, ...]
    result: str  # passed, failed or skipped
    seconds: float
    faults: int
    detected: int = 0
    corruptions: int = 0

    @property
    def survived(self) -> int:
        """Number of faults that were survived."""
        return self.faults if self.result == "passed" else 0


def outcomes(reports: Iterable[pytest.TestReport]) -> list[Outcome]:
    """Join the reports of setup, call and teardown of each test that names a row."""
    by_test: dict[str, list[pytest.TestReport]] = {}
    for report in reports:
        by_test.setdefault(report.nodeid, []).append(report)
    return [_joined(parts) for parts in by_test.values() if _values(parts, ROW)]


def _joined(parts: Sequence[pytest.TestReport]) -> Outcome:
    result = next((part.outcome for word in ("failed", "skipped") for part in parts if part.outcome == word), "passed")
    detected, _, corruptions = (_values(parts, CORRUPTIONS) or ("0/0",))[0].partition("/")
    return Outcome(
        rows=_values(parts, ROW),
        result=result,
        seconds=sum(part.duration for part in parts),
        faults=int((_values(parts, FAULTS) or ("1",))[0]),
        detected=int(detected),
        corruptions=int(corruptions),
    )


def _values(parts: Iterable[pytest.TestReport], key: str) -> tuple[str, ...]:
    """Return the values of a property, in order, each once."""
    return tuple(dict.fromkeys(str(value) for part in parts for name, value in part.user_properties if name == key))


def board(page_rows: dict[str, str], found: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of the scoreboard; a fault without a test is not survived."""
    width = max(map(len, page_rows.values()))
    missing = 0
    for row, text in page_rows.items():
        own = [outcome for outcome in found if row in outcome.rows and outcome.result != "skipped"]
        missing += not own
        count = f"{sum(outcome.survived for outcome in own)}/{sum(outcome.faults for outcome in own)}"
        seconds = sum(outcome.seconds for outcome in own)
        yield f"{row:<4} {text:<{width}} {count if own else 'no test':>12} {seconds:6.0f} s"
    done = [outcome for outcome in found if outcome.result != "skipped"]
    survived, faults = sum(outcome.survived for outcome in done), sum(outcome.faults for outcome in done) + missing
    yield f"faults survived {survived}/{faults}"
    detected, corruptions = sum(outcome.detected for outcome in done), sum(outcome.corruptions for outcome in done)
    yield f"corruptions detected {detected}/{corruptions}"
