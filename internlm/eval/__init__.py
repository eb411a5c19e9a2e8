"""Evaluation of a model on held-out data, and generation of text."""

from internlm.eval.evaluate import evaluate as evaluate
from internlm.eval.evaluate import measure as measure
from internlm.eval.evaluate import token_bytes_of as token_bytes_of
from internlm.eval.generate import generate as generate
from internlm.eval.generate import stream as stream
from internlm.utils.lazy import lazy_exports

# They build models, which is the assembly layer's part.
__getattr__, __dir__ = lazy_exports(
    __name__, {"load_model": "internlm.train.saved_model", "load_tokenizer": "internlm.data.tokenizer"}
)
