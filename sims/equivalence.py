r"""Audit the views of a spiking LLaMA against each other, layer by layer.

Example::

    python -m sims.equivalence smollm2 --prompt "The capital of France is" --output equivalence

runs a prompt and gives the input that reaches each spiking layer to the binary, the unrolled and
the collapsed view of that layer. The int32 accumulators must be equal, integer by integer; the
float outputs and the logits of the whole model are compared too. Writes equivalence.csv and .png.

Exit code: 0 when the views agree bit for bit, 1 when an integer, an output or a logit differs, 2 for
input that cannot be used.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neurons import Encoding
from sims.charts import equivalence_figure
from sims.common import (
    Conversion,
    add_conversion_arguments,
    add_model_argument,
    add_prompt_argument,
    check_folder,
    encode_prompt,
    load_subject,
    make_folder,
    read_conversion,
    run_script,
)
from sims.plots import save_figure
from sims.probes import observed
from snnllm.attention import SpikingLlamaAttention
from snnllm.attention_products import query_key_accumulators
from snnllm.cache import RowEncoder, from_payload
from snnllm.config import FLOAT_BITS
from snnllm.execution import SpikingModule, View, set_view, spiking_modules, use_view
from snnllm.linear import SpikingLinear
from snnllm.ternary_linear import TernaryLinear

__all__ = ["Audit", "LayerAudit", "audit"]

_REFERENCE = View.COLLAPSED
_OTHERS = (View.UNROLLED, View.BINARY)
ROUNDING = 1e-3
"""Relative difference that float32 rounding may make over a whole model."""


@dataclass(frozen=True)
class LayerAudit:
    """Agreement of the views of one layer on one input; the worse of two pairs of views counts.

    Attributes:
        layer: Name of the module.
        kind: ``linear`` or ``attention`` (its product of Q and K, and the counts of K and V).
        compared: Integers in each view; 0 for a layer with a float operand, which has none.
        differing_unrolled: How many differ between the unrolled and the collapsed view.
        differing_binary: How many differ between the binary and the collapsed view.
        max_difference: Largest difference of the float outputs, in units of the output.
        max_output: Largest magnitude of the outputs.
        rounded: Whether the views round differently, by float32 arithmetic: the collapsed view of a
            linear with float inputs and ternary weights, whose integers are equal all the same.
    """

    layer: str
    kind: str
    compared: int
    differing_unrolled: int
    differing_binary: int
    max_difference: float
    max_output: float
    rounded: bool = False

    @property
    def differing(self) -> int:
        """Integers that differ from the collapsed view, in either other view."""
        return self.differing_unrolled + self.differing_binary

    @property
    def relative_difference(self) -> float:
        """`max_difference` over `max_output`; 0 when both are."""
        return self.max_difference / self.max_output if self.max_output else self.max_difference


@dataclass(frozen=True)
class Audit:
    """Agreement of the views of a model.

    Attributes:
        layers: One entry per spiking layer, in the order of execution.
        logits_difference: Largest difference of the logits between two views.
        logits_magnitude: Largest logit.
    """

    layers: tuple[LayerAudit, ...]
    logits_difference: float
    logits_magnitude: float

    @property
    def compared(self) -> int:
        """Integers that were compared, over all layers and both pairs of views."""
        return len(_OTHERS) * sum(layer.compared for layer in self.layers)

    @property
    def differing(self) -> int:
        """Integers that differ."""
        return sum(layer.differing for layer in self.layers)

    @property
    def agrees(self) -> bool:
        """Whether the views are equal bit for bit: integers, outputs and logits; NaN is not.

        Where float inputs meet ternary weights, outputs and logits are equal up to rounding.
        """
        rounded = any(layer.rounded for layer in self.layers)
        floats = [self.logits_difference / max(self.logits_magnitude, 1e-30)]
        floats += [layer.relative_difference for layer in self.layers]
        return self.differing == 0 and all(f <= (ROUNDING if rounded else 0.0) for f in floats)

    @property
    def summary(self) -> str:
        """One line for people."""
        outputs = max(layer.relative_difference for layer in self.layers)
        return (
            f"{len(self.layers)} layers: {self.differing:,} of {self.compared:,} integers differ "
            f"between the views; outputs differ by at most {outputs:.3g} of their largest value, "
            f"logits by at most {self.logits_difference:.3g} (largest: {self.logits_magnitude:.4g})"
        )


def audit(model: nn.Module, input_ids: Tensor) -> Audit:
    """Compare the three views of every spiking layer, and of the whole model, on a prompt.

    Args:
        model: A spiking LLaMA; it keeps its view.
        input_ids: Token ids ``[S]``.

    Returns:
        The audit.

    Raises:
        ValueError: The model has no spiking layers, or cannot run one of the views.
    """
    ids = input_ids.reshape(1, -1)
    modules = spiking_modules(model)
    with torch.no_grad(), use_view(model, _REFERENCE):
        for view in _OTHERS:
            for _, module in modules:
                module.check_view(view)  # before anything runs
        with tqdm(total=len(modules), desc="comparing", unit="layer") as bar:
            auditor = _Auditor(bar.update)
            with auditor.attached(modules):
                logits = model(input_ids=ids, use_cache=False).logits
        others = []
        for view in tqdm(_OTHERS, desc="whole model", unit="view"):
            set_view(model, view)
            others.append(model(input_ids=ids, use_cache=False).logits)
        difference = _distance(others, logits)
    return Audit(tuple(auditor.found), difference, float(logits.abs().max()))


class _Auditor:
    """Compares the views of modules on the inputs that reach them, just before they run.

    Args:
        progress: Called after each module.
    """

    def __init__(self, progress: Callable[[], Any]) -> None:
        self.found: list[LayerAudit] = []
        self._progress = progress
        self._busy = False

    @contextmanager
    def attached(self, modules: Sequence[tuple[str, SpikingModule]]) -> Iterator[None]:
        """Watch the modules inside a ``with`` block."""
        hooks = [
            module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            for name, module in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._busy:  # a linear that runs because its attention is being audited
            return
        self._busy = True
        try:
            if isinstance(module, SpikingLlamaAttention):
                self.found.append(_audit_attention(name, module, args, kwargs))
            elif isinstance(module, SpikingLinear):
                self.found.append(_audit_linear(name, module, args[0]))
        finally:
            self._busy = False
        self._progress()


def _audit_linear(name: str, module: SpikingLinear, x: Tensor) -> LayerAudit:
    layout = module.layout
    ternary = isinstance(module, TernaryLinear)
    has_integers = ternary or FLOAT_BITS not in (layout.weight_bits, layout.activation_bits)
    integers, outputs = {}, {}
    for view in (_REFERENCE, *_OTHERS):
        with use_view(module, view):
            integers[view] = [module.accumulators(x)] if has_integers else []
            outputs[view] = module(x)
    compared = _compare(name, "linear", integers, outputs)
    rounded = ternary and layout.activation_bits == FLOAT_BITS
    return dataclasses.replace(compared, rounded=rounded)


def _audit_attention(
    name: str, module: SpikingLlamaAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LayerAudit:
    encoders = [module.q_encoder, module.k_encoder, module.v_encoder]
    operands: dict[RowEncoder, Tensor] = {}
    integers, outputs = {}, {}
    with ExitStack() as stack:
        # Not in the collapsed view, whose C functions encode without a call of the encoder.
        stack.enter_context(use_view(module, View.UNROLLED))
        for encoder in encoders:
            keep = partial(_keep, operands, encoder)
            stack.enter_context(observed(encoder, "encode_spikes", keep))
        module(*args, **kwargs)
    # Nobody watches the encoders any more: every view runs what it runs in production.
    for view in (_REFERENCE, *_OTHERS):
        with use_view(module, view):
            q, k, v = (_encode(module, encoder, operands[encoder]) for encoder in encoders)
            integers[view] = [*query_key_accumulators(module, q, k), k.count, v.count]
            outputs[view] = module(*args, **kwargs)[0]
    return _compare(name, "attention", integers, outputs)


def _encode(module: SpikingLlamaAttention, encoder: RowEncoder, x: Tensor) -> Encoding:
    """Encode as the current view of the attention does, in C where it does."""
    native = module.native()
    if native is None:
        return module.run_encoder(encoder, x)
    stepped = module.view is not View.COLLAPSED
    return from_payload(native.encode(x, encoder, stepped=stepped), encoder.layout)


def _keep(operands: dict[RowEncoder, Tensor], encoder: RowEncoder, x: Tensor, _: Any) -> None:
    operands[encoder] = x


def _compare(
    name: str, kind: str, integers: dict[View, list[Tensor]], outputs: dict[View, Tensor]
) -> LayerAudit:
    reference, expected = integers[_REFERENCE], outputs[_REFERENCE].float()
    unrolled, binary = (
        sum(int((a != b).sum()) for a, b in zip(reference, integers[view], strict=True))
        for view in _OTHERS
    )
    distance = _distance([outputs[view].float() for view in _OTHERS], expected)
    compared = sum(tensor.numel() for tensor in reference)
    return LayerAudit(name, kind, compared, unrolled, binary, distance, float(expected.abs().max()))


def _distance(others: Sequence[Tensor], expected: Tensor) -> float:
    """Largest difference; NaN where there is one, which Python's `max` would lose."""
    return float((torch.stack(list(others)) - expected).abs().max())


