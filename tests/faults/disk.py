"""Journal of what processes do to the files below a folder, and what is left of them after a crash at any moment.

The processes of a test call the real functions of :mod:`os`; while :func:`watched` is active, each call that changes a
file goes through a function of the test. :class:`Journal` writes the calls of several processes in their order.
:class:`Disk` replays them up to any call: wholly, as after ``kill -9``, or without what was not flushed, as after a
power failure.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

#: Content by path; None for a folder, a function that gets the path for anything else.
Tree = dict[str, bytes | Callable[[Path], object] | None]


@dataclass(frozen=True)
class Call:
    """Call that changed a file or a folder, or a remark of the test (``kind`` "note")."""

    kind: str
    """create, truncate, write, mkdir, rename, remove (a file or an empty folder), sync, note."""
    path: str
    """Relative to the watched folder, which is ""."""
    target: str = ""
    """New name of what is renamed; text of a note."""
    data: bytes = b""
    position: int = 0


#: Function that gets a call and the function that performs it.
Handler = Callable[[Call, Callable[[], Any]], Any]


@contextmanager
def watched(root: Path, handler: Handler) -> Iterator[None]:
    """Pass every call that changes something below ``root`` to ``handler``, in this process."""
    top = os.path.realpath(root)
    real = {name: vars(os)[name] for name in _DESCRIBED}

    def below(path: str) -> str | None:
        if path == top:
            return ""
        return path.removeprefix(f"{top}/") if path.startswith(f"{top}/") else None

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            call = _DESCRIBED[name](below, *args, **options)
            perform = lambda: real[name](*args, **options)  # noqa: E731
            return perform() if call is None else handler(call, perform)

        return wrapped

    try:
        for name in real:
            setattr(os, name, wrap(name))
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


Below = Callable[[str], str | None]


def _of_descriptor(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _named(below: Below, path: Any, folder: int | None) -> str | None:
    if isinstance(path, int):
        return below(_of_descriptor(path))
    text = os.path.join(_of_descriptor(folder) if folder is not None else os.getcwd(), os.fspath(path))
    return below(text) if isinstance(text, str) else None


def _open(below: Below, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> Call | None:
    if not flags & (os.O_CREAT | os.O_TRUNC) or (name := _named(below, path, dir_fd)) is None:
        return None
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return Call("create", name)
    return Call("truncate", name) if flags & os.O_TRUNC else None


def _write(below: Below, descriptor: int, data: Any) -> Call | None:
    name = _named(below, descriptor, None)
    return None if name is None else Call("write", name, "", bytes(data), os.lseek(descriptor, 0, os.SEEK_CUR))


def _fsync(below: Below, descriptor: int) -> Call | None:
    name = _named(below, descriptor, None)
    return None if name is None else Call("sync", name)


def _rename(
    below: Below, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
) -> Call | None:
    name, target = _named(below, old, src_dir_fd), _named(below, new, dst_dir_fd)
    return None if name is None or target is None else Call("rename", name, target)


def _mkdir(below: Below, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> Call | None:
    name = _named(below, path, dir_fd)
    return None if name is None else Call("mkdir", name)


def _remove(below: Below, path: Any, *, dir_fd: int | None = None) -> Call | None:
    name = _named(below, path, dir_fd)
    return None if name is None else Call("remove", name)


#: Functions of os that change files, and how their calls are described; None is a call that changes nothing.
_DESCRIBED: dict[str, Callable[..., Call | None]] = {
    "open": _open,
    "write": _write,
    "fsync": _fsync,
    "rename": _rename,
    "replace": _rename,
    "mkdir": _mkdir,
    "unlink": _remove,
    "remove": _remove,
    "rmdir": _remove,
}


# -- recording


class Journal:
    """File to which several processes append the calls that they make, one at a time, so that their order is known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._write = os.write  # before it is watched
        self._threads = threading.Lock()

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        """Perform a call, and append it if it succeeded."""
        with self._threads:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                result = perform()
                done = replace(call, data=call.data[:result]) if call.kind == "write" else call
                self._write(self._descriptor, pickle.dumps(done))
                return result
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def note(self, path: str, text: str) -> None:
        """Append a remark."""
        self(Call("note", path, text), lambda: None)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def calls_in(file: Path) -> list[Call]:
    """Return the calls of a journal."""
    calls = []
    with file.open("rb") as stream:
        while stream.peek(1):
            calls.append(pickle.load(stream))
    return calls


# -- replaying


@dataclass
class _Node:
    """File or folder."""

    content: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] | None = None
    """Nodes by name; None in a file."""


@dataclass(frozen=True)
class _Change:
    call: Call
    node: int
    """Folder whose entries the call changes, or the file that it writes to; the one that it flushes."""
    name: str = ""
    entry: int = -1
    """Node of a new entry."""
    new_name: str = ""
    is_durable_at: int = 1 << 62
    """Index of the call that flushes ``node`` next."""


