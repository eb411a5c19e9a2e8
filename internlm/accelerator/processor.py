"""Type of this machine's processor, and the environment variables that concern its kernels."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

#: Environment variable that selects the CPU kernels: ``measure`` (default), ``rule``, or ``operation=kernel,…``.
KERNELS_VARIABLE = "INTERNLM_CPU_KERNELS"
#: Environment variable that names the folder of cached kernel choices.
CACHE_VARIABLE = "INTERNLM_CACHE"

_CPUINFO = Path("/proc/cpuinfo")
#: Instruction sets between which the speed of matrix products differs, by their names in ``/proc/cpuinfo``.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
#: Fields that name a processor on x86, then on ARM.
_FIELDS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def processor_type(cpuinfo: Path = _CPUINFO) -> str:
    """Return vendor, family, model and instruction sets, such as ``"GenuineIntel 6 207 avx2 avx512f amx_bf16"``.

    Processors of one type run the same kernels at the same relative speed. Where there is no ``/proc/cpuinfo``, only
    the architecture is known.
    """
    if not cpuinfo.exists():
        return platform.machine() or "unknown"
    lines = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    available = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    names = [fields[name] for name in _FIELDS if name in fields] or [platform.machine()]
    # A user may limit torch to older instructions (ATEN_CPU_CAPABILITY), which changes the speed of its kernels.
    return " ".join([*names, *(name for name in _INSTRUCTION_SETS if name in available), _capability()])


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the name that the processor gives itself, such as ``"AMD EPYC 9555 64-Core Processor"``, for reports."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def has_bf16(processor: str) -> bool:
    """Return whether ``processor`` multiplies bfloat16 matrices in hardware."""
    return not _BF16_INSTRUCTIONS.isdisjoint(processor.split())


def requested_kernels() -> str:
    """Return the value of :data:`KERNELS_VARIABLE`; an empty string if it is not set."""
    return os.environ.get(KERNELS_VARIABLE, "").strip()


def cache_folder() -> Path:
    """Return the folder of cached kernel choices: :data:`CACHE_VARIABLE`, else ``internlm`` in the XDG cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "internlm"


def _capability() -> str:
    return f"torch:{torch.backends.cpu.get_cpu_capability()}"
