"""Hooks of the training loop: logging, checkpoints, validation, profiling, and requests to save or to stop."""

from internlm.train.hooks.log import LogMemoryPlan as LogMemoryPlan
from internlm.train.hooks.log import LogMetrics as LogMetrics
from internlm.train.hooks.log import ReportTraffic as ReportTraffic
from internlm.train.hooks.periodic import SaveCheckpoints as SaveCheckpoints
from internlm.train.hooks.periodic import Upkeep as Upkeep
from internlm.train.hooks.periodic import Validate as Validate
from internlm.train.hooks.profile import ProfileRun as ProfileRun
from internlm.train.hooks.profile import RecordPipeline as RecordPipeline
from internlm.train.hooks.skipped_steps import WarnOfSkippedSteps as WarnOfSkippedSteps
from internlm.train.hooks.stop import FollowRequests as FollowRequests
