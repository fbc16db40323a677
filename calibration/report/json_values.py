"""Values of JSON read as what the annotations of a dataclass say, or refused."""

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def read_value(kind: Any, value: Any) -> Any:
    """A value of JSON as what an annotation says. Raises ValueError, TypeError or KeyError where it is not that."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None and types.NoneType in of else _read_first(of, value)
    if origin is tuple:
        return _read_tuple(of, value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{_short(value)} is no table")
        return {read_value(of[0], name): read_value(of[1], item) for name, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_dataclass(kind, value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{_short(value)} is no {kind.__name__}")
    return value


def _read_tuple(of: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """A list as a tuple of these kinds, or of the first of them again and again where `...` is the last."""
    if not isinstance(value, list | tuple) or (of[-1] is not Ellipsis and len(value) != len(of)):
        raise ValueError(f"{_short(value)} is no list as it should be")
    kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
    return tuple(read_value(each, item) for each, item in zip(kinds, value, strict=True))


def _read_first(kinds: tuple[Any, ...], value: Any) -> Any:
    """A value as the first of several kinds that it is."""
    wanted = [kind for kind in kinds if kind is not types.NoneType]
    for kind in wanted[:-1]:
        try:
            return read_value(kind, value)
        except (ValueError, TypeError, KeyError):
            continue
    return read_value(wanted[-1], value)


def _read_dataclass(kind: type, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{_short(value)} is no table")
    kinds, known = typing.get_type_hints(kind), {}
    for item in fields(kind):
        if item.name in value:
            known[item.name] = read_value(kinds[item.name], value[item.name])
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"it has no {item.name}")
    return kind(**known)


def _short(value: Any) -> str:
    return repr(value)[:60]
