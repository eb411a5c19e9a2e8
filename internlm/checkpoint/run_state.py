"""State file of a checkpoint, ``state.json``: everything that a run restores and that is no tensor.

The file is not trusted: its size and nesting are bounded, and every value has a type and a range, so that a damaged or
edited file is refused before anything of the run has changed. All formats have the same keys. Unknown keys are kept and
ignored: a version that adds a key which must not be ignored changes the format.
"""

from __future__ import annotations

import json
import math
import platform
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import internlm
from internlm.data.batch_plan import Position
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem

#: Size limit in bytes. A state file has some ten thousand bytes, whatever the size of the model.
LARGEST_STATE = 1 << 22
#: Limit of the nesting of lists and dicts. A config is nested five deep.
DEEPEST = 32
#: Limit of the digits of a number: one with more can overflow where a schedule divides by it, as floats end at 10^308.
MOST_DIGITS = 300
#: Limit of step numbers, which a run of a thousand steps a second reaches in thirty years.
LAST_STEP = 10**12
TODO = "Choose another checkpoint"

StepCount = Annotated[int, Field(ge=0, le=LAST_STEP)]
Count = Annotated[int, Field(ge=0, le=10**18)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())


class TrainCounters(_Part):
    """Progress counters, those of :class:`~internlm.core.train_state.TrainState`."""

    step: StepCount
    num_consumed_tokens: Count
    inf_nan_skip_batches: StepCount


class LossScaleState(_Part):
    """State of the loss scale of float16; constant in runs of other dtypes."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: StepCount
    overflows: StepCount


class OptimizerCounters(_Part):
    """State of the optimizer that is no tensor."""

    updates: StepCount
    skipped_in_a_row: StepCount
    loss_scale: LossScaleState


class RunState(_Part):
    """Content of ``state.json``."""

    format: Annotated[int, Field(ge=1)]
    config: dict[str, Any]
    """Resolved config of the run that saved. Its values are compared, never used."""
    train_state: TrainCounters
    optimizer: OptimizerCounters
    sampler: Annotated[list[Count], Field(min_length=3, max_length=3)]
    """Data position: step, batch and row."""
    sampler_state: dict[str, list[int]] = {}
    """What the rows need to be read on from the data position at once, by name."""
    data: str
    """Fingerprint of the training data."""
    data_files: str = ""
    """Names and digests of the files of the training data, of :func:`internlm.data.fingerprint.file_list`."""
    seed: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)] | None = None
    cpu_kernels: dict[str, dict[str, str]] = {}
    """Kernels by case, by type of processor."""
    save_folder: str = ""
    """Absolute path of the save folder."""
    run_folder: str | None = None
    """Absolute path of the run's records."""
    launcher: str = ""
    """Process that started rank 0 and may start it again: host's boot, namespace, pid and start; empty without one."""
    versions: dict[str, str] = {}
    """Versions of the package, torch and Python."""

    @property
    def position(self) -> Position:
        """Data position before the next step."""
        step, batch, row = self.sampler
        return Position(step, batch, row, self.sampler_state)

    def to_bytes(self) -> bytes:
        """Format the state as indented JSON with sorted keys.

        Raises:
            CheckpointError: A value, such as a number of thousands of digits, could not be read again.
        """
        return _encode(self.model_dump(mode="json"))


def check_saveable(run_info: Mapping[str, Any]) -> None:
    """Check, before a run trains, that the entries of a state file which are known at its start can be read again.

    Raises:
        CheckpointError: They cannot.
    """
    _encode(run_info)


def _encode(content: Mapping[str, Any]) -> bytes:
    try:
        text = f"{json.dumps(content, indent=1, sort_keys=True, allow_nan=False)}\n".encode()
        _load(text)
    except (ValueError, RecursionError) as error:
        todo = "Use other values in the config, or another --seed"
        raise CheckpointError(Problem("state.json", f"could not be read again ({_first_line(error)})", todo)) from None
    return text


