"""Freed host memory stays with the process, unless the user has set glibc's variables."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from internlm.accelerator.host_memory import keep_freed_memory

MIB = 2**20
SCRIPT = f"""
import ctypes
import torch
from internlm.accelerator.host_memory import keep_freed_memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Information = type("Information", (ctypes.Structure,), {{"_fields_": [(name, ctypes.c_size_t) for name in FIELDS]}})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Information

kept = keep_freed_memory()
for _ in range(2):
    tensors = [torch.ones(16 * {MIB}, dtype=torch.uint8) for _ in range(20)]
    del tensors
print(kept, libc.mallinfo2().fordblks // {MIB})
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("chosen", [{}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}])
def test_freed_memory_is_kept_unless_the_user_has_set_a_threshold(chosen: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=inherited | chosen, capture_output=True, text=True, check=True)
    kept, free = run.stdout.split()
    assert kept == str(not chosen)
    assert (int(free) >= 20 * 16) is not bool(chosen)  # MiB that are free and were not returned


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_variables_of_glibc_have_precedence(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, str(2**17))
    assert not keep_freed_memory()
