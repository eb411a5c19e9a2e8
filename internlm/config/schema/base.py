"""What every section of the config shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section: frozen once resolved, no unknown keys, no guessing at types (text is never taken for a number).

    Each field is documented by the string beneath it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )


Count = Annotated[int, Field(ge=1)]  # at least one of something
CountOrZero = Annotated[int, Field(ge=0)]
LastStep = Annotated[int, Field(ge=-1)]  # counted from 0; -1: none yet
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MoreThanOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Shrinking = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]  # a factor
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # an exponential average's coefficient
