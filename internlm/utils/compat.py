"""Idioms of existing InternEvo scripts: mix-ins for other spellings, and errors that name a replacement.

A mix-in gives another spelling of something that exists, such as ``gpc.config["model"]`` for ``gpc.config.model``. A
name that cannot exist here raises :class:`ReplacedNameError`, whose message says what to use instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from internlm.utils.errors import Problem, UserError
from internlm.utils.secrets import mask_urls_in

F = TypeVar("F", bound=Callable[..., Any])


class ReplacedNameError(UserError, AttributeError):
    """Error for a name of InternEvo that does not exist here; the message names the replacement.

    It is an ``AttributeError``, so that ``hasattr`` and ``getattr`` with a default treat the name as absent.
    """


class ReplacedImportError(UserError, ImportError):
    """Error for the import of a module or name of InternEvo that does not exist here; it names the replacement.

    It is no ``AttributeError``, in whose place ``from module import name`` would raise an error of its own.
    """


class FrozenConfigError(UserError, TypeError):
    """Error for an attempt to change a config after it was resolved."""


class ReplacedNames:
    """Mix-in that raises :class:`ReplacedNameError` for the names in ``replaced``."""

    #: Map from absent names to what to use instead.
    replaced: ClassVar[Mapping[str, str]] = {}

    # Python calls it only for attributes that it has not found.
    def __getattr__(self, name: str) -> Any:
        if name in self.replaced:
            where = f"{type(self).__name__}.{name}"
            raise ReplacedNameError(Problem(where, "does not exist in this project", self.replaced[name]))
        inherited = getattr(super(), "__getattr__", None)  # that of nn.Module finds parameters and sub-modules
        if inherited is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return inherited(name)


_LOSS = "Remove it: trainer.execute_schedule computes the loss; the section loss of the config has its settings"
_METRICS = "Remove it: trainer.execute_schedule returns the loss, and trainer.fit() logs all metrics"
#: Map from absent modules, and from absent names in modules, to what to use instead.
REPLACED_IMPORTS: Mapping[str, str] = {
    "internlm.model.losses": _LOSS,
    "internlm.model.metrics": _METRICS,
    "internlm.train.initialize_isp_communicator": "Use internlm.train.initialize_parallel_communicator",
    "internlm.train.load_new_batch": "Use next(iterator): trainer.execute_schedule takes the batch of a loader",
    "internlm.utils.common.get_current_device": "Use internlm.accelerator.current_device",
    "internlm.utils.megatron_timers": "Remove it: trainer.fit() logs times, and the argument --profiling writes traces",
    "internlm.utils.writer": "Remove it: trainer.fit() writes TensorBoard records, if enable_tb is set",
}


def refuse_replaced_import(name: str) -> None:
    """Raise :class:`ReplacedImportError` if ``name``, with its module or packages, is in :data:`REPLACED_IMPORTS`."""
    if name in REPLACED_IMPORTS:
        raise ReplacedImportError(Problem(name, "does not exist in this project", REPLACED_IMPORTS[name]))


class ReplacedModules:
    """Finder of modules that finds none, but raises :class:`ReplacedImportError` for those that are replaced."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Refuse ``name`` if it is replaced; as the last of ``sys.meta_path`` it gets modules that do not exist."""
        refuse_replaced_import(name)


