"""Evaluation and sampling."""

from internlm.eval.evaluate import evaluate as evaluate
from internlm.eval.generate import generate as generate
