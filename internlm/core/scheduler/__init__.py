"""Schedules: in which order the micro-batches of a step go forward and backward, over the stages of a pipeline."""

from internlm.core.scheduler.loss import StepResult as StepResult
from internlm.core.scheduler.loss import TokenCrossEntropy as TokenCrossEntropy
from internlm.core.scheduler.schedulers import InterleavedPipelineScheduler as InterleavedPipelineScheduler
from internlm.core.scheduler.schedulers import NonPipelineScheduler as NonPipelineScheduler
from internlm.core.scheduler.schedulers import PipelineScheduler as PipelineScheduler
from internlm.core.scheduler.schedulers import Scheduler as Scheduler
from internlm.core.scheduler.schedulers import ZeroBubblePipelineScheduler as ZeroBubblePipelineScheduler
from internlm.core.scheduler.schedulers import ZeroBubblePipelineVShapeScheduler as ZeroBubblePipelineVShapeScheduler
