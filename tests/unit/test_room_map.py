"""The map in doc/architecture.md lists every file of the package."""

from __future__ import annotations

from tools.room_map import PACKAGE, PAGE, refreshed, room_map


def test_the_map_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert refreshed(page) == page, "run: python tools/room_map.py --write"


def test_every_file_has_a_row() -> None:
    rows = [line for line in room_map().splitlines() if line.startswith("| `")]
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert len(rows) == len(files)
