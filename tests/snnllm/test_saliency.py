"""Saliency scores against the formulas of the method, written out; ranking and allocation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snnllm.config import Score
from snnllm.saliency import (
    HESSIAN_DAMPING,
    InputStatistics,
    KeyValueStatistics,
    allocate,
    allocate_map,
    linear_score,
    salient_mask,
)

CHANNELS = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def direct_linear_score(score: Score, x: Tensor, w: Tensor) -> Tensor:
    """One linear's score over all tokens at once, in float64: x [tokens, C], w [N, C]."""
    x, w = x.double(), w.double()
    s = x * (x @ w.T @ w)
    if score is Score.FIRST_ORDER:
        return s.mean(0)
    if score is Score.ABS:
        return s.abs().mean(0)
    if score is Score.GAUSS_NEWTON:
        return x.square().mean(0) * w.square().sum(0)
    if score is Score.MAX_ABS:
        return x.abs().amax(0)
    hessian = 2 / len(x) * x.T @ x
    damped = hessian + HESSIAN_DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    return w.square().sum(0) / torch.linalg.inv(damped).diagonal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", [s for s in Score if s is not Score.RANDOM])
def test_streaming_scores_of_linears(score, dtype, tolerance):
    weights = [torch.randn(n, CHANNELS, generator=generator(n)) for n in (7, 9)]
    windows = [torch.randn(2, s, CHANNELS, generator=generator(s)).to(dtype) for s in (5, 8, 1)]
    statistics = InputStatistics(weights, score)
    for window in windows:
        statistics.update(window)
    assert statistics.tokens == 28
    rows = torch.cat([w.reshape(-1, CHANNELS) for w in windows])
    for ours, weight in zip(statistics.scores(weights, generator()), weights, strict=True):
        assert ours.dtype == torch.float32
        expected = direct_linear_score(score, rows, weight).float()
        scale = expected.abs().max()
        torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=tolerance.score)


