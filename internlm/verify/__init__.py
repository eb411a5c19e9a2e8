"""The equivalence oracle: a config on several ranks against the same model on one process.

``configs`` makes the two configs, ``run`` is what each rank executes, ``processes`` starts the ranks, ``compare``
(pure) turns their records into a :class:`~internlm.verify.compare.Report`, and ``report`` prints it.
"""
