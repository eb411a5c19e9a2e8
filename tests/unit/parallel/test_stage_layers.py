"""The layers of a pipeline stage."""

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
def test_end_stages_have_embedding_and_head(
    chunks: tuple[range, ...], embedding: bool, head: bool, whole: bool
) -> None:
    stage_layers = StageLayers(8, chunks)
    assert (stage_layers.has_embedding, stage_layers.has_head, stage_layers.is_whole) == (embedding, head, whole)


def test_chunks_with_the_first_and_the_last_layer() -> None:
    stage_layers = StageLayers(8, (range(2), range(4, 6), range(6, 8)))
    assert [stage_layers.is_first(chunk) for chunk in range(3)] == [True, False, False]
    assert [stage_layers.is_last(chunk) for chunk in range(3)] == [False, False, True]


def test_stage_layers_are_those_of_the_enclosing_building_block() -> None:
    stage_layers = StageLayers(8, (range(2),))
    with building(Sharding(), stage_layers):
        assert current_stage_layers(8) is stage_layers
        with building(Sharding()):
            assert current_stage_layers(8) == StageLayers.whole(8)
        assert current_stage_layers(8) is stage_layers
    assert current_stage_layers(8) == StageLayers(8, (range(8),))