def direct_key_value_scores(
    score: Score, q: Tensor, k: Tensor, v: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """Loops over windows, KV heads and their query heads; scores [H_kv, D]."""
    batch, kv_heads, _, dim = k.shape
    repeat = q.shape[1] // kv_heads
    key, value = torch.zeros(2, batch, kv_heads, dim, dtype=torch.float64)
    for b in range(batch):
        for j in range(kv_heads):
            kj, vj = k[b, j].double(), v[b, j].double()
            heads = range(j * repeat, (j + 1) * repeat)
            qs, ps = [q[b, h].double() for h in heads], [p[b, h].double() for h in heads]
            if score is Score.MAX_ABS:
                key[b, j], value[b, j] = kj.abs().amax(0), vj.abs().amax(0)
                continue
            if score in (Score.GAUSS_NEWTON, Score.HESSIAN):
                s_k = sum(kj**2 * (qh**2).sum(0) for qh in qs)
                s_v = sum(vj**2 * (ph**2).sum(0)[:, None] for ph in ps)
            else:
                s_k = sum(kj * (kj @ qh.T @ qh) for qh in qs)
                s_v = sum(vj * (ph.T @ ph @ vj) for ph in ps)
            if score is Score.ABS:
                s_k, s_v = s_k.abs(), s_v.abs()
            key[b, j], value[b, j] = s_k.mean(0), s_v.mean(0)
    if score is Score.MAX_ABS:
        return key.amax(0), value.amax(0)
    return key.mean(0), value.mean(0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("score", [s for s in Score if s is not Score.RANDOM])
def test_key_value_scores_sum_over_the_query_heads_of_a_kv_head(score, kv_heads, tolerance):
    random = generator(kv_heads)
    q = torch.randn(3, 4, 6, 5, generator=random)
    k, v = (torch.randn(3, kv_heads, 6, 5, generator=random) for _ in range(2))
    p = torch.randn(3, 4, 6, 6, generator=random).softmax(-1)
    statistics = KeyValueStatistics(kv_heads, 5, score)
    statistics.update(q[:1], k[:1], v[:1], p[:1])
    statistics.update(q[1:], k[1:], v[1:], p[1:])
    expected = direct_key_value_scores(score, q, k, v, p)
    for ours, theirs in zip(statistics.scores(generator()), expected, strict=True):
        assert ours.shape == (kv_heads, 5)
        scale = theirs.abs().max()
        torch.testing.assert_close(
            ours / scale, (theirs / scale).float(), rtol=0, atol=tolerance.score
        )


def test_random_scores_come_from_the_generator():
    weights = [torch.ones(3, CHANNELS), torch.ones(4, CHANNELS)]
    statistics = InputStatistics(weights, Score.RANDOM)
    statistics.update(torch.ones(2, CHANNELS))
    first, again, other = (statistics.scores(weights, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    heads = KeyValueStatistics(2, 4, Score.RANDOM)
    ones = torch.ones(1, 2, 3, 4)
    heads.update(ones, ones, ones, torch.ones(1, 2, 3, 3))
    key, value = heads.scores(generator(1))
    assert torch.equal(key, heads.scores(generator(1))[0])
    assert not torch.equal(key, value)


@pytest.mark.parametrize("score", list(Score))
def test_no_calibration_token(score):
    weights = [torch.ones(3, CHANNELS)]
    with pytest.raises(ValueError, match="No calibration token has reached this input"):
        InputStatistics(weights, score).scores(weights, generator())
    with pytest.raises(ValueError, match="No calibration window has reached this attention"):
        KeyValueStatistics(2, 4, score).scores(generator())


def test_abs_needs_every_token():
    moment = torch.eye(CHANNELS)
    with pytest.raises(ValueError, match="Score abs needs every token; use InputStatistics"):
        linear_score(Score.ABS, torch.ones(3, CHANNELS), moment, moment[0], generator())


# -- ranking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.33, 0.5, 1.0])
def test_the_largest_scores_are_salient(ratio):
    score = torch.randn(40, generator=generator(3))
    mask = salient_mask(score, ratio)
    assert int(mask.sum()) == round(ratio * 40)
    if 0 < ratio < 1:
        assert score[mask].min() > score[~mask].max()


def test_negative_scores_rank_below_positive_ones():
    score = torch.tensor([-9.0, 0.1, 3.0, -0.2])
    assert salient_mask(score, 0.5).tolist() == [False, True, True, False]


def test_ties_go_to_the_lowest_index():
    assert salient_mask(torch.ones(8), 0.25).tolist() == [True] * 2 + [False] * 6
    score = torch.tensor([1.0, 5.0, 5.0, 5.0])
    assert salient_mask(score, 0.5).tolist() == [False, True, True, False]


def test_heads_are_ranked_jointly():
    score = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 7.5]])
    assert salient_mask(score, 0.5).tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="Saliency scores must be finite"):
        salient_mask(torch.tensor([1.0, bad]), 0.5)


def test_allocation_by_policy():
    score = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert allocate(score, 0.5, 2).tolist() == [0, 1, 0, 1]
    assert allocate(score, 0.5, 1).tolist() == [0, 0, 0, 0]
    assert allocate(score, 1.0, 2).tolist() == [1, 1, 1, 1]
    assert allocate(score, 0.0, 2).dtype == torch.uint8


def test_allocation_by_an_explicit_map():
    group, steps = allocate_map(torch.tensor([4, 1, 2, 1, 4]))
    assert steps == (1, 2, 4)
    assert group.tolist() == [2, 0, 1, 0, 2]
    assert group.dtype == torch.uint8
    assert allocate_map(torch.tensor([3, 3]))[1] == (3,)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (torch.tensor([1, 0, 2]), "Every channel needs at least one time step"),
        (torch.tensor([], dtype=torch.int64), "Every channel needs at least one time step"),
        (torch.arange(1, 67), "At most 64 different step counts are supported, got 66"),
        (torch.tensor([1.0, 2.5]), "Time steps are integers, got a map of torch.float32"),
    ],
)
def test_maps_that_are_none(steps, message):
    with pytest.raises(ValueError, match=message):
        allocate_map(steps)
