"""Which of the three equal views runs, chosen per model and never silently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from snnllm.views import View as View


class SpikingModule(nn.Module):
    """A module that can run in every view. `check_view` refuses what its configuration cannot run.

    Attributes:
        view: The view that runs.
        version: Another number whenever what kernels were prepared from changes.
    """

    view: View = View.COLLAPSED
    version: int = 0

    def check_view(self, view: View) -> None:
        """Raise ValueError if this module cannot run in `view`; the default runs in all."""


def spiking_modules(model: nn.Module) -> list[tuple[str, SpikingModule]]:
    """Names and modules of everything in `model` that has views."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, SpikingModule)]


def set_view(model: nn.Module, view: View | str) -> None:
    """Run `model` in `view` from now on.

    Raises:
        ValueError: Unknown view, no spiking module in the model, or a module that cannot run it.
    """
    try:
        chosen = View(view)
    except ValueError:
        names = ", ".join(str(v) for v in View)
        raise ValueError(f"Unknown view {view!r}; the views are {names}.") from None
    modules = spiking_modules(model)
    if not modules:
        raise ValueError("The model has no spiking modules, so there is no view to choose.")
    for _, module in modules:
        module.check_view(chosen)
    for _, module in modules:
        module.view = chosen


@contextmanager
def use_view(model: nn.Module, view: View | str) -> Iterator[None]:
    """Run `model` in `view` inside a `with` block and restore each module's view after it."""
    before = [(m, m.view) for _, m in spiking_modules(model)]
    set_view(model, view)
    try:
        yield
    finally:
        for module, old in before:
            module.view = old


def choose_views(model: nn.Module) -> bool:
    """Put modules whose counts the collapsed view cannot run into the unrolled one; all are equal.

    Returns:
        Whether there was such a module.
    """
    chosen = False
    for _, module in spiking_modules(model):
        try:
            module.check_view(View.COLLAPSED)
        except ValueError:
            module.check_view(View.UNROLLED)
            module.view = View.UNROLLED
            chosen = True
    return chosen
