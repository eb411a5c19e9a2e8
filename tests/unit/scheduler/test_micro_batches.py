"""Micro-batches of a step: what they yield, and which batches of a script are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.core.scheduler.micro_batches import MicroBatches
from internlm.utils.errors import UserError
from tests.unit.scheduler.test_compute import CPU, LENGTH, batch


def test_micro_batches() -> None:
    inputs, labels = batch()
    ours = MicroBatches(inputs, labels, CPU, types=2)
    assert len(ours) == 3
    assert ours.inputs(1).keys() == ours.host_inputs(1).keys() == {"input_ids", "cu_seqlens"}
    for number in range(3):
        assert torch.equal(ours.inputs(number)["input_ids"], inputs["input_ids"][number])
        assert ours.inputs(number)["cu_seqlens"].tolist() == inputs["cu_seqlens"][number].tolist()
        assert torch.equal(ours.labels(number), labels[number])
        assert ours.type_ids(number).tolist() == [number % 2] * LENGTH
    assert ours.valid_tokens().sum() == 3 * LENGTH - 3


def test_with_one_type_all_tokens_are_of_it() -> None:
    """As for a trainer that was built without the number of types, on data of two."""
    inputs, labels = batch()
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        assert not MicroBatches(given, labels, CPU).type_ids(1).any()


def test_a_batch_without_inputs_or_labels_is_refused() -> None:
    inputs, labels = batch()
    for given in (({"ids": labels}, labels), (inputs, None)):
        with pytest.raises(
            UserError, match=r"^batch: expected \(\{input_ids, …\}, labels as a tensor\), got \(\{.*\}, "
        ):
            MicroBatches(*given, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids * 2, r"contain type 2, .* for 2 dataset types\. Pass types=3"),
        (lambda ids: ids - 1, r"contain type -1, .* for 2 dataset types\. Make batches like"),
        (lambda ids: ids[:, :-1], r"expected \[3, 8\], as the labels have, got \[3, 7\]"),
        (lambda ids: ids.tolist(), r"expected a tensor of torch\.int64 or torch\.int32, got list"),
    ],
)
def test_types_that_the_trainer_does_not_have_are_refused(change: Callable[[Tensor], object], message: str) -> None:
    inputs, labels = batch()
    inputs["type_ids"] = change(inputs["type_ids"])
    with pytest.raises(UserError, match=rf"^type_ids of the batch: {message}"):
        MicroBatches(inputs, labels, CPU, types=2)


IDS = torch.arange(8).view(1, 2, 4)  # [M, B, S]
ROWS, BOUNDARIES = IDS.view(2, 4), torch.tensor([[0, 1, 4], [0, 2, 4]], dtype=torch.int32)

#: Batch of a script, the field that is wrong, and the message.
WRONG: dict[str, tuple[dict[str, Any], Tensor, str]] = {
    "[B, S]": (
        {"input_ids": IDS[0]},
        IDS[0],
        r"input_ids .*: expected \[micro_num, micro_bsz, seq_len\], or .* got \[2, 4\]",
    ),
    "[S]": ({"input_ids": IDS[0, 0]}, IDS[0, 0], r"input_ids of the batch: expected .* got \[4\]\. Make batches like "),
    "no tokens": ({"input_ids": IDS[:, :, :0]}, IDS[:, :, :0], r"input_ids of the batch: .* got \[1, 2, 0\]"),
    "floats": (
        {"input_ids": IDS.float()},
        IDS,
        r"input_ids of the batch: expected a tensor of torch\.int64 or torch\.int32, got torch\.float32",
    ),
    "an array": (
        {"input_ids": IDS.numpy()},
        IDS,
        r"input_ids of the batch: expected a tensor of torch\.int64 or torch\.int32, got ndarray",
    ),
    "labels of other rows": (
        {"input_ids": IDS},
        IDS[0],
        r"labels of the batch: expected \[1, 2, 4\], .*, got \[2, 4\]",
    ),
    "an id too large": (
        {"input_ids": IDS + 3},
        IDS,
        r"input_ids of the batch: have values from 3 to 10, but model\.vocab_",
    ),
    "a negative id": (
        {"input_ids": IDS - 1},
        IDS,
        r"input_ids of the batch: have values from -1 to 6, but .* is 10\. Use",
    ),
    "a label too large": (
        {"input_ids": IDS},
        IDS + 3,
        r"labels of the batch: have values from 3 to 10, but model\.vocab_",
    ),
    "a row without boundaries": (
        {"input_ids": ROWS, "cu_seqlens": BOUNDARIES[:1]},
        ROWS,
        r"cu_seqlens .*: expected a tensor for each of the 2 micro-batches, got 1 of type Tensor",
    ),
    "boundaries as lists": (
        {"input_ids": ROWS, "cu_seqlens": BOUNDARIES.tolist()},
        ROWS,
        r"cu_seqlens of the batch: expected a tensor for each of the 2 micro-batches, got 2 of type list",
    ),
    "boundaries of half a row": (
        {"input_ids": ROWS, "cu_seqlens": BOUNDARIES[:, :2]},
        ROWS,
        r"cu_seqlens of the batch: expected 0, …, 4 in ascending order, got 0, 1\.",
    ),
    "boundaries out of order": (
        {"input_ids": ROWS, "cu_seqlens": [torch.tensor([0, 3, 2, 4])] * 2},
        ROWS,
        r"cu_seqlens of the batch: expected 0, …, 4 in ascending order, got 0, 3, 2, 4\.",
    ),
    "a boundary beyond the row": (
        {"input_ids": ROWS, "cu_seqlens": [torch.tensor([0, 9, 4])] * 2},
        ROWS,
        r"cu_seqlens of the batch: expected 0, …, 4 in ascending order, got 0, 9, 4\.",
    ),
    "no boundaries": (
        {"input_ids": ROWS, "cu_seqlens": [torch.tensor([], dtype=torch.int32)] * 2},
        ROWS,
        r"cu_seqlens of the batch: expected 0, …, 4 in ascending order, got none\.",
    ),
    "boundaries as fractions": (
        {"input_ids": ROWS, "cu_seqlens": [torch.tensor([0.0, 4.0])] * 2},
        ROWS,
        r"cu_seqlens of the batch: expected a tensor of torch\.int64 or torch\.int32, got torch\.float32",
    ),
    "-1 beside -100": (
        {"input_ids": IDS},
        torch.where(IDS > 5, -100, torch.where(IDS > 3, -1, IDS)),
        r"labels of the batch: have negative values other than -100",
    ),
    "labels as truth values": ({"input_ids": IDS}, IDS > 3, r"labels of the batch: expected a tensor of torch\.int64"),
    "short integers": (
        {"input_ids": IDS.short()},
        IDS,
        r"input_ids .*: expected a tensor of torch\.int64 or .* got .*16",
    ),
    "positions of another length": (
        {"input_ids": IDS, "indexes": IDS[..., :-1]},
        IDS,
        r"indexes of the batch: expected \[.*\], as the input_ids have, got \[",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_batch_that_a_decoder_cannot_take_is_refused(mistake: str) -> None:
    inputs, labels, message = WRONG[mistake]
    with pytest.raises(UserError, match=f"^{message}"):
        MicroBatches(inputs, labels, CPU, vocab_size=10)


@pytest.mark.parametrize(
    "inputs", [{"input_ids": IDS}, {"input_ids": IDS, "indexes": None}, {"input_ids": ROWS, "cu_seqlens": BOUNDARIES}]
)
def test_a_batch_of_a_script_may_be_padded_or_packed(inputs: dict[str, Any]) -> None:
    labels = torch.where(inputs["input_ids"] > 5, -100, inputs["input_ids"])
    assert MicroBatches(inputs, labels, CPU, vocab_size=8).valid_tokens().sum() == 6
