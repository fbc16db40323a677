"""A stand-in for `tensorrt` made of NVIDIA's own signatures: it records what is asked of it, and refuses what they do.

`module(version, behaviour, calls)` has the classes, methods, properties and enums of signatures.json and no others. A
method checks its arguments as the bindings do, and then does what `behaviour` says, {"Builder.create_network": function
of the object and the arguments, in their order}; one that gives something and has no behaviour fails the test.
"""

import enum
import types
from collections.abc import Callable, Mapping
from typing import Any

from gpu_sim import signatures

Behaviour = Mapping[str, Callable[..., Any]]
_SEQUENCES = ("Dims", "Sequence", "list", "List", "tuple")


class _Enum(enum.Enum):
    """Like pybind11's: convertible to int, but no int."""

    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value


def module(version: str, behaviour: Behaviour, calls: list[tuple[Any, ...]]) -> types.ModuleType:
    """The stand-in of a version, a key of signatures.json; `calls` gets (method or property, *arguments)."""
    described = signatures.read(version)
    return _Maker(described, behaviour, calls).made


class _Maker:
    def __init__(self, described: dict[str, Any], behaviour: Behaviour, calls: list[tuple[Any, ...]]) -> None:
        self.behaviour, self.calls = behaviour, calls
        self.made = types.ModuleType("tensorrt", "signatures of tensorrt, without what they do")
        self.made.__version__ = described["version"]
        self.classes: dict[str, type] = {}
        known = {f"{path}.{name}" for path, found in described["classes"].items() for part in ("methods", "properties")
                 for name in found[part]}  # fmt: skip
        if unknown := {name for name in behaviour if name not in known}:
            raise AttributeError(f"tensorrt {described['version']} has no {', '.join(sorted(unknown))}")
        order = sorted(described["classes"].items(), key=lambda item: (item[0].count("."), bool(item[1]["base"])))
        for path, found in order:  # nested ones after their owners, those that inherit after what they do
            owner, _, name = path.rpartition(".")
            kind = _Enum(name, found["members"]) if found["members"] else self._class(path, found)
            self.classes[path] = kind
            setattr(self.classes[owner] if owner else self.made, name, kind)
            for member in kind if owner and found["members"] else ():  # as pybind11 exports them
                setattr(self.classes[owner], member.name, member)

    def _class(self, path: str, found: dict[str, Any]) -> type:
        maker, properties = self, found["properties"]

        def set_attribute(self: object, name: str, value: object) -> None:
            if name in properties and not properties[name]:
                raise AttributeError(f"property {name!r} of {path!r} object has no setter")
            if name in properties:
                maker.calls.append((name, value))
            elif type(self) is kind and not name.startswith("_"):  # subclasses written in Python take what they like
                raise AttributeError(f"{path!r} object has no attribute {name!r}")
            object.__setattr__(self, name, value)

        def get_attribute(self: object, name: str) -> object:  # called for what is not set
            if f"{path}.{name}" in maker.behaviour and name in properties:
                return maker.behaviour[f"{path}.{name}"](self)
            if name in properties:
                raise NotImplementedError(f"the stand-in has no value of {path}.{name}: say what it is")
            raise AttributeError(f"{path!r} object has no attribute {name!r}")

        body: dict[str, Any] = {"__setattr__": set_attribute, "__getattr__": get_attribute}
        body |= {name: self._method(path, name, overloads) for name, overloads in found["methods"].items()}
        if path == "IHostMemory":  # a buffer
            body["__bytes__"] = lambda self: self.content
        kind = type(path, (self.classes[found["base"]],) if found["base"] else (), body)
        return kind

    def _method(self, path: str, name: str, overloads: list[signatures.Overload]) -> Callable[..., Any]:
        full = f"{path}.{name}"

        def call(instance: object, *given: object, **named: object) -> object:
            for arguments, gives in overloads:
                bound = self._bound(arguments, given, named)
                if bound is None:
                    continue
                if name != "__init__":
                    self.calls.append((name, *bound))
                if full in self.behaviour:
                    result = self.behaviour[full](instance, *bound)
                    assert result is None or self._fits(result, gives), f"{full} gives {gives}, not {result!r}"
                    return result
                if gives != "None":
                    raise NotImplementedError(f"the stand-in has no behaviour of {full}: say what it gives")
                return None
            if not overloads and name == "__init__":
                raise TypeError(f"{path}: No constructor defined!")
            raise TypeError(f"{name}(): incompatible function arguments: {given} {named}; it takes {overloads}")

        return call

    def _bound(
        self, arguments: list[signatures.Argument], given: tuple[object, ...], named: dict[str, object]
    ) -> list[object] | None:
        """What is given, in the order of the arguments, without those that are left out; None where it does not fit."""
        names = [name for name, _, _ in arguments]
        if len(given) > len(names) or set(named) - set(names[len(given) :]):
            return None
        values = dict(zip(names, given, strict=False)) | named
        for name, kind, optional in arguments:
            if name in values:
                if not (optional and values[name] is None) and not self._fits(values[name], kind):
                    return None
            elif not optional:
                return None
        return [values[name] for name in names if name in values]

    def _fits(self, value: object, kind: str) -> bool:
        if "|" in kind and "[" not in kind:
            return any(self._fits(value, each.strip()) for each in kind.split("|"))
        bare = kind.partition("[")[0]
        for path, known in self.classes.items():
            if bare == path or bare.endswith(f".{path}"):
                return isinstance(value, known)
        last = bare.rpartition(".")[2]
        if last in _SEQUENCES:
            return isinstance(value, list | tuple) and all(self._fits(each, "int") for each in value)
        if last in ("int", "SupportsInt", "SupportsIndex", "capsule"):
            return hasattr(value, "__index__")
        if last in ("Buffer", "buffer", "bytes"):
            return isinstance(value, bytes | bytearray | memoryview)
        plain = {"str": str, "bool": bool, "float": float, "None": type(None)}.get(last)
        return plain is None or isinstance(value, plain)


def new(kind: type, **properties: object) -> Any:
    """An object of a class whose constructor Python may not call, as others' methods give it."""
    made = kind.__new__(kind)
    for name, value in properties.items():
        object.__setattr__(made, name, value)
    return made
