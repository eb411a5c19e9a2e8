"""Optimizers over flat, sharded buffers."""

from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer as HybridZeroOptimizer
from internlm.solver.optimizer.hybrid_zero import OptimizerStep as OptimizerStep
