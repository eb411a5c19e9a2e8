"""The decorator of a script's main function, without a run; tests/dist/test_published_scripts.py has one in a run."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from internlm.monitor import internevo_monitor
from internlm.utils.errors import ConfigError, DataError, Problem


def test_a_decorated_function_keeps_its_name_and_result() -> None:
    @internevo_monitor(feishu_alert=True, clean_run=True)
    def main(a: int, *, b: int) -> int:
        """Add two numbers."""
        return a + b

    assert (main(1, b=2), main.__name__, main.__doc__) == (3, "main", "Add two numbers.")


@pytest.mark.parametrize("clean_run", [True, False])
def test_a_clean_run_ends_without_process_groups(clean_run: bool) -> None:
    @internevo_monitor(clean_run=clean_run)
    def main() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    main()
    assert dist.is_initialized() is not clean_run
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("clean_run", "raised"), [(True, SystemExit), (False, DataError)])
def test_a_users_mistake_ends_a_clean_run_in_one_line(
    clean_run: bool, raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    @internevo_monitor(feishu_alert=False, clean_run=clean_run)
    def main() -> None:
        raise DataError(Problem("data.train_folder", "no such folder", "Check the path"))

    with pytest.raises(raised) as caught:
        main()
    if clean_run:
        assert caught.value.code == 2  # type: ignore[attr-defined]
        assert capsys.readouterr().err == "data.train_folder: no such folder. Check the path\n"


def test_any_other_exception_keeps_its_traceback() -> None:
    @internevo_monitor()
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.parametrize("clean_run", [True, False])
def test_a_users_mistake_outside_of_the_function_is_one_line_too(
    clean_run: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published scripts read the config before they call the function."""
    traceback = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: traceback.append(error))
    internevo_monitor(clean_run=clean_run)(print)
    for error in (ConfigError(Problem("adam.lr", "is nan", "Set it")), RuntimeError("a bug")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == ("adam.lr: is nan. Set it\n" if clean_run else "")
    assert [str(error) for _, error, _ in traceback][-1] == "a bug"
    assert len(traceback) == (1 if clean_run else 2)
