"""Evaluation on held-out data, and text generation."""

from internlm.eval.evaluate import evaluate as evaluate
from internlm.eval.generate import generate as generate
