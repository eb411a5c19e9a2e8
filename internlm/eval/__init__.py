"""Evaluation of a model on held-out data, and generation of text."""

from internlm.eval.evaluate import evaluate as evaluate
from internlm.eval.generate import generate as generate
