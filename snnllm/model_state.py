"""What recorded passes of a model depend on, looked up in less than a millisecond.

A CUDA graph calls no module: whoever hooks one, records from its neurons, changes a weight or a view wants
another pass than the recorded one. `generate` asks before every call, so the walk over the modules is
one flat loop, and what only depends on the tree of modules is kept until another tree is met.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from neurons import SpikeEncoder
from snnllm.execution import SpikingModule
from snnllm.linear import SpikingLinear
from snnllm.shared_input import all_hooked, hooked


class ModelState:
    """The state of a model when its passes could be recorded last.

    It holds the modules of the model, but not the model itself, which owns it: no cycle keeps it alive.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module | None] = []
        self._encoders: list[SpikeEncoder] = []
        self._spiking: list[SpikingModule] = []
        self._linears: list[SpikingLinear] = []
        # Of other modules than the spiking ones, which have a version.
        self._buffers: list[dict[str, Tensor | None]] = []
        self._values: tuple[Any, ...] = ()

    def changed(self, model: Any) -> bool | None:
        """Whether a model is another than when its passes could be recorded last; None if they cannot be now.

        They can if all linears run in operators of Triton, nobody watches and no `forward` is patched, as
        accelerate's hooks do. A change is a module, parameter or buffer replaced or moved, other tensors in
        a linear, other channel groups, another backend, view or attention function.
        """
        if all_hooked():
            return None
        found: list[nn.Module | None] = [model]
        holders = []
        for module in found:  # which grows on the way: all modules, level by level
            if module is None:
                continue
            watched = (
                module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            )
            if watched and hooked(module):
                return None
            if module._parameters:
                holders.append(module._parameters)
            if module._modules:
                found += module._modules.values()
        del found[0]
        if found != self._modules:
            self._sort(found)
        if any([encoder.watched for encoder in self._encoders]):
            return None
        values = (
            [(p.data_ptr(), p.dtype) for held in holders for p in held.values() if p is not None],
            [b.data_ptr() for held in self._buffers for b in held.values() if b is not None],
            [linear.backend for linear in self._linears],
            [module.version for module in self._spiking],
            model.config._attn_implementation,
            [module.view for module in self._spiking],
        )
        changed = values != self._values
        if changed:
            linears = self._linears
            if not linears or not all(x.runs_in_triton() for x in linears):
                # Another view packs nothing anew: what has been recorded is of use again behind it.
                if values[:-1] != self._values[:-1]:
                    self._values = ()
                return None
            self._values = values
        return changed

    def _sort(self, modules: list[nn.Module | None]) -> None:
        """Keep another tree, of which nothing is known yet."""
        self._modules, self._values = modules, ()
        self._encoders = [m for m in modules if isinstance(m, SpikeEncoder)]
        self._spiking = [m for m in modules if isinstance(m, SpikingModule)]
        self._linears = [m for m in modules if isinstance(m, SpikingLinear)]
        inside = {id(m) for module in self._spiking for m in module.modules()}
        others = [m for m in modules if m is not None and id(m) not in inside]
        self._buffers = [m._buffers for m in others if m._buffers]
