"""How a setting is declared: once, in the room that uses it, with its default, its help and what it may be.

Imports nothing of Manta. Records of settings in any room are made of these fields; `options` finds them, `check` holds them to
what they say, and the command line is made from them.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OptionRule:
    """What a value must be, and what to say of one that is not, behind `name=value`."""

    holds: Callable[[Any], bool]
    complaint: str


def at_least(low: int) -> OptionRule:
    return OptionRule(lambda value: value >= low, f"is below {low}: raise it")


def at_most(high: int) -> OptionRule:
    return OptionRule(lambda value: value <= high, f"is above {high}: lower it")


def above_0(why: str) -> OptionRule:
    return OptionRule(lambda value: value > 0, f"is not above 0: {why}")


def one_of(legal: tuple[str, ...]) -> OptionRule:
    return OptionRule(legal.__contains__, f"is unknown: choose one of {', '.join(legal)}")


def option(default: T, help: str, *rules: OptionRule, shown: str = "", size: bool = False) -> T:
    """A setting that users may change. help: the sentence that the command line shows. shown: the default in words, where the
    value says too little. size: bytes, "4GiB" also read."""
    metadata: dict[str, Any] = {"help": help, "shown": shown or str(default), "size": size, "rules": rules}
    return field(default=default, metadata=metadata)


def options(record: type[Any]) -> tuple[Field[Any], ...]:
    """What users may set: what has its help, or must be given. The rest is for tests and replays."""
    return tuple(f for f in fields(record) if f.metadata or f.default is MISSING)


def check(settings: Any) -> None:
    """Errors: ValueError that names the setting, the value given and what is legal."""
    for f in options(type(settings)):
        value = getattr(settings, f.name)
        for rule in f.metadata.get("rules", ()):
            if value is not None and not rule.holds(value):
                raise ValueError(f"{f.name}={value!r} {rule.complaint}")
