"""``internlm schedule``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm.cli.main import main
from internlm.pictures import chrome_trace, html, svg, text
from tests.unit.pictures.samples import simulated

CONFIG = str(Path(__file__).parents[3] / "configs/demo.py")
FOUR_BY_EIGHT = ["--stages", "4", "--micro-batches", "8"]
MISSING_SIZES = "internlm schedule: the schedule, number of stages or number of micro-batches is missing. "


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize(
    ("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zbh1", 1), ("zbv", 2)]
)
def test_prints_the_timeline(schedule: str, chunks: int, capsys: pytest.CaptureFixture[str]) -> None:
    main(["schedule", "--kind", schedule, *FOUR_BY_EIGHT])
    assert capsys.readouterr().out == text([("", simulated(schedule, chunks=chunks))], width=100)


def test_costs(capsys: pytest.CaptureFixture[str]) -> None:
    costs = ["--forward", "2", "--backward", "3", "--weight", "1.5", "--transfer", "0.5"]
    main(["schedule", "--kind", "zbh1", *FOUR_BY_EIGHT, *costs])
    timeline = simulated("zbh1", forward=2, backward=3, weight=1.5, transfer=0.5)
    assert capsys.readouterr().out == text([("", timeline)], width=100)


def test_draws(tmp_path: Path) -> None:
    files = {flag: tmp_path / flag for flag in ("svg", "html", "trace")}
    flags = [word for flag, file in files.items() for word in (f"--{flag}", str(file))]
    main(["schedule", "--kind", "zbv", *FOUR_BY_EIGHT, *flags])
    drawn = [("", simulated("zbv", chunks=2))]
    assert files["svg"].read_text(encoding="utf-8") == svg(drawn)
    assert files["html"].read_text(encoding="utf-8") == html(drawn)
    assert json.loads(files["trace"].read_text()) == json.loads(chrome_trace(drawn))


def test_a_written_schedule_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.csv"
    main(["schedule", "--kind", "zbv", *FOUR_BY_EIGHT, "--write-csv", str(file)])
    first = capsys.readouterr().out
    main(["schedule", "--csv", str(file), "--chunks", "2", *FOUR_BY_EIGHT])
    assert capsys.readouterr().out == first.replace("zbv", "mine.csv", 1)


def test_the_schedule_of_a_config_and_options_over_it(capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["--set", "parallel.pipeline.size=4", "--set", "data.micro_num=8", "--set", "model.num_layers=8"]
    main(["schedule", CONFIG, *stages, "--set", "parallel.pipeline.mode=zbh1"])
    assert capsys.readouterr().out == text([("", simulated("zbh1"))], width=100)
    main(["schedule", CONFIG, *stages, "--kind", "zbv"])
    assert capsys.readouterr().out == text([("", simulated("zbv", chunks=2))], width=100)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "zbv1", *FOUR_BY_EIGHT], "--kind: 'zbv1' is unknown. Pass one of gpipe, 1f1b, "),
        (["--kind", "zbv"], MISSING_SIZES + "Pass a config file, or --kind (or --csv), "),
        (FOUR_BY_EIGHT, MISSING_SIZES + "Pass a config file"),
        (["--kind", "zbv", "--csv", "x", *FOUR_BY_EIGHT], "internlm schedule: argument --csv: not allowed with"),
        (["--kind", "zbv", "--stages", "0"], "internlm schedule: argument --stages: expected an integer of at least"),
        (["--kind", "zbv", "--stages", "two"], "internlm schedule: argument --stages: expected an integer of at"),
        (
            ["--kind", "zbv", "--weight", "-1"],
            "internlm schedule: argument --weight: expected 0 or a number from 1e-09 to 1e+09 (all times in one unit "
            "of your choice), got '-1'",
        ),
        (["--kind", "zbv", "--weight", "nan"], "internlm schedule: argument --weight: expected 0 or a number from"),
        (["--kind", "zbv", "--weight", "1e-320"], "internlm schedule: argument --weight: expected 0 or a number"),
        (["--kind", "zbv", "--weight", "x"], "internlm schedule: argument --weight: expected a number, got 'x'"),
        (["--kind", "zbv", "--svg", "no/where.svg"], "internlm schedule: argument --svg: the parent folder of 'no/"),
        (
            ["--kind", "zbv", *FOUR_BY_EIGHT, "--svg", "."],
            "internlm schedule: argument --svg: expected a file, got the folder '.'",
        ),
        (["--kind", "zbv", *FOUR_BY_EIGHT, "--chunks", "3"], "schedule zbv: expected chunks = 2, got 3. Change"),
        (["--csv", "no.csv", *FOUR_BY_EIGHT], "no.csv: cannot be read (No such file or directory)"),
        (["--kind", "1f1b", *FOUR_BY_EIGHT, "--stagse", "2"], "--stagse: unknown argument. Did you mean '--stages'?"),
        (
            ["--kind", "1f1b", *FOUR_BY_EIGHT, "--forward", "0", "--backward", "0", "--weight", "0"],
            "--forward, --backward, --weight: all are 0. Pass at least one value above 0",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(expected)


def test_a_schedule_that_waits_for_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stuck.csv"
    file.write_text("F0,B0,F1,B1\nF1,F0,B1,B0\n")
    with pytest.raises(SystemExit) as caught:
        main(["schedule", "--csv", str(file), "--stages", "2", "--micro-batches", "2"])
    assert caught.value.code == 2
    assert "deadlock" in capsys.readouterr().err
