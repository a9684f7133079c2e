"""How a configuration that was written for something else is read: each key becomes a setting of Manta's, or is taken although
it changes nothing here, or is refused by name with what to do instead. None is what was left out.

    TABLE = {"gpu_memory_utilization": engine("gpu_memory_fraction"), "api_key": refused("say api_key_file")}
    read(translation, "llm_configs[0].engine_kwargs", given, TABLE)

Imports the settings' names and nothing of Ray.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Never

from deploy.config.faults import meant
from deploy.config.load import ConfigError, endpoint_config

_FIRST_NAME = re.compile(r"\w+")


@dataclass(slots=True)
class Translation:
    """Of one model, as it grows.

    model: as it was named, a folder or what the Hugging Face cache has it by. engine, serve: those sections of Manta's own
    tree. origins: where each of their settings was said. idle: what was said and changes nothing, each with the reason.
    """

    model: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Errors: ConfigError that names where the setting was said that Manta does not take."""
        try:
            endpoint_config({"engine": self.engine, "serve": self.serve})
        except ConfigError as error:
            name = _FIRST_NAME.match(str(error))
            origin = self.origins.get(name[0]) if name is not None else None
            raise ConfigError(f"{origin}: {error}" if origin else str(error)) from None


Reading = Callable[[Translation, str, Any], None]
"""Of one key: what has been translated so far, where the key stands, its value, which is not None. Errors: ConfigError."""


def read(translation: Translation, path: str, given: Any, table: Mapping[str, Reading]) -> None:
    """Reads the keys in the table's order. Errors: ConfigError, also for a key that the table does not have."""
    keys = mapping(path, given)
    for key in keys:
        if key not in table:
            near = meant(str(key), table)
            raise ConfigError(f"{path}.{key} is unknown: {f'did you mean {near!r}?' if near else 'leave it out'}")
    for key, reading in table.items():
        if keys.get(key) is not None:
            reading(translation, f"{path}.{key}", keys[key])


def mapping(path: str, given: Any) -> Mapping[Any, Any]:
    """Errors: ConfigError for what is none."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path} holds a {type(given).__name__}: write a mapping of keys to values")
    return given


def refuse(path: str, value: Any, why: str) -> Never:
    raise ConfigError(f"{path}={value!r}: {why}")


# ---- what a key may be


def within(table: Mapping[str, Reading]) -> Reading:
    """A mapping with keys of its own."""
    return lambda translation, path, value: read(translation, path, value, table)


def engine(name: str, convert: Callable[[Any], Any] | None = None) -> Reading:
    """That setting of the engine. convert: None stands for "left out"."""

    def reading(translation: Translation, path: str, value: Any) -> None:
        set_engine(translation, name, value if convert is None else convert(value), path, value)

    return reading


def set_engine(translation: Translation, name: str, value: Any, path: str, said: Any = None) -> None:
    """said: the value as it was given, if that is another. Errors: ConfigError if another key has said something else of the
    same setting."""
    if value is None:
        return
    if translation.engine.setdefault(name, value) != value:
        other = f"{translation.origins[name]} says {name}={translation.engine[name]!r}: leave one of them out"
        refuse(path, value if said is None else said, other)
    translation.origins.setdefault(name, path)


def serve(name: str, convert: Callable[[Any], Any] | None = None) -> Reading:
    """That setting of the front ends."""

    def reading(translation: Translation, path: str, value: Any) -> None:
        translation.serve[name] = value if convert is None else convert(value)
        translation.origins[name] = path

    return reading


def one_of(names: Mapping[str, str], target: Callable[[str], Reading], setting: str, otherwise: str) -> Reading:
    """A value that Manta has by a name of its own. otherwise: what to do where it has not."""

    def reading(translation: Translation, path: str, value: Any) -> None:
        if not isinstance(value, str) or value not in names:
            refuse(path, value, f"Manta has {', '.join(names)}; {otherwise}")
        target(setting)(translation, path, names[value])

    return reading


def idle(why: str) -> Reading:
    """Taken whatever it says: it changes nothing."""
    return lambda translation, path, _: translation.idle.append(f"{path}: {why}")  # never a value: it may be a secret


def only(legal: Collection[Any], why: str) -> Reading:
    """What Manta does in any case; anything else is refused."""

    def reading(_: Translation, path: str, value: Any) -> None:
        if value not in legal:
            refuse(path, value, why)

    return reading


def off(why: str) -> Reading:
    """A feature that Manta does not have, and that may be said to be off: False, 0, empty."""

    def reading(_: Translation, path: str, value: Any) -> None:
        if value:
            refuse(path, value, why)

    return reading


def refused(why: str) -> Reading:
    """Whatever it says."""
    return lambda _, path, value: refuse(path, value, why)


def aside(_: Translation, _path: str, _value: Any) -> None:
    """Read together with others, elsewhere."""
