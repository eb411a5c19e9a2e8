"""Base class of config sections, bounded number types, and functions that parse or round settings."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from internlm.utils.compat import DictAccess, frozen
from internlm.utils.secrets import mask_credentials, mask_url


@dataclass(frozen=True)
class Masked:
    """Marker of text fields that may hold a secret; ``mask`` is applied wherever a value is shown or saved."""

    mask: Callable[[str], str]


def mask_of(field: FieldInfo) -> Callable[[str], str] | None:
    """Return the function that masks the secrets in values of ``field``; None if the field holds no secrets."""
    # The markers of ``WebAddress | None`` are those of the first alternative.
    alternatives = [marker for part in get_args(field.annotation) for marker in getattr(part, "__metadata__", ())]
    return next((marker.mask for marker in [*field.metadata, *alternatives] if isinstance(marker, Masked)), None)


class Section(DictAccess, BaseModel):  # type: ignore[misc]  # __iter__ yields keys, as that of a dict
    """Base class of config sections, which are frozen, reject unknown keys and validate types strictly.

    For example, the string ``"2"`` is not converted to a number. The string beneath a field is its documentation.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),  # pydantic reserves names that begin with model_, such as our model_type
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):  # pydantic's error would not say where to set it instead
            raise frozen(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise frozen(name)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # Also for str(), and for sections within sections.
        for name, value in super().__repr_args__():
            field = type(self).model_fields.get(name or "")
            mask = mask_of(field) if field else None
            yield name, mask(value) if mask and isinstance(value, str) else value


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Item = TypeVar("Item")
#: Several values, given as a tuple or a list. Strict types alone would refuse the list.
Items = Annotated[tuple[Item, ...], BeforeValidator(_list_as_tuple)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
LastStep = Annotated[int, Field(ge=-1)]  # index of a step, counted from 0; -1: no step yet
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MoreThanOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Shrinking = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]  # factor of a decrease
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # coefficient of an exponential average


def floor_share(ratio: float, total: int) -> int:
    """Return ⌊ratio · total⌋ for the number that the float ``ratio`` stands for, such as 0.29 or 1/3."""
    # The float nearest to 0.29 is less than 0.29: 100 · 0.29 is 28.999…, and its floor would be 28. A ratio of two
    # integers, and every decimal number is one, is found again by division, which IEEE 754 rounds correctly.
    nearest = round(ratio * total)
    return nearest if total and nearest / total == ratio else math.floor(ratio * total)


def expand_path(text: str) -> str:
    """Expand a leading ``~`` and environment variables in a path, which may begin with ``local:``.

    Raises:
        ValueError: An environment variable is not set, or the home folder is unknown.
    """
    protocol = "local:" if text.startswith("local:") else ""
    path = os.path.expanduser(os.path.expandvars(text.removeprefix(protocol)))
    # expandvars and expanduser leave what they do not know. A folder of such a name would be a surprise.
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(f"the environment variable {unset[1].strip('{}')} is not set")
    if path.startswith("~"):
        raise ValueError(f"the home folder {path.partition('/')[0]} is unknown")
    return protocol + path


#: Path of a file or a folder, or a URL, which may contain credentials.
PathText = Annotated[str, AfterValidator(expand_path), Masked(mask_credentials)]
#: URL of a webhook. Whoever has the token in its path can send messages.
WebAddress = Annotated[str, Masked(mask_url)]


class ObjectAddress(NamedTuple):
    """Address of a folder in an object store: its bucket, and the common prefix of its keys, without slashes around."""

    bucket: str
    prefix: str


def is_remote(folder: str) -> bool:
    """Return whether ``folder`` is an address, ``PROTOCOL://…`` or ``boto3:s3://…``, rather than a local path."""
    return re.match(r"(boto3:)?\w{2,}://", folder) is not None


def parse_object_address(text: str) -> ObjectAddress | None:
    """Parse ``s3://BUCKET/FOLDER``, which may begin with ``boto3:``; return None for a local folder.

    Raises:
        ValueError: The storage is unknown, or the address is malformed.
    """
    # One letter before the colon is a drive, not a protocol.
    if text.startswith("local:") or not re.match(r"\w{2,}:", text):
        return None
    address, shown = text.removeprefix("boto3:"), repr(mask_credentials(text))
    if not address.startswith("s3://"):
        raise ValueError(f"expected local:FOLDER, a plain path or s3://BUCKET/FOLDER, got {shown}")
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,255}", bucket):
        raise ValueError(f"expected s3://BUCKET/FOLDER with a bucket of letters, digits, '.', '-' and '_', got {shown}")
    parts = prefix.strip("/").split("/")
    # HTTP clients would normalise such paths; the keys would differ from those that other tools show.
    if prefix.strip("/") and not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"expected folder names without '//', '.' and '..', got {shown}")
    return ObjectAddress(bucket, "/".join(parts))


class Rampup(NamedTuple):
    """Batch-size ramp-up: ``start`` micro-batches per step, then ``increment`` more after every ``every`` steps."""

    start: int
    increment: int
    every: int


def parse_rampup(text: str) -> Rampup | None:
    """Parse a batch-size ramp-up, ``"start increment every"``; return None for an empty string.

    Raises:
        ValueError: ``text`` is neither empty nor three integers of at least 1.
    """
    words = text.split()
    if not words:
        return None
    if len(words) != 3 or not all(_is_count(word) and int(word) for word in words):
        raise ValueError(f"expected three integers of at least 1, 'start increment every', got {text!r}")
    return Rampup(*map(int, words))


def parse_skip_batches(text: str) -> tuple[tuple[int, int], ...]:
    """Parse ``"a-b,c"`` into inclusive ranges (first, last) of batch numbers, sorted and merged.

    Raises:
        ValueError: An item is neither a batch number nor an ascending range of batch numbers.
    """
    merged: list[tuple[int, int]] = []
    for first, last in sorted(_parse_range(word.strip()) for word in text.split(",") if word.strip()):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _parse_range(text: str) -> tuple[int, int]:
    first, dash, last = (word.strip() for word in text.partition("-"))
    if not _is_count(first) or (dash and not _is_count(last)):
        raise ValueError(f"expected a batch number or a range 'first-last', got {text!r}")
    if dash and int(last) < int(first):
        raise ValueError(f"the range {text!r} ends before it begins")
    return int(first), int(last or first)


def _is_count(word: str) -> bool:
    # str.isdigit alone accepts digits of other scripts and superscripts, some of which int() refuses.
    return word.isascii() and word.isdigit()
