"""Public names of a package that load where they are used first (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: Its `__name__`.
        modules: Public name -> module that defines it; a module of the package stands for itself.
    """
    own = vars(sys.modules[package])

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name])
        own[name] = module if modules[name] == f"{package}.{name}" else getattr(module, name)
        return own[name]

    return load, lambda: sorted({*own, *modules})
