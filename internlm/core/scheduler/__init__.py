"""Schedules: in which order the micro-batches of a step go forward and backward."""

from internlm.core.scheduler.loss import TokenCrossEntropy as TokenCrossEntropy
from internlm.core.scheduler.no_pipeline import NonPipelineScheduler as NonPipelineScheduler
from internlm.core.scheduler.result import StepResult as StepResult
