"""doc/config.md agrees with the schema and the real messages."""

from __future__ import annotations

from internlm.config import keys
from tests.unit.config.samples import ROOT, problems_of
from tools.config_reference import PAGE, reference, refreshed


def test_the_generated_part_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert refreshed(page) == page, "run: python tools/config_reference.py --write"


def test_every_key_is_in_the_reference() -> None:
    text = reference()
    assert [key for key in keys.fields() if f"`{key}`" not in text and not keys.is_section(key)] == []


def test_the_messages_shown_are_the_real_ones() -> None:
    page = (ROOT / "doc/config.md").read_text(encoding="utf-8")
    shown = page.partition("```text\n")[2].partition("\n```")[0].splitlines()
    model = {"hidden_size": 4095, "num_attention_heads": 32, "num_layer": 4, "vocab_size": 100}
    real = problems_of({"model": model, "data.micro_num": 0, "parallel.tensor": 4}, world_size=6)
    assert set(shown) <= set(real)
