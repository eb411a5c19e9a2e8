"""``internlm config``, and what all subcommands of ``internlm`` have in common."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

import internlm
from internlm.cli.main import CKPT_COMMANDS, COMMANDS, DATA_COMMANDS, EXIT_CLOSED_PIPE, main
from internlm.cli.parsers import SCHEDULES
from internlm.core.scheduler import table
from internlm.utils.common import FriendlyParser
from tests.unit.config.samples import ROOT

SFT = str(ROOT / "configs/7B_sft.py")


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_prints_values_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", SFT, "--set", "data.micro_num=8", "--world", "8", "--device", "cuda"])
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


def test_refuses_what_a_start_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", str(ROOT / "configs/7B_isp_sft.py"), "--set", "model.num_shared_experts=1") == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "model.num_shared_experts: 1 is not available in this version. Use 0\n")


@pytest.mark.parametrize("name", ["MIXTRALMOE", "internlm2", "MY_MODEL"])
def test_model_types_that_are_not_registered_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", SFT, "--set", f"model_type={name}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model_type: ")
    assert repr(name) in line
    known = line.partition("Known: ")[2].partition(".")[0].split(", ")
    assert {"INTERNLM", "INTERNLM2", "INTERNLM2_PUBLIC", "LLAMA", "LLAMA2"} <= {*known}  # other tests register more


def test_problems_go_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", SFT, "--set", "data.micro_num=0", "--set", "adam.lr=-1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["data.micro_num", "adam.lr"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["confikg", SFT], "COMMAND: 'confikg' is unknown. Did you mean 'config'?"),
        (["config", SFT, "--wrld", "8"], "--wrld: unknown argument. Did you mean '--world'?"),
        (["config", SFT, "--world-size=8"], "--world-size: unknown argument. Did you mean '--world'?"),
        (["memory", SFT, "--sett", "a=1", "--world", "8"], "--sett: unknown argument. Did you mean '--set'?"),
        (["verify", SFT, "--device", "tpu"], "--device: 'tpu' is unknown. Pass one of cpu, cuda"),
        (["config", SFT, "--device", "gpu"], "--device: 'gpu' is unknown. Pass one of cpu, cuda"),
        (["config", SFT, "--world", "0"], "internlm config: argument --world: expected an integer of at least 1"),
        (["config", SFT, "another.py"], "another.py: unknown argument. See: internlm --help"),
        (["config", SFT, "--set", "adam.lr", "=", "3"], "adam.lr =: has blanks around '='. Write adam.lr=3"),
        (["config", SFT, "--set", "adam.lr", "=3"], "adam.lr =3: has blanks around '='. Write adam.lr=3"),
        (["config", SFT, "--set", "adam.lr=", "3"], "adam.lr= 3: has blanks around '='. Write adam.lr=3"),
        (
            ["config", SFT, "--set", "adam.lr=3", "data.micro_num=2"],
            "data.micro_num: unknown argument. Write --set data.micro_num=2: each override needs its own --set",
        ),
        (["train", SFT, "--nproc-per-nod", "2"], "--nproc-per-nod: unknown argument. Did you mean '--nproc-per-node'?"),
        (["train", SFT, "--seeed=1"], "--seeed: unknown argument. Did you mean '--seed'?"),
        (
            ["train", SFT, "--nproc_per_node=x"],
            "internlm train: argument --nproc-per-node/--nproc_per_node: expected a ",
        ),
        (["train", SFT, "--nnodes", "3:2"], "internlm train: argument --nnodes: expected a number of machines or MIN:"),
        (["train", SFT, "--nnodes", "1:2:3"], "internlm train: argument --nnodes: expected a number of machines or "),
        (["train", SFT, "--max-restarts=-1"], "internlm train: argument --max-restarts/--max_restarts: expected an in"),
        (
            ["train", SFT, "--monitor-interval=nan"],
            "internlm train: argument --monitor-interval/--monitor_interval: ex",
        ),
        (["train", SFT, "--set", "adam.lr", "=", "3"], "adam.lr =: has blanks around '='. Write adam.lr=3"),
        (["train"], "CONFIG: not given. Pass one config file, such as configs/demo.py"),
        (["train", SFT, "--config", SFT], "CONFIG: given twice. Pass one config file, such as configs/demo.py"),
        (["config"], "internlm config: the following arguments are required: CONFIG. See: internlm config --help"),
        ([], "internlm: the following arguments are required: COMMAND. See: internlm --help"),
    ],
)
def test_wrong_command_lines(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_an_empty_value_may_be_followed_by_the_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "--set", "data.skip_batches=", SFT])
    assert json.loads(capsys.readouterr().out)["data"]["skip_batches"] == {"value": "", "source": "override"}
    assert exit_code("config", SFT, "--set", "data.skip_batches=", SFT) == 2
    assert capsys.readouterr().err.startswith(f"data.skip_batches= {SFT}: has blanks around '='. Write data.skip_")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"internlm {internlm.__version__}\n"


def test_all_unknown_flags_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
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


#: Answers without any work; each must come without importing torch.
QUICK = (
    ["--help"],
    ["--version"],
    *([command.name, "--help"] for command in COMMANDS),
    *(["ckpt", command.name, "--help"] for command in CKPT_COMMANDS),
    *(["data", command.name, "--help"] for command in DATA_COMMANDS),
    ["config", SFT],
)


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_answers_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from internlm.cli.main import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "finally:\n"
        "    print('torch' in sys.modules, 'pydantic' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout
    needs_pydantic = arguments == ["config", SFT]
    assert done.stderr == f"False {needs_pydantic}\n"


def test_help_takes_at_most_half_a_second_of_cpu_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "internlm", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 0.5


# argparse itself ignores that its help could not be written.
@pytest.mark.parametrize(("arguments", "code"), [(["config", SFT], EXIT_CLOSED_PIPE), (["--help"], 0)])
def test_a_closed_pipe_ends_the_command_quietly(arguments: list[str], code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as head does once it has its lines, only sooner
    command = [sys.executable, "-m", "internlm", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_closed_pipe_of_errors_ends_the_command_too() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "internlm", "config", "no_such_file.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (done.returncode, done.stdout) == (EXIT_CLOSED_PIPE, b"")


def test_all_commands_that_take_a_config_take_it_alike(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("config", "memory", "schedule", "verify"):
        assert exit_code(command, "--help") == 0
        usage = capsys.readouterr().out
        assert all(word in usage for word in ("CONFIG", "--world N", "--set KEY=VALUE", "--device {cpu")), command


def test_schedules_on_the_command_line_are_those_of_the_scheduler() -> None:
    assert SCHEDULES == table.SCHEDULES
