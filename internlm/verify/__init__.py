"""Equivalence oracle: compare a run on several ranks with the same model on one process.

``configs`` makes the two configs, ``run`` trains on each rank, ``processes`` starts the ranks, ``compare``
(pure) turns their records into a :class:`~internlm.verify.compare.Report`, and ``report`` prints it.
"""
