"""Equivalence check: compare training on several ranks with training of the same model on one process.

``configs`` resolves the two configs, ``session`` starts the ranks (``processes``), ``run`` trains on each of them,
``compare`` turns their records into a :class:`~internlm.verify.compare.Report`, and ``report`` formats it. If they
differ, ``locate`` shrinks the layout and finds the culprit.
"""
