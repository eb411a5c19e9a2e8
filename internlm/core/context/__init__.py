"""Parallel modes, rank layout, process groups and seeds of this process."""

from internlm.config.schema import Config as Config
from internlm.core.context.layout import Layout as Layout
from internlm.core.context.layout import ParallelMode as ParallelMode
from internlm.core.context.layout import ParallelSizes as ParallelSizes
from internlm.core.context.parallel_context import ParallelContext as ParallelContext
from internlm.core.context.parallel_context import global_context as global_context
