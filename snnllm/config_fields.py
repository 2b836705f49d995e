"""Checks and plain forms of single fields of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from numbers import Real
from typing import Any


def plain(value: Any) -> Any:
    """A field as JSON has it."""
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def member(enum: type[StrEnum], name: str, value: Any) -> StrEnum:
    """The member of an enum by its value; ValueError names the field and the values."""
    try:
        return enum(value)
    except ValueError:
        raise ValueError(
            f"{name} must be one of {[str(m) for m in enum]}, got {value!r}."
        ) from None


def number(name: str, value: Any) -> float:
    """A real number as a float; TypeError names the field."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return float(value)


def check_int(name: str, value: Any, low: int, high: int, also: int | None = None) -> None:
    """Refuse what is no int in `low..high`, nor `also`; TypeError and ValueError name the field."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if not (low <= value <= high or value == also):
        extra = f" or {also} (float)" if also is not None else ""
        raise ValueError(f"{name} must be in {low}..{high}{extra}, got {value}.")
