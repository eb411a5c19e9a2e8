"""Choice of CPU kernels at the start of a run and at its resumption, the same on all ranks of a type of processor.

One rank of each type of processor determines the table: from the cache file, or by a measurement that it adds to the
file. All others use its table. A checkpoint stores the tables of all types of processor of the job.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from internlm.accelerator import processor
from internlm.ops.cpu import kernel_choice
from internlm.ops.cpu.kernel_timing import bf16_slowdown, measure
from internlm.utils.errors import first_of_all_ranks
from internlm.utils.logger import get_logger

log = get_logger()

_FILE = "cpu_kernels.json"
_by_processor: dict[str, dict[str, str]] = {}


def check_request() -> None:
    """Check the user's choice of kernels.

    Raises:
        ConfigError: ``INTERNLM_CPU_KERNELS`` is malformed.
    """
    kernel_choice.forced(processor.requested_kernels())


def choose_kernels(dtype: torch.dtype) -> None:
    """Install the table of kernels for a run with parameters of ``dtype``; collective."""
    forced = kernel_choice.forced(processor.requested_kernels())
    own_type = processor.processor_type()
    types: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(types, own_type)
    tables: list[Any] = [None] * len(types)
    leads = types.index(own_type) == dist.get_rank()
    table, source = _determine(own_type, dtype) if leads else (None, "")
    dist.all_gather_object(tables, table)
    by_type = {kind: kernel_choice.to_plain(tables[types.index(kind)] | forced) for kind in sorted(set(types))}
    _install(own_type, by_type)
    if leads:
        log.info(f"CPU kernels: {kernel_choice.summary(kernel_choice.current())} ({source}; {own_type})")
        _warn_of_emulation(own_type, dtype)


def kernels_of_job() -> dict[str, dict[str, str]]:
    """Return the tables of the run by type of processor, as plain data for a checkpoint; empty on other devices."""
    return _by_processor


def resume_kernels(recorded: dict[str, dict[str, str]]) -> None:
    """Install the tables that a checkpoint recorded; log a warning where the run cannot continue bit by bit.

    Args:
        recorded: Result of :func:`kernels_of_job` at the save.
    """
    if not _by_processor or not recorded:  # not on the CPU, now or then
        return
    own_type = processor.processor_type()
    table = kernel_choice.from_plain(recorded.get(own_type))
    if table is None and own_type in recorded:
        _warn_once("the checkpoint records the CPU kernels of another version of this project")
        return
    if table is None:
        _warn_once(f"the checkpoint was saved on another processor ({'; '.join(recorded)}; now {own_type})")
        return
    forced = kernel_choice.forced(processor.requested_kernels())
    if any(table[case] != kernel for case, kernel in forced.items()):
        _warn_once(f"{processor.KERNELS_VARIABLE} selects other kernels than the checkpoint was saved with")
    plain = kernel_choice.to_plain({**table, **forced})
    _install(own_type, {**_by_processor, **recorded, own_type: plain})


def _warn_once(cause: str) -> None:
    message = f"{cause}: the run continues with other rounding errors, not bit by bit"
    if first_of_all_ranks(message):
        log.warning(message)


def _install(own_type: str, by_type: dict[str, dict[str, str]]) -> None:
    global _by_processor
    _by_processor = by_type
    kernel_choice.install(kernel_choice.from_plain(by_type[own_type]))


def _determine(own_type: str, dtype: torch.dtype) -> tuple[dict[kernel_choice.Case, str], str]:
    """Determine the table, and its source for the log, on the rank that chooses for its type of processor."""
    table = dict(kernel_choice.rule(own_type))
    requested = processor.requested_kernels()
    if requested not in ("", kernel_choice.MEASURE):
        return table, f"{processor.KERNELS_VARIABLE}={requested}"
    if not torch.backends.mkldnn.is_available():
        return table, "torch was built without oneDNN"
    path, threads = processor.cache_folder() / _FILE, torch.get_num_threads()
    key = f"{own_type}, torch {torch.__version__}, {dtype}, {threads} thread{'s' * (threads != 1)}"
    cached = _read(path)
    known = kernel_choice.from_plain(cached.get(key))
    if known is not None and not kernel_choice.collapses(known):
        return dict(known), f"from {path}"
    start = time.perf_counter()
    table |= measure(table, dtype)
    seconds = time.perf_counter() - start
    # Read again: another job may have added its own entry since.
    _write(path, {**_read(path), key: kernel_choice.to_plain(table)})
    return table, f"measured in {seconds:.1f} s, kept in {path}"


def _warn_of_emulation(own_type: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not processor.has_bf16(own_type):
        log.warning(
            f"model.dtype: this processor has no instructions for bfloat16, in which a product takes "
            f"{bf16_slowdown():.1f} times as long as in float32. Use 'torch.float32'"
        )


# -- the cache file ---------------------------------------------------------------------------------------------------
def _read(path: Path) -> dict[str, Any]:
    """Read the cache file; a missing file is empty, and so, with a warning, is a damaged one."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):  # ValueError: not JSON, or not text
        pass
    log.warning(f"{path}: cannot be read. The CPU kernels are measured anew")
    return {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace the cache file atomically; a folder that cannot be written to is not an error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        Path(name).replace(path)
