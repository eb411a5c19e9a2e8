"""Rules across keys: one small function each, in tables that say which keys it reads."""

from internlm.config.rules.base import Rule as Rule
from internlm.config.rules.model import RULES as MODEL_RULES
from internlm.config.rules.parallel import RULES as PARALLEL_RULES
from internlm.config.rules.run import RULES as RUN_RULES

ALL_RULES = (*MODEL_RULES, *PARALLEL_RULES, *RUN_RULES)
