"""Rules across keys: one small function each, in tables that say which keys it reads."""

from internlm.config.rules.model_rules import RULES as MODEL_RULES
from internlm.config.rules.parallel_rules import RULES as PARALLEL_RULES
from internlm.config.rules.rule import Rule as Rule
from internlm.config.rules.run_rules import RULES as RUN_RULES

ALL_RULES = (*MODEL_RULES, *PARALLEL_RULES, *RUN_RULES)
