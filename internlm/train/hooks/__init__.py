"""What is done beside training, each as a hook."""

from internlm.train.hooks.checkpoint import SaveCheckpoints as SaveCheckpoints
from internlm.train.hooks.evaluate import Validate as Validate
from internlm.train.hooks.ledger import ReportTraffic as ReportTraffic
from internlm.train.hooks.log import LogMetrics as LogMetrics
from internlm.train.hooks.memory import TellMemoryPlan as TellMemoryPlan
from internlm.train.hooks.pipeline import RecordPipeline as RecordPipeline
from internlm.train.hooks.profile import ProfileRun as ProfileRun
from internlm.train.hooks.stop import StopOnSignal as StopOnSignal
from internlm.train.hooks.upkeep import Upkeep as Upkeep
