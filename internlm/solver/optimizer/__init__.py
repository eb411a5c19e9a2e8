"""Optimizers over flat, sharded buffers."""

from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer as HybridZeroOptimizer
from internlm.solver.optimizer.hybrid_zero import OptimizerStep as OptimizerStep
from internlm.solver.optimizer.loss_scale import LossScale as LossScale
from internlm.solver.optimizer.process_groups import ProcessGroups as ProcessGroups
