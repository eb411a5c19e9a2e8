"""Schedules: pure functions of the step."""

from internlm.solver.schedulers.beta2 import Beta2Schedule as Beta2Schedule
from internlm.solver.schedulers.lr import LRSchedule as LRSchedule
