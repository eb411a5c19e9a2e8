"""Schema of the config: one pydantic model per section, each field documented by the string beneath it."""

from internlm.config.schema.model import ModelConfig as ModelConfig
from internlm.config.schema.optim import AdamConfig as AdamConfig
from internlm.config.schema.optim import Beta2SchedulerConfig as Beta2SchedulerConfig
from internlm.config.schema.optim import GradScalerConfig as GradScalerConfig
from internlm.config.schema.optim import HybridZeroConfig as HybridZeroConfig
from internlm.config.schema.optim import LossConfig as LossConfig
from internlm.config.schema.optim import LRSchedulerConfig as LRSchedulerConfig
from internlm.config.schema.optim import OptimizerConfig as OptimizerConfig
from internlm.config.schema.optim import ParamGroupConfig as ParamGroupConfig
from internlm.config.schema.parallel import ParallelConfig as ParallelConfig
from internlm.config.schema.root import AlertConfig as AlertConfig
from internlm.config.schema.root import CkptConfig as CkptConfig
from internlm.config.schema.root import Config as Config
from internlm.config.schema.root import DataConfig as DataConfig
from internlm.config.schema.root import MonitorConfig as MonitorConfig
