"""Operators of torch that cost little to call: past the dispatcher, where nobody traces."""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["Operator", "operator"]


class Operator:
    """A custom operator of torch, called as its function.

    The dispatcher takes more time than a small kernel, and a block of a LLaMA has nine launches. What
    traces (``torch.compile``) or brings tensors of its own (fake ones) still meets the operator.

    Args:
        name: as ``torch.library.custom_op`` takes it.
        function: the implementation. Carries no gradient.
        mutates_args: arguments that it changes.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], mutates_args: Iterable[str]
    ) -> None:
        self._function = function
        self._operator: Any = torch.library.custom_op(name, function, mutates_args=mutates_args)

    def __call__(self, first: Any, *others: Any) -> Any:
        """Run the implementation; its first argument is a tensor."""
        if torch.compiler.is_compiling() or type(first) is not torch.Tensor:
            return self._operator(first, *others)
        return self._function(first, *others)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the shapes of the results, for tracing."""
        fake: Callable[..., Any] = self._operator.register_fake(function)
        return fake


def operator(
    name: str, mutates_args: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes a function an :class:`Operator`."""
    return lambda function: Operator(name, function, mutates_args)
