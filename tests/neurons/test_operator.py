"""Operators called past the dispatcher: the function itself, and the operator for what traces."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from neurons.backends.operator import operator

CALLS: list[type] = []


@operator("snnllm_tests::doubled", mutates_args=("total",))
def doubled(x: Tensor, total: Tensor) -> Tensor:
    CALLS.append(type(x))
    total += x
    return x * 2


@doubled.register_fake
def _(x: Tensor, total: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_call_runs_the_function():
    CALLS.clear()
    total = torch.zeros(2)
    assert torch.equal(doubled(torch.ones(2), total), torch.full((2,), 2.0))
    assert torch.equal(total, torch.ones(2))
    assert [Tensor] == CALLS


def test_fake_tensors_meet_the_operator():
    CALLS.clear()
    with FakeTensorMode():
        x = torch.ones(3)
        assert doubled(x, x.clone()).shape == (3,)
    assert not CALLS


def test_compiled_graphs_hold_the_operator():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    total = torch.zeros(2)
    compiled = torch.compile(lambda x: doubled(x, total) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert torch.equal(total, torch.ones(2))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("snnllm_tests.doubled" in target for target in targets)
