"""What a module, and the code that it is of, keeps of the images that it ran for, put back as it was.

A grid that is kept by the image's size is a constant in a trace, and has no values where the module is followed without
any. What was kept of such runs is to be seen by no other, and not by the user.
"""

import builtins
import functools
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from fcn_deploy.fcn.traced_numbers import OTHERS, is_filled, names_known_to, package_of

Cached = functools._lru_cache_wrapper
CONTAINERS = (dict, list, set, deque)
MOST_ENTRIES = 1000  # of a container; a larger one keeps no grids by size
OF_EVERY_MODULE = {*vars(torch.nn.Module())} - {"_buffers"}  # hooks and parts, which no run changes


class KeptState:
    """What is held by a module's parts, and outside them by their classes, and by the names and caches of their code.

    All that parts hold is put back; outside, where a user's own lists are, tensors alone are. The values of tensors are
    not: weights are large, and what changes them in place is state (`export/from_torch/network.py` refuses that).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._own: list[tuple[Any, Any]] = []
        self._outside: list[tuple[Any, Any]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._caches: list[tuple[Cached, int]] = []
        self._seen = {id(vars(builtins))}
        parts = list(torch.nn.Module.modules(model))
        kinds = dict.fromkeys(kind for part in parts for kind in type(part).__mro__)
        self._packages = {package_of(kind.__module__) for kind in kinds} - OTHERS
        for part in parts:
            self._own.append((vars(part), dict(vars(part))))
        self._note([each for part in parts for each in _entries(part)], self._own)
        for kind in filter(self._is_of_users, kinds):
            self._classes.append((kind, dict(vars(kind))))
            self._note(list(vars(kind).values()), self._outside)
        for names in self._names([vars(each) for each in (*parts, *kinds)]):
            self._outside.append((names, dict(names)))
            self._note(list(names.values()), self._outside)

    def _names(self, waiting: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The names of the user's modules of Python, of which a module is, and what those name."""
        found: dict[int, dict[str, Any]] = {}
        while waiting:
            names = waiting.pop()
            of_kind = [vars(sys.modules[names["__module__"]])] if names.get("__module__") in sys.modules else []
            for other in (*of_kind, *(each for value in list(names.values()) for each in names_known_to(value))):
                if id(other) not in found and self._is_users(str(other.get("__name__"))):
                    found[id(other)] = other
                    waiting.append(other)
        return list(found.values())

    def _is_of_users(self, code: Any) -> bool:
        return self._is_users(str(code.__module__))

    def _is_users(self, module: str) -> bool:
        """Whether a module of Python is of a package that the network is of, or is not installed: not of a library."""
        package = package_of(module)
        if package in OTHERS or package in self._packages:
            return package not in OTHERS
        return "site-packages" not in str(getattr(sys.modules.get(module), "__file__", None) or "site-packages")

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptState":
        return self

    def restore(self) -> bool:
        """Put everything back; gives whether anything had changed."""
        changed = [_put_back(held, before, every=True) for held, before in self._own]
        changed += [_put_back(held, before, every=False) for held, before in self._outside]
        for kind, before in self._classes:
            for name, value in _others(vars(kind), before):
                changed.append(True)
                if name in before:
                    setattr(kind, name, value)
                else:
                    delattr(kind, name)
        for index, (cache, misses) in enumerate(self._caches):
            if cache.cache_info().misses != misses:
                changed.append(True)
                cache.cache_clear()
                self._caches[index] = cache, 0
        return any(changed)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What is run after it finds nothing that was kept in it."""
        try:
            yield
        finally:
            self.restore()

    def _note(self, values: list[Any], held: list[tuple[Any, Any]]) -> None:
        """Note in `held` the containers among values, among what they hold, and among what functions keep."""
        while values:
            value = values.pop()
            kind = type(value)  # `isinstance` would ask objects that stand for others, some of which raise
            if id(value) in self._seen or issubclass(kind, torch.Tensor | torch.nn.Module):
                continue
            if issubclass(kind, CONTAINERS):
                if len(value) <= MOST_ENTRIES:
                    held.append((value, value.copy()))
                    values += value.values() if issubclass(kind, dict) else value
            elif kind is FunctionType and self._is_of_users(value):
                kept = [cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)]
                values += [*kept, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            elif kind is MethodType:
                values.append(value.__func__)
            elif kind is Cached:
                self._caches.append((value, value.cache_info().misses))
            elif not issubclass(kind, type) and self._is_of_users(kind):
                with suppress(Exception):  # of attributes that are slots, or computed
                    values.append(vars(value))
            else:
                continue
            self._seen.add(id(value))


def _entries(part: torch.nn.Module) -> list[Any]:
    return [value for name, value in vars(part).items() if name not in OF_EVERY_MODULE]


def _put_back(held: Any, before: Any, every: bool) -> bool:
    """Give a container what it held, `every` entry, or those of tensors alone; gives whether those were others."""
    if isinstance(before, dict):
        others = [*_others(held, before, every)]
        for key, value in others:
            if key in before:
                held[key] = value
            else:
                held.pop(key)
        return bool(others)
    if len(held) == len(before) and all(one is other for one, other in zip(held, before, strict=True)):
        return False
    if not every and not any(_is_of_tensors(each) for each in held):
        return False
    held.clear()
    held.update(before) if isinstance(before, set) else held.extend(before)
    return True


def _others(held: Mapping[Any, Any], before: Mapping[Any, Any], every: bool = False) -> Iterator[tuple[Any, Any]]:
    """The keys of other values, or of other tensors, than before, with what was there."""
    for key, value in list(held.items()):
        was = before.get(key, before)  # itself stands for none
        if was is not value and (every or _is_of_tensors(value)):
            yield key, was
    if every:
        yield from ((key, was) for key, was in before.items() if key not in held)


def _is_of_tensors(value: Any, depth: int = 2) -> bool:
    kind = type(value)
    if issubclass(kind, torch.Tensor):
        return True
    if not depth or not issubclass(kind, (tuple, *CONTAINERS)) or len(value) > MOST_ENTRIES:
        return False
    return any(_is_of_tensors(each, depth - 1) for each in (value.values() if issubclass(kind, dict) else value))
