"""Consistency rules across config keys: one function per rule, in tables that list the keys each function reads."""

from internlm.config.rules.data_rules import RULES as DATA_RULES
from internlm.config.rules.model_rules import RULES as MODEL_RULES
from internlm.config.rules.parallel_rules import RULES as PARALLEL_RULES
from internlm.config.rules.rule import Rule as Rule
from internlm.config.rules.rule import RunInfo as RunInfo
from internlm.config.rules.run_rules import RULES as RUN_RULES

ALL_RULES = (*MODEL_RULES, *RUN_RULES, *DATA_RULES, *PARALLEL_RULES)
