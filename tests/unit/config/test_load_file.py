"""A Python file becomes a dict of config keys, or an error that names file and line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from internlm.config import load_file
from internlm.utils.errors import ConfigError


def write(folder: Path, text: str, name: str = "run.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def failure(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_keys_are_lower_case_names_and_job_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
from __future__ import annotations
import math, os.path
from functools import partial
JOB_NAME = "x"
DO_ALERT = False
SEQ_LEN = 2 ** 4
_private = 3
class Helper: pass
def helper(): return 1
half = partial(pow, 2)
data = dict(seq_len=SEQ_LEN, total_steps=helper())
adam = {"lr": math.sqrt(1e-4)}
""",
    )
    assert load_file(path) == {"JOB_NAME": "x", "data": {"seq_len": 16, "total_steps": 1}, "adam": {"lr": 0.01}}


def test_paths_become_text_and_dicts_are_copied(tmp_path: Path) -> None:
    path = write(tmp_path, "from pathlib import Path\nFOLDER = Path('a')\ndata = dict(train_folder=FOLDER / 'b')\n")
    assert load_file(path) == {"data": {"train_folder": "a/b"}}


def test_file_knows_its_own_path(tmp_path: Path) -> None:
    path = write(tmp_path, "data = dict(train_folder=__file__)")
    assert load_file(path)["data"]["train_folder"] == str(path)


def test_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "", "7B_sft.py")
    assert failure(tmp_path / "7B_stf.py") == f"{tmp_path}/7B_stf.py: no such file. Did you mean '7B_sft.py'?"


def test_missing_file_lists_what_is_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "", "demo.py")
    write(tmp_path, "", "other.py")
    assert "Known: demo.py, other.py." in failure(tmp_path / "7B.py")


def test_missing_file_without_an_ending(tmp_path: Path) -> None:
    write(tmp_path, "", "demo.py")
    assert failure(tmp_path / "demo") == f"{tmp_path}/demo: no such file. Did you mean 'demo.py'?"


def test_missing_file_in_an_empty_folder(tmp_path: Path) -> None:
    assert "has no .py file" in failure(tmp_path / "run.py")


def test_missing_folder(tmp_path: Path) -> None:
    assert f"no such file: the folder {tmp_path}/nowhere does not exist" in failure(tmp_path / "nowhere" / "run.py")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.py").mkdir()
    assert "run.py: cannot be read (Is a directory)" in failure(tmp_path / "run.py")


def test_only_python_files_are_executed(tmp_path: Path) -> None:
    assert "run.yaml: not a Python file" in failure(write(tmp_path, "a: 1", "run.yaml"))


def test_syntax_error_names_the_line(tmp_path: Path) -> None:
    text = failure(write(tmp_path, "data = dict(\n    seq_len=8,\n)\nmodel = dict(a b)\n"))
    assert text.startswith(f"{tmp_path}/run.py:4: 'model = dict(a b)': invalid syntax")
    assert text.endswith(f"Check with: python -m py_compile {tmp_path}/run.py")


def test_null_bytes(tmp_path: Path) -> None:
    assert "null bytes" in failure(write(tmp_path, "data = 1\0"))


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("x = dict(lr=LR)", "NameError: name 'LR' is not defined"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("x = {}['lr']", "KeyError: 'lr'"),
        ("import json; json.loads('')", "JSONDecodeError: Expecting value"),
    ],
)
def test_failure_names_the_line_and_the_cause(tmp_path: Path, code: str, cause: str) -> None:
    text = failure(write(tmp_path, f"A = 1\n{code}\nB = 2\n"))
    assert text.startswith(f"{tmp_path}/run.py:2: {cause}")


def test_failure_within_a_function_names_the_innermost_line_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "def half(x):\n    return x / 0\n\ndata = dict(seq_len=half(2))\n")
    assert failure(path).startswith(f"{path}:2: ZeroDivisionError")


def test_a_config_builds_on_others(tmp_path: Path) -> None:
    """As with the published form; a change of one config is not seen by another that builds on the same files."""
    base = tmp_path / "configs" / "_base_" / "models"
    base.mkdir(parents=True)
    write(
        base, "VOCAB_SIZE = 64\nmodel = dict(num_layers=2, sizes=[1, dict(a=1)], vocab_size=VOCAB_SIZE)\n", "small.py"
    )
    read = "from internlm.utils.utils import read_base\nwith read_base():\n    from configs._base_.{} import *\n"
    write(base.parent, read.format("models.small") + "model.update(num_layers=3)\n", "deeper.py")
    first = write(tmp_path / "configs", read.format("deeper") + "model['sizes'][1].update(a=VOCAB_SIZE)\n")
    second = write(tmp_path / "configs", read.format("models.small") + "data = dict(seq_len=VOCAB_SIZE)\n", "other.py")
    for _ in range(2):
        assert load_file(first) == {"model": {"num_layers": 3, "sizes": [1, {"a": 64}], "vocab_size": 64}}
        assert load_file(second) == {
            "model": {"num_layers": 2, "sizes": [1, {"a": 1}], "vocab_size": 64},
            "data": {"seq_len": 64},
        }


def test_a_base_may_redefine_a_name_of_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "bases"
    folder.mkdir()
    write(folder, "model = dict(num_layers=2)\n", "base.py")
    read = "from internlm.utils.utils import read_base\nmodel = {}\nwith read_base():\n    from bases.base import *\n{}"
    deeper = write(folder, read.format("{}", "model.update(num_layers=3)\n"), "deeper.py")
    top = read.format("{}", "with read_base():\n    from bases.deeper import model as other\n")
    first = write(tmp_path, top + "model.update(hidden_size=8)\n")
    for _ in range(2):
        assert load_file(deeper) == {"model": {"num_layers": 3}}
        assert load_file(first) == {
            "model": {"num_layers": 2, "hidden_size": 8},
            "other": {"num_layers": 3},
        }


def test_each_folder_has_its_own_bases(tmp_path: Path) -> None:
    """Also where the names of their modules are equal; within a folder a module is imported once."""
    read = "from internlm.utils.utils import read_base\nwith read_base():\n    from same_name.base import *\n"
    runs = []
    for layers in (1, 2):
        folder = tmp_path / str(layers) / "same_name"
        folder.mkdir(parents=True)
        write(folder, f"import wave\nmodel = dict(num_layers={layers})\n", "base.py")
        runs.append(write(folder.parent, read))
    inner = tmp_path / "1" / "inner" / "same_name"
    inner.mkdir(parents=True)
    write(inner, "model = dict(num_layers=3)\n", "base.py")
    runs.append(write(inner.parent, read))
    for index in (0, 1, 0, 2, 1, 2, 0):
        assert load_file(runs[index]) == {"model": {"num_layers": index + 1}}
    once = sys.modules["same_name.base"], sys.modules["wave"]
    load_file(runs[0])
    assert once == (sys.modules["same_name.base"], sys.modules["wave"])
    with pytest.raises(ConfigError, match="No module named 'same_name'"):
        load_file(write(tmp_path, read))


def test_a_base_that_does_not_exist_is_named(tmp_path: Path) -> None:
    read = "from internlm.utils.utils import read_base\nwith read_base():\n    from configs._base_.nothing import *\n"
    assert failure(write(tmp_path, read)).startswith(
        f"{tmp_path}/run.py:3: ModuleNotFoundError: No module named 'confi"
    )
