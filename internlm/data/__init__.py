"""Data: sources of samples, packing of samples into rows, and the batches of each step."""

from internlm.utils.lazy import lazy_exports

# Both functions read the global context, so they are in the assembly layer; an eager import would violate the layering.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "build_train_loader_with_data_type": "internlm.train.build_data",
        "build_valid_loader_with_data_type": "internlm.train.build_data",
    },
)
