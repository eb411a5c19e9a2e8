"""Pipeline schedules: action tables, their validation, and the executor that runs them.

The names below are imported on first use, so that the command line can list and draw schedules without importing
torch.
"""

from typing import TYPE_CHECKING

from internlm.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from internlm.core.scheduler.loss import StepResult as StepResult
    from internlm.core.scheduler.loss import TokenCrossEntropy as TokenCrossEntropy
    from internlm.core.scheduler.schedulers import InterleavedPipelineScheduler as InterleavedPipelineScheduler
    from internlm.core.scheduler.schedulers import NonPipelineScheduler as NonPipelineScheduler
    from internlm.core.scheduler.schedulers import PipelineScheduler as PipelineScheduler
    from internlm.core.scheduler.schedulers import Scheduler as Scheduler
    from internlm.core.scheduler.schedulers import TrainingStep as TrainingStep
    from internlm.core.scheduler.schedulers import ZeroBubblePipelineScheduler as ZeroBubblePipelineScheduler
    from internlm.core.scheduler.schedulers import (
        ZeroBubblePipelineVShapeScheduler as ZeroBubblePipelineVShapeScheduler,
    )
else:
    _SCHEDULERS = "internlm.core.scheduler.schedulers"
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "StepResult": "internlm.core.scheduler.loss",
            "TokenCrossEntropy": "internlm.core.scheduler.loss",
            "InterleavedPipelineScheduler": _SCHEDULERS,
            "NonPipelineScheduler": _SCHEDULERS,
            "PipelineScheduler": _SCHEDULERS,
            "Scheduler": _SCHEDULERS,
            "TrainingStep": _SCHEDULERS,
            "ZeroBubblePipelineScheduler": _SCHEDULERS,
            "ZeroBubblePipelineVShapeScheduler": _SCHEDULERS,
        },
    )
