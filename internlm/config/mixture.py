"""Spellings of the weights of dataset types: a dict, a list with numbers of epochs, or a list of changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internlm.config import nested_dict
from internlm.config.nested_dict import NestedDict

WEIGHTS, EPOCHS, CHANGES = "data.weights", "data.max_epochs", "data.weight_changes"


def split_weights(raw: NestedDict) -> None:
    """Replace a list at ``data.weights`` by the dicts and the list of changes that it stands for.

    ``[(type, weight, largest number of epochs or None), ...]`` is split into ``data.weights`` and ``data.max_epochs``,
    ``[(0, weights), (step, weights), ...]`` into ``data.weights`` and ``data.weight_changes``. Other lists are left,
    for the schema to report: also those that name a type twice, or give changes beside ``data.weight_changes``.
    """
    # Values of any type: the schema is checked afterwards, and names what is wrong in the words of its keys.
    given, changes = nested_dict.get(raw, WEIGHTS), nested_dict.get(raw, CHANGES)
    if not isinstance(given, (list, tuple)) or not given:
        return
    rows = [tuple(row) if isinstance(row, (list, tuple)) else () for row in given]
    if all(len(row) in (2, 3) and isinstance(row[0], str) for row in rows):
        if len({row[0] for row in rows}) < len(rows):
            return
        nested_dict.put(raw, WEIGHTS, {row[0]: row[1] for row in rows})
        _add(raw, EPOCHS, {row[0]: row[2] for row in rows if len(row) == 3 and row[2] is not None})
    elif all(len(row) == 2 and isinstance(row[1], Mapping) for row in rows) and rows[0][0] == 0 and not changes:
        nested_dict.put(raw, WEIGHTS, rows[0][1])
        nested_dict.put(raw, CHANGES, tuple({"step": step, "weights": weights} for step, weights in rows[1:]))


def _add(raw: NestedDict, key: str, values: Mapping[str, Any]) -> None:
    if values:
        nested_dict.put(raw, key, {**(nested_dict.get(raw, key) or {}), **values})
