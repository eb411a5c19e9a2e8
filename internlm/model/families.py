"""Builders of the model families: decoders from the config's ``model`` section."""

from __future__ import annotations

from dataclasses import dataclass

from internlm.config.families import FAMILIES as FAMILIES
from internlm.config.families import Family
from internlm.config.schema import ModelConfig
from internlm.core.parallel.lora import freeze_all_but_adapters
from internlm.model.decoder import Decoder
from internlm.model.spec import spec_of as spec_of


@dataclass(frozen=True)
class FamilyBuilder:
    """Builder that creates decoders of one family from the config's ``model`` section."""

    family: Family

    def __call__(self, model: ModelConfig) -> Decoder:
        """Build a decoder from the config section ``model``."""
        decoder = Decoder(spec_of(self.family, model))
        if model.lora is not None:
            freeze_all_but_adapters(decoder)
        return decoder
