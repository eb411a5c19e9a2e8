"""Errors for people: their text, and how an entry point ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from internlm.utils import errors
from internlm.utils.errors import (
    ConfigError,
    DataError,
    LaunchError,
    Problem,
    UserError,
    exit_on_user_error,
    format_by_rank,
    report,
)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("adam.lr", "-1 is negative", "Give 0 or more"), "adam.lr: -1 is negative. Give 0 or more"),
        (Problem("adam.lr", "-1 is negative.", "Give 0 or more"), "adam.lr: -1 is negative. Give 0 or more"),
        (Problem("adam.lr", "-1 is negative"), "adam.lr: -1 is negative"),
    ],
)
def test_the_form_of_a_problem(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_an_error_tells_all_its_problems() -> None:
    error = ConfigError(Problem("a", "1"), Problem("b", "2"))
    assert str(error) == "a: 1\nb: 2"
    assert [problem.where for problem in error.problems] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3, 4], "rank 0: 3; rank 1: 4"),
        (["a"] * 7 + ["b", "a", "a"], "ranks 0-6, 8-9: a; rank 7: b"),
        (["b", "a", "b"], "ranks 0, 2: b; rank 1: a"),
        (["a"] * 64, "ranks 0-63: a"),
    ],
)
def test_values_are_grouped_by_rank(values: list[object], text: str) -> None:
    assert format_by_rank(values) == text


def exit_code_of(error: BaseException) -> int | str | None:
    @exit_on_user_error
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.mark.parametrize("kind", [UserError, ConfigError, LaunchError, DataError])
def test_a_users_mistake_is_printed_once_without_traceback(
    kind: type[UserError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(kind(Problem("a", "1", "Do b"))) == 2
    assert capsys.readouterr() == ("", "a: 1. Do b\n")


def test_what_is_no_users_mistake_keeps_its_traceback() -> None:
    @exit_on_user_error
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_a_good_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def main(a: int, *, b: int) -> int:
        """Says what it does."""
        return a + b

    assert main(1, b=2) == 3
    assert main.__doc__ == "Says what it does."
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize(("kind", "printed"), [(ConfigError, ""), (DataError, "a: 1\n")])
def test_what_every_rank_finds_is_left_to_rank_0(
    variable: str,
    kind: type[UserError],
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("MASTER_PORT", variable)  # another job for each case
    monkeypatch.setattr(errors, "_GRACE_SECONDS", 0)
    report(kind(Problem("a", "1")))
    assert capsys.readouterr().err == printed


@pytest.fixture
def _group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
def test_where_ranks_can_talk_each_thing_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As several ranks would, that all find the same; what only one finds is said by that one."""
    monkeypatch.setattr(errors, "_GRACE_SECONDS", 0)
    for what in ("1", "1", "2"):
        report(DataError(Problem("a", what)))
    assert capsys.readouterr().err.splitlines() == ["a: 1", "a: 2"]
