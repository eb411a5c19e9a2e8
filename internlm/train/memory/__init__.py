"""What the ranks of a run hold, by formula."""

from internlm.train.memory.plan import Plan as Plan
from internlm.train.memory.plan import memory_plan as memory_plan
from internlm.train.memory.plan import plans_of_stages as plans_of_stages
from internlm.train.memory.shown import table as table
from internlm.train.memory.shown import told as told
