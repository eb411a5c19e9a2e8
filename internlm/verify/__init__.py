"""The equivalence oracle: a config on several ranks against the same model on one process.

``plan`` makes the two configs, ``run`` is what each rank does, ``processes`` starts the ranks, ``compare`` (pure) makes
a :class:`~internlm.verify.compare.Report` of what they recorded, and ``report`` shows it.
"""
