"""``internlm config``, and the parser that all commands share."""

from __future__ import annotations

import json

import pytest

import internlm
from internlm.cli.main import main
from internlm.utils.common import FriendlyParser
from tests.unit.config.samples import ROOT

SFT = str(ROOT / "configs/7B_sft.py")


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_prints_values_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", SFT, "--set", "data.micro_num=8", "--world-size", "8", "--device", "cuda"])
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["data"]["micro_num"] == {"value": 8, "source": "override"}
    assert shown["model"]["num_layers"] == {"value": 32, "source": "file"}
    assert shown["model"]["head_dim"] == {"value": 128, "source": "derived"}
    assert shown["loss"]["op_type"] == {"value": "auto", "source": "default"}
    assert err == ""


def test_prints_lists_of_sections(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", SFT, "--set", "optimizer.param_groups=[{'pattern': 'norm', 'weight_decay': 0.0}]"])
    (group,) = json.loads(capsys.readouterr().out)["optimizer"]["param_groups"]["value"]
    assert group == {"pattern": "norm", "lr_scale": 1.0, "weight_decay": 0.0, "type": None}


def test_says_what_this_version_can_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", str(ROOT / "configs/7B_isp_sft.py"), "--set", "model.norm_head=True"])
    assert "warning: model.norm_head: True is not available in this version. Use False\n" in capsys.readouterr().err


def test_problems_go_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", SFT, "--set", "data.micro_num=0", "--set", "adam.lr=-1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["data.micro_num", "adam.lr"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["confikg", SFT], "COMMAND: 'confikg' is unknown. Did you mean 'config'?"),
        (["config", SFT, "--wrld-size", "8"], "--wrld-size: unknown argument. Did you mean '--world-size'?"),
        (["config", SFT, "--world=8"], "--world: unknown argument. Did you mean '--world-size'?"),
        (["config", SFT, "--device", "gpu"], "--device: 'gpu' is unknown. Give one of cpu, cuda"),
        (["config", SFT, "--world-size", "0"], "internlm config: argument --world-size: '0' is not a whole number"),
        (["config", SFT, "another.py"], "another.py: unknown argument. See: internlm --help"),
        (["config"], "internlm config: the following arguments are required: CONFIG. See: internlm config --help"),
        ([], "internlm: the following arguments are required: COMMAND. See: internlm --help"),
    ],
)
def test_wrong_command_lines(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"internlm {internlm.__version__}\n"


def test_all_unknown_flags_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    parser = FriendlyParser(prog="train.py")
    parser.add_argument("--config")
    parser.add_argument("--seed", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--confikg", "x.py", "--sed=3"])
    assert capsys.readouterr().err.splitlines() == [
        "--confikg: unknown argument. Did you mean '--config'?",
        "--sed: unknown argument. Did you mean '--seed'?",
    ]


def test_other_ranks_stay_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert exit_code("confikg") == 2
    assert capsys.readouterr().err == ""


def test_known_arguments_can_still_be_parsed_alone() -> None:
    parser = FriendlyParser()
    parser.add_argument("--seed", type=int)
    assert parser.parse_known_args(["--seed", "3", "--mine"])[1] == ["--mine"]