class Disk:
    """Files below an empty folder, as a sequence of calls leaves them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._is_folder = [True]
        self._changes: list[_Change | None] = []
        nodes = self._new_nodes()
        for call in calls:
            change = None if call.kind == "note" else self._located(call, nodes)
            if change:
                nodes += [_Node(entries={} if kind else None) for kind in self._is_folder[len(nodes) :]]
                _apply(change, nodes)
            self._changes.append(change)
        flushed: dict[int, int] = {}
        for index in range(len(calls) - 1, -1, -1):
            if change := self._changes[index]:
                if change.call.kind == "sync":
                    flushed[change.node] = index
                elif change.node in flushed:
                    self._changes[index] = replace(change, is_durable_at=flushed[change.node])

    def _new_nodes(self) -> list[_Node]:
        return [_Node(entries={} if kind else None) for kind in self._is_folder]

    def _located(self, call: Call, nodes: list[_Node]) -> _Change:
        folder, _, name = call.path.rpartition("/")
        if call.kind in ("write", "truncate", "sync"):
            return _Change(call, _find(call.path, nodes))
        entry = -1
        if call.kind in ("create", "mkdir"):
            entry = len(self._is_folder)
            self._is_folder.append(call.kind == "mkdir")
        return _Change(call, _find(folder, nodes), name, entry, call.target.rpartition("/")[2])

    def after(self, count: int, keep: Callable[[int, Call], bool] = lambda index, call: True) -> Tree:
        """Return what is left after the first ``count`` calls.

        Args:
            count: Number of calls that were made.
            keep: Function that says of a call that was not flushed whether it is kept, by its index.
        """
        nodes = self._new_nodes()
        for index, change in enumerate(self._changes[:count]):
            if change and (change.is_durable_at < count or keep(index, change.call)):
                _apply(change, nodes)
        tree: Tree = {}
        _list(nodes, 0, "", tree)
        return tree


def _find(path: str, nodes: list[_Node]) -> int:
    node = 0
    for part in path.split("/") if path else []:
        entries = nodes[node].entries
        assert entries is not None, path
        node = entries[part]
    return node


def _apply(change: _Change, nodes: list[_Node]) -> None:
    """Change the nodes; a call that is impossible because an earlier one was lost changes nothing."""
    call, node = change.call, nodes[change.node]
    if call.kind == "truncate":
        node.content.clear()
    elif call.kind == "write":
        node.content.extend(bytes(max(call.position - len(node.content), 0)))
        node.content[call.position : call.position + len(call.data)] = call.data
    elif node.entries is not None:
        old = node.entries.get(change.name, -1)
        if call.kind in ("create", "mkdir"):
            node.entries[change.name] = change.entry
        elif call.kind == "remove" and old >= 0 and not nodes[old].entries:
            del node.entries[change.name]
        elif call.kind == "rename" and old >= 0:
            there = node.entries.get(change.new_name, -1)
            if there < 0 or not nodes[there].entries:
                node.entries[change.new_name] = node.entries.pop(change.name)


def _list(nodes: list[_Node], index: int, path: str, tree: Tree) -> None:
    for name, inner in sorted((nodes[index].entries or {}).items()):
        own = f"{path}/{name}".lstrip("/")
        tree[own] = None if nodes[inner].entries is not None else bytes(nodes[inner].content)
        _list(nodes, inner, own, tree)


# -- crashes


def killed(index: int, call: Call) -> bool:
    """Keep everything: the processes ended, the system did not."""
    return True


def only_flushed(index: int, call: Call) -> bool:
    """Keep nothing that was not flushed."""
    return False


def names_without_data(index: int, call: Call) -> bool:
    """Keep folders and names, as a file system with a journal of these does; what was written is lost."""
    return call.kind not in ("write", "truncate")


def some(seed: int) -> Callable[[int, Call], bool]:
    """Keep calls at random: a disk may write in any order what was not flushed."""
    return lambda index, call: random.Random(f"{seed}-{index}").random() < 0.5


def torn(disk: Disk, count: int) -> Tree | None:
    """Return what is left if the last of ``count`` calls has written half of its data; None if it wrote none."""
    last = disk.calls[count - 1]
    if last.kind != "write":
        return None
    tree = disk.after(count)
    content = tree[last.path]
    assert isinstance(content, bytes)
    tree[last.path] = content[: last.position + len(last.data) // 2]
    return tree


def tree_of(root: Path) -> Tree:
    """Return the content of a folder."""
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def write_tree(tree: Tree, root: Path) -> None:
    """Write files and folders below ``root``, which must be empty."""
    for name, content in sorted(tree.items(), key=lambda entry: entry[0]):  # a folder comes before its files
        if content is None:
            (root / name).mkdir()
        elif isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            content(root / name)