class AsTuple:
    """Mix-in of results that unpack, and have items, like the tuple that :meth:`as_tuple` returns."""

    def as_tuple(self) -> tuple[Any, ...]:
        """Return the values that the object unpacks to."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return iter(self.as_tuple())

    def __getitem__(self, index: int) -> Any:
        return self.as_tuple()[index]

    def __len__(self) -> int:
        return len(self.as_tuple())


class OlderResult:
    """Mix-in of a trainer, which unpacks to what ``initialize_trainer`` returned in older versions of InternEvo."""

    _older_result: tuple[Any, ...] | None = None

    def unpack_to(self, *values: Any) -> None:
        """Let the trainer unpack to itself, followed by ``values``."""
        self._older_result = values

    def __iter__(self) -> Iterator[Any]:
        if self._older_result is None:
            todo = "Write trainer = initialize_trainer(...); trainer.engine and trainer.schedule are its parts"
            raise UserError(Problem("initialize_trainer", "returns one object, which does not unpack", todo))
        return iter((self, *self._older_result))


def naming_current_call(call: str) -> Callable[[F], F]:
    """Decorate a function, such that arguments that do not fit its signature raise an error that names ``call``."""

    def decorate(function: F) -> F:
        signature, name = inspect.signature(function), function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise UserError(Problem(name, str(error), f"Call {call}")) from None
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


class Progress(Protocol):
    """Protocol for an object that counts the steps of a run."""

    step: int


class FollowsRun(ReplacedNames):
    """Mix-in of a schedule, a function of the step, that returns its value in the last step of a run."""

    replaced: ClassVar[Mapping[str, str]] = {
        "step": "Remove the call: trainer.step() takes the value of each step from the schedule",
        "state_dict": "Remove the call: a schedule is a function of the step, which checkpoints save",
        "load_state_dict": "Remove the call: a schedule is a function of the step, which checkpoints save",
    }
    _progress: Progress | None = None

    def __call__(self, step: int) -> float:
        """Return the value in ``step``, counted from 0."""
        raise NotImplementedError

    def follow(self, progress: Progress) -> None:
        """Take the number of steps done from ``progress`` from now on."""
        object.__setattr__(self, "_progress", progress)  # the schedules are frozen dataclasses

    def last_value(self) -> float:
        """Return the value in the last step; in the first step if no step has been done."""
        done = self._progress.step if self._progress else 0
        return self(max(done - 1, 0))


class DictAccess:
    """Mix-in that makes the fields of an object readable as those of a dict, and refuses every change.

    ``section["key"]``, ``section.get("key", default)``, ``"key" in section``, ``**section`` and ``dict(section)`` work
    as with a dict. Properties of the class can be read by name too, but are not among :meth:`keys`.
    """

    def keys(self) -> list[str]:
        """Return the names of all fields."""
        return list(vars(self))

    def values(self) -> list[Any]:
        """Return the values of all fields."""
        return [self[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Return all fields as pairs (name, value)."""
        return [(name, self[name]) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of the field ``name``, or ``default`` if there is no such field."""
        try:
            return self[name]
        except KeyError:
            return default

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.keys() or name in self._properties())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    @classmethod
    def _properties(cls) -> set[str]:
        """Return the names of the properties that subclasses of this mix-in define."""
        own = [base for base in cls.__mro__ if issubclass(base, DictAccess)]
        return {name for base in own for name, value in vars(base).items() if isinstance(value, property)}

    # -- changes ------------------------------------------------------------------------------------------------------
    def refuse(self, name: str, *value: Any) -> UserError:
        """Return the error for changing the field ``name``, to ``value`` if one is given."""
        return frozen(name, *value)

    def __setitem__(self, name: str, value: Any) -> NoReturn:
        raise self.refuse(name, value)

    def __delitem__(self, name: str) -> NoReturn:
        raise self.refuse(name)

    def update(self, *changes: Any, **more: Any) -> NoReturn:
        """Refuse to change the object."""
        raise self.refuse(", ".join([*(name for change in changes for name in dict(change)), *more]))

    def setdefault(self, name: str, value: Any = None) -> Any:
        """Return the value of an existing field ``name``; refuse to add one."""
        if name not in self:
            raise self.refuse(name, value)
        return self[name]

    def pop(self, name: str, *default: Any) -> NoReturn:
        """Refuse to change the object."""
        raise self.refuse(name)


def frozen(name: str, *value: Any) -> FrozenConfigError:
    """Return the error for changing the config key ``name``, to ``value`` if one is given."""
    change = f"cannot be set to {mask_urls_in(repr(value[0]))}" if value else "cannot be changed or removed"
    todo = (
        "Set it in the config file, with --set KEY=VALUE or with initialize_distributed_env(overrides=['KEY=VALUE']); "
        "keep values that are no config keys in variables of the script"
    )
    return FrozenConfigError(Problem(f"config key {name}", f"{change}, because a resolved config is frozen", todo))
