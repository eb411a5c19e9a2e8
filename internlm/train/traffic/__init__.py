"""What a step sends, by formula: the entries that the ledger must hold after it, from the config alone.

A formula such as ``all-gather over t of T·H·e``, in :mod:`~internlm.train.traffic.symbols`, names the collective, the
group and the bytes of the *whole* tensor, N; of these each of n ranks sends (n − 1)·N/n, and by an all-reduce twice
that, rounded down call by call, as told at the top of :mod:`internlm.core.parallel.ledger`. A group of one rank sends
nothing and counts no call. What goes from stage to stage of a pipeline is sent as it is: N.
"""

from internlm.train.traffic.calls import A2A as A2A
from internlm.train.traffic.calls import AG as AG
from internlm.train.traffic.calls import AR as AR
from internlm.train.traffic.calls import RS as RS
from internlm.train.traffic.calls import Call as Call
from internlm.train.traffic.calls import Passes as Passes
from internlm.train.traffic.calls import count_calls as count_calls
from internlm.train.traffic.model import TABLE as TABLE
from internlm.train.traffic.model import attention as attention
from internlm.train.traffic.model import block as block
from internlm.train.traffic.model import embedding as embedding
from internlm.train.traffic.model import head as head
from internlm.train.traffic.step import expected_traffic as expected_traffic
from internlm.train.traffic.step import micro_batch as micro_batch
from internlm.train.traffic.symbols import Symbols as Symbols
from internlm.train.traffic.update import optimizer as optimizer
