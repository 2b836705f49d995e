"""Keep packages that cannot be loaded out of the sight of transformers.

SpikingJelly requires torchvision and torchaudio, and the package index has builds of them for CUDA
only. Beside a CPU build of torch neither can be imported, although both are installed; transformers
sees that they are installed, imports them, and then cannot import ``LlamaForCausalLM``.
``hide_broken_packages`` makes such a package look absent, which transformers handles well;
``hide_in_time`` puts that off until a package is imported that would meet it, because it needs torch.

Importing a working torchvision costs about a second, so the question "would it import?" is answered
by loading its compiled extension alone (milliseconds): that is the part that fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__all__ = ["hide_broken_packages", "hide_in_time"]

_LOG = logging.getLogger(__name__)

# Package -> glob of the compiled extension that its __init__ loads first.
_EXTENSIONS = {"torchvision": "_C*.so", "torchaudio": "lib/_torchaudio*.so"}

# transformers caches these answers when it is imported; a stale one would defeat the hiding.
_TRANSFORMERS_PROBES = (
    "is_torchvision_available",
    "is_torchvision_v2_available",
    "is_torchvision_greater_or_equal",
    "is_torchaudio_available",
)

# What imports a broken package, or makes something that does so useful.
_TRIGGERS = ("transformers", "spikingjelly")


class _Trigger(MetaPathFinder):
    """Finds nothing; hides broken packages when the import of a trigger begins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave every module to the finders behind."""
        if fullname not in _TRIGGERS or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        hide_broken_packages()
        # Whoever walks along the list would skip the finder that has moved up.
        return importlib.util.find_spec(fullname)


def hide_in_time() -> None:
    """Hide broken packages now if torch is loaded anyway, else when somebody could meet them."""
    if "torch" in sys.modules or any(name in sys.modules for name in _TRIGGERS):
        hide_broken_packages()
    else:
        sys.meta_path.insert(0, _Trigger())


def hide_broken_packages() -> tuple[str, ...]:
    """Hide torchvision and torchaudio from later imports where they are installed but broken.

    Safe to call again: a package that is hidden, absent or already imported is left alone.

    Returns:
        The names hidden by this call, for the log and the tests.
    """
    hidden = []
    for name, pattern in _EXTENSIONS.items():
        reason = _import_failure(name, pattern)
        if reason is None:
            continue
        for module in [key for key in sys.modules if key.startswith(f"{name}.")]:
            del sys.modules[module]
        # None is Python's own mark for "do not import": find_spec reports the package as absent.
        sys.modules[name] = None  # type: ignore[assignment]
        hidden.append(name)
        _LOG.info("%s is installed but cannot be loaded, hidden: %s", name, reason)
    if hidden:
        _forget_cached_probes()
    return tuple(hidden)


def _import_failure(name: str, pattern: str) -> str | None:
    """Say why the installed package cannot be imported, or None where there is nothing to hide."""
    if name in sys.modules:
        return None
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    import torch  # here, because it takes a second: see hide_in_time

    extensions = [path for folder in folders for path in sorted(folder.glob(pattern))]
    try:
        for path in extensions:
            torch.ops.load_library(path)
        if not extensions:  # another layout than the known one: only an import can tell
            importlib.import_module(name)
    except Exception as error:  # whatever it is, transformers must not meet it
        return f"{type(error).__name__}: {error}"
    return None


def _forget_cached_probes() -> None:
    """Make an already imported transformers ask again which packages are there."""
    import_utils = sys.modules.get("transformers.utils.import_utils")
    for probe in _TRANSFORMERS_PROBES:
        cache_clear = getattr(getattr(import_utils, probe, None), "cache_clear", None)
        if cache_clear is not None:
            cache_clear()
