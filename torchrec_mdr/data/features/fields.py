"""Builds dataclasses from what a YAML file holds, and says which field is wrong."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def built(kind: Any, content: Any, place: str) -> Any:
    """A value of a type, from plain lists, dicts, texts and numbers.

    Fields of a dataclass whose metadata say `beside` are not in the file and keep their default.

    Args:
        kind (Any): a dataclass, `str`, `int`, `float`, `bool`, `tuple[T, ...]`, `dict[str, T]`, a Literal or a union.
        content (Any): what the file holds.
        place (str): where, for errors.

    Raises:
        ValueError: something does not fit; it names the place.

    Example::

        >>> built(tuple[int, ...], [1, "2"], "sizes")
        Traceback (most recent call last):
        ValueError: sizes[1] must be a whole number, not '2'
    """
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _dataclass(kind, content, place)
    if origin is tuple:
        if not isinstance(content, list):
            raise ValueError(f"{place} must be a list, not {content!r}")
        return tuple(built(get_args(kind)[0], entry, f"{place}[{i}]") for i, entry in enumerate(content))
    if origin is dict:
        if not isinstance(content, dict):
            raise ValueError(f"{place} must have fields, not be {content!r}")
        return {str(name): built(get_args(kind)[1], value, f"{place}.{name}") for name, value in content.items()}
    if origin is Literal:
        if content not in get_args(kind):
            raise ValueError(f"{place} must be one of {', '.join(map(str, get_args(kind)))}, not {content!r}")
        return content
    if origin in (Union, UnionType):
        if content is None:
            return None
        return built(next(option for option in get_args(kind) if option is not type(None)), content, place)
    wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    allowed = (int, float) if kind is float else kind
    if not isinstance(content, allowed) or (isinstance(content, bool) and kind is not bool):
        raise ValueError(f"{place} must be {wanted}, not {content!r}")
    return kind(content)


def _dataclass(kind: Any, content: Any, place: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{place} must have fields, not be {content!r}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if not f.metadata.get("beside")}
    for name in content:
        if name not in known:
            raise ValueError(f"{place} has the unknown field '{name}'; it may have {', '.join(known)}")
    for name, f in known.items():
        if name not in content and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{place} lacks the field '{name}'")
    prefix = "" if place == "the file" else f"{place}."
    return kind(**{name: built(hints[name], value, prefix + name) for name, value in content.items()})
