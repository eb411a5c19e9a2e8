"""Assembly of model, optimizer and data loaders from the config."""

from internlm.utils.lazy import lazy_exports

_MODEL, _RECIPE, _DATA = "internlm.train.build_model", "internlm.train.parallelize", "internlm.train.build_data"
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "create_model": _MODEL,
        "initialize_model": _RECIPE,
        "initialize_parallel_communicator": _RECIPE,
        "initialize_model_and_parallel_communicator": _RECIPE,
        "initialize_optimizer": "internlm.train.build_optimizer",
        "initialize_checkpoint_manager": "internlm.train.build_checkpoints",
        "build_inventory": "internlm.train.inventory",
        "get_train_data_loader": _DATA,
        "get_validation_data_loader": _DATA,
        "build_train_loader_with_data_type": _DATA,
        "build_valid_loader_with_data_type": _DATA,
    },
)
