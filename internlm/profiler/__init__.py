"""Profiling a run."""

from internlm.profiler.memory import memory_report as memory_report
from internlm.profiler.trace import StepTrace as StepTrace
