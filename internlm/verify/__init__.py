"""Equivalence oracle: compare a run on several ranks with the same model on one process.

``configs`` resolves the two configs, ``processes`` starts the ranks, ``run`` trains on each of them, ``compare`` turns
their records into a :class:`~internlm.verify.compare.Report`, and ``report`` formats it.
"""
