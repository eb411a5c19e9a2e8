"""Which part of a model a rank holds."""

from __future__ import annotations

import pytest

from internlm.core.parallel.sharding import Sharding, StageLayers, building, current_stage_layers


@pytest.mark.parametrize(
    ("chunks", "embedding", "head", "whole"),
    [
        ((range(8),), True, True, True),
        ((range(3),), True, False, False),
        ((range(3, 6),), False, False, False),
        ((range(6, 8),), False, True, False),
        ((range(2), range(6, 8)), True, True, False),  # the first rank of a V
        ((range(2, 4), range(4, 6)), False, False, False),  # the last one
        ((range(4, 8), range(4)), True, True, True),
    ],
)
def test_what_comes_with_layers(chunks: tuple[range, ...], embedding: bool, head: bool, whole: bool) -> None:
    part = StageLayers(8, chunks)
    assert (part.has_embedding, part.has_head, part.is_whole) == (embedding, head, whole)


def test_by_chunk() -> None:
    part = StageLayers(8, (range(2), range(4, 6), range(6, 8)))
    assert [part.is_first(chunk) for chunk in range(3)] == [True, False, False]
    assert [part.is_last(chunk) for chunk in range(3)] == [False, False, True]


def test_a_model_asks_for_its_part_while_it_is_built() -> None:
    part = StageLayers(8, (range(2),))
    with building(Sharding(), part):
        assert current_stage_layers(8) is part
        with building(Sharding()):
            assert current_stage_layers(8) == StageLayers.whole(8)
        assert current_stage_layers(8) is part
    assert current_stage_layers(8) == StageLayers(8, (range(8),))