def write_csv(result: Audit, path: Path) -> Path:
    """Write one row per layer and a last one for the logits; returns the path."""
    columns = [field.name for field in dataclasses.fields(LayerAudit)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(dataclasses.astuple(layer) for layer in result.layers)
        logits = (0, 0, 0, result.logits_difference, result.logits_magnitude, False)
        writer.writerow(("logits", "model", *logits))
    return path


def simulate(
    model: str, conversion: Conversion, prompt: str, output: Path
) -> tuple[Audit, list[Path]]:
    """Audit a model and write the results; arguments as in ``--help``.

    Returns:
        The audit, and the files that were written.

    Raises:
        ValueError: A model or prompt that cannot be used.
        OSError: The output cannot be written.
    """
    check_folder(output)
    subject = load_subject(model, conversion)
    ids, _ = encode_prompt(subject.tokenizer, prompt)
    result = audit(subject.model, ids)
    layers, folder = result.layers, make_folder(output)
    figure = equivalence_figure(
        [layer.layer for layer in layers],
        [len(_OTHERS) * layer.compared for layer in layers],
        [layer.differing for layer in layers],
        [layer.relative_difference for layer in layers],
    )
    drawn = save_figure(figure, folder / "equivalence.png")
    return result, [write_csv(result, folder / "equivalence.csv"), drawn]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit code: 0; 1 when the views differ anywhere; 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sims.equivalence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    add_prompt_argument(parser)
    add_conversion_arguments(parser)
    options = parser.parse_args(argv)

    def run() -> int:
        result, files = simulate(
            options.model, read_conversion(options), options.prompt, options.output
        )
        print("\n".join(f"wrote {path}" for path in files))
        print(result.summary)
        return 0 if result.agrees else 1

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
