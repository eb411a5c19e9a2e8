"""ZeRO optimizer over flat, sharded buffers, with its update rules and loss scale."""

from internlm.solver.optimizer.loss_scale import SKIPPED as SKIPPED
from internlm.solver.optimizer.loss_scale import LossScale as LossScale
from internlm.solver.optimizer.loss_scale import OptimizerStep as OptimizerStep
from internlm.solver.optimizer.param_groups import ProcessGroups as ProcessGroups
from internlm.solver.optimizer.zero_optimizer import HybridZeroOptimizer as HybridZeroOptimizer
