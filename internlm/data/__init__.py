"""Data: sources of samples, packing into rows, batches by step."""

from internlm.utils.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "build_train_loader_with_data_type": "internlm.train.build_data",
        "build_valid_loader_with_data_type": "internlm.train.build_data",
    },
)