def current_versions() -> dict[str, str]:
    """Return the versions to save: of this package, torch and Python."""
    return {"internlm": internlm.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def parse_run_state(text: bytes, where: str, version: int, step: int | None = None) -> RunState:
    """Parse and check a state file.

    Args:
        text: Content of the file; of a larger file, at least ``LARGEST_STATE + 1`` bytes.
        where: Path of the file, for errors.
        version: Version of the checkpoint's format.
        step: Step that the name of the checkpoint's folder says, if it does.

    Raises:
        DamagedCheckpointError: The file is damaged. Every wrong value is listed.
        CheckpointError: A newer version of the framework wrote it.
    """
    try:
        content = _load(text)
    except (ValueError, RecursionError) as error:
        problem = Problem(where, f"cannot be read ({_first_line(error)})", TODO)
        raise DamagedCheckpointError(problem) from None
    if type(found := content.get("format")) is int and found > version:
        message = f"expected a format version of at most {version}, got {found}"
        raise CheckpointError(Problem(where, message, "Update InternEvo"))
    try:
        state = RunState.model_validate(content)
    except ValidationError as error:
        wrong = {_key(detail["loc"]): _message(detail) for detail in error.errors(include_url=False)}
    else:
        wrong = dict(_contradictions(state, version, step))
    if wrong:
        raise DamagedCheckpointError(*(Problem(f"{where}: {key}", message, TODO) for key, message in wrong.items()))
    return state


# -- JSON -------------------------------------------------------------------------------------------------------------


def _load(text: bytes) -> dict[str, Any]:
    """Parse bounded JSON in UTF-8 without duplicate keys and without numbers that are not finite."""
    if len(text) > LARGEST_STATE:
        raise ValueError(f"larger than {LARGEST_STATE} bytes")
    content = json.loads(
        text.decode(),
        object_pairs_hook=_without_duplicates,
        parse_int=lambda digits: int(_bounded(digits)),
        parse_float=_finite,
        parse_constant=_finite,
    )
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {reprlib.repr(content)}")
    _check_values(content)
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice")
    return result


def _bounded(digits: str) -> str:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return digits


def _finite(digits: str) -> float:
    value = float(_bounded(digits))
    if not math.isfinite(value):
        raise ValueError(f"the number {digits} is not finite")
    return value


def _check_values(content: Any) -> None:
    """Check the nesting, and that every text has an encoding."""
    # Level by level rather than recursively: code that handles a value is recursive itself.
    level = [content]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                # JSON can escape half of a surrogate pair, which has no encoding, except those that stand for the bytes
                # of a path that is not in UTF-8.
                value.encode(errors="surrogateescape")
        level = inner
    if level:
        raise ValueError(f"nested more than {DEEPEST} deep")


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {DEEPEST} deep"
    if isinstance(error, UnicodeError):
        return "no text in UTF-8"
    return str(error).partition("\n")[0]


# -- values -----------------------------------------------------------------------------------------------------------

#: Expected values by pydantic's type of error.
_EXPECTED = {
    "int_type": "expected an integer",
    "float_type": "expected a number",
    "string_type": "expected a string",
    "list_type": "expected a list",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "too_short": "expected {min_length} numbers",
    "too_long": "expected {max_length} numbers",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
}


def _key(location: tuple[int | str, ...]) -> str:
    texts = [name if isinstance(name, int) or name.isprintable() else repr(name) for name in location]
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in texts).removeprefix(".")


def _message(detail: Any) -> str:
    if detail["type"] == "missing":
        return "is missing"
    expected = _EXPECTED.get(detail["type"], detail["msg"])
    return f"{expected.format(**detail.get('ctx', {}))}, got {reprlib.repr(detail['input'])}"


def _contradictions(state: RunState, version: int, step: int | None) -> Iterator[tuple[str, str]]:
    """Yield the keys, with messages, whose values are valid on their own but contradict others."""
    saved_step = state.train_state.step
    if state.format != version:
        yield "format", f"expected {version}, got {state.format}"
    if step is not None and saved_step != step:
        yield "train_state.step", f"expected {step}, as the folder is named, got {saved_step}"
    if state.position.step != saved_step:
        yield "sampler[0]", f"expected train_state.step, {saved_step}, got {state.position.step}"
    for section in ("model", "data"):
        if not isinstance(state.config.get(section), dict):
            yield f"config.{section}", f"expected an object, got {reprlib.repr(state.config.get(section))}"
