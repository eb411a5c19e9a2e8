"""Profiling of a run: memory reports and torch traces."""

from internlm.profiler.reports import StepTrace as StepTrace
from internlm.profiler.reports import memory_report as memory_report
