"""Optional packages, and names that are imported on first use."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from internlm.utils.errors import UserError
from internlm.utils.lazy import lazy_exports, require, why_missing


def test_what_is_there() -> None:
    assert why_missing("json") == ""
    assert require("json", "a feature", "pip install json").dumps([1]) == "[1]"


def test_what_is_missing_says_who_wanted_it_and_how_to_get_it() -> None:
    with pytest.raises(UserError) as caught:
        require("no_such_package", "enable_tb", "pip install no-such-package")
    assert str(caught.value) == (
        "enable_tb: needs the package 'no_such_package', which cannot be imported "
        "(ModuleNotFoundError: No module named 'no_such_package'). Run: pip install no-such-package"
    )


def test_a_package_that_breaks_while_importing_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_missing("broken_package") == "OSError: libcudart.so: not found"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that defines ``answer``."""
    module = ModuleType("home_of_answer")
    module.answer = 42  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_lazy_name_is_looked_up_in_its_home(home: str) -> None:
    get, listed = lazy_exports("package", {"answer": home, "absent": "no_such_module"})
    assert get("answer") == 42
    assert listed() == ["absent", "answer"]


def test_a_lazy_module_is_imported_as_such() -> None:
    get, _ = lazy_exports("internlm", {"utils": ""})
    assert get("utils") is sys.modules["internlm.utils"]


def test_an_unknown_lazy_name(home: str) -> None:
    get, _ = lazy_exports("package", {"answer": home})
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'answers'"):
        get("answers")
