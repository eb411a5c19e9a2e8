"""Cost formulas of a parallel layout: memory, communication traffic and floating-point operations.

``symbols`` defines the symbols of all formulas, and ``param_shards`` the parameter inventory that they take as input.
``memory_plan`` and ``traffic`` are the entry points.
"""

from internlm.costs.memory_plan import Plan as Plan
from internlm.costs.memory_plan import format_bytes as format_bytes
from internlm.costs.memory_plan import format_plans as format_plans
from internlm.costs.memory_plan import format_worst_plan as format_worst_plan
from internlm.costs.memory_plan import memory_plan as memory_plan
from internlm.costs.param_shards import ParamInventory as ParamInventory
from internlm.costs.param_shards import ParamShard as ParamShard
from internlm.costs.symbols import NoCostFormulaError as NoCostFormulaError
from internlm.costs.symbols import Symbols as Symbols
from internlm.costs.traffic import expected_traffic as expected_traffic
from internlm.costs.traffic import micro_batch as micro_batch
from internlm.costs.traffic import optimizer as optimizer
from internlm.costs.traffic_model import A2A as A2A
from internlm.costs.traffic_model import AG as AG
from internlm.costs.traffic_model import AR as AR
from internlm.costs.traffic_model import RS as RS
from internlm.costs.traffic_model import TABLE as TABLE
from internlm.costs.traffic_model import Call as Call
from internlm.costs.traffic_model import PassCalls as PassCalls
from internlm.costs.traffic_model import attention as attention
from internlm.costs.traffic_model import block as block
from internlm.costs.traffic_model import count_calls as count_calls
from internlm.costs.traffic_model import embedding as embedding
from internlm.costs.traffic_model import head as head
