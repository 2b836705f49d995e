"""Greedy tokens in one kernel: those of torch's operators."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

pytest.importorskip("triton", reason="needs triton (pip install triton)")

from snnllm import sampling
from snnllm.kernels.triton import greedy as kernel
from snnllm.sampling import _Greedy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(rows, ends, pad, least=0):
    """Tokens of a few steps, and which sequences have ended behind each of them."""
    batch, steps = rows.shape[1], len(rows)
    prompts = torch.arange(3 * batch, device=DEVICE).view(batch, 3)
    greedy = _Greedy(prompts, 3 + steps, ends, pad, least)
    tokens, found = torch.full((batch,), -1, device=DEVICE), []
    for logits in rows:
        ids, ended = greedy(logits, tokens)
        assert torch.equal(ids[:, -1], tokens)
        assert greedy.may_end or not ended.any()
        found.append(ended.clone())
    assert torch.equal(ids[:, :3], prompts)
    return ids, torch.stack(found)


@pytest.mark.parametrize("vocabulary", [5, 70])
@pytest.mark.parametrize(("many_ends", "least"), [(None, 0), (1, 0), (3, 0), (1, 4), (3, 5)])
def test_tokens_are_those_of_torch(monkeypatch, vocabulary, many_ends, least):
    monkeypatch.setattr(kernel, "_MOST_AT_ONCE", 32)  # three parts of the vocabulary
    generator = torch.Generator().manual_seed(vocabulary)
    rows = torch.randint(-4, 5, (6, 4, vocabulary), generator=generator).float()  # many are equal
    rows[0, 0, 3] = rows[1, 1, 1:] = float("nan")
    rows[3, 3, 1] = float("inf")
    rows[2, 2] = float("-inf")
    rows = rows.to(DEVICE)
    ends = None if many_ends is None else rows[0].argmax(-1).unique()[:many_ends].contiguous()
    if least:  # some that are no tokens
        ends = torch.cat([ends, ends.new_tensor([-1, vocabulary + 3])])
    pad = None if ends is None else torch.tensor(vocabulary + 1, device=DEVICE)
    monkeypatch.setattr(sampling, "kernels_run_on", lambda kind: False)
    expected = chosen(rows, ends, pad, least)
    assert ends is None or expected[1].any()
    assert not expected[1][: max(0, least - 3)].any()
    monkeypatch.setattr(sampling, "kernels_run_on", lambda kind: True)
    for mine, theirs in zip(chosen(rows, ends, pad, least), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_other_criteria_and_processors_are_asked():
    prompts = torch.zeros(1, 2, dtype=torch.int64)
    pad, length = torch.tensor(0), MaxLengthCriteria(9)
    ends = EosTokenCriteria([4, 5])

    def made(*criteria, processors=(), pad=pad):
        return _Greedy.of(prompts, processors, StoppingCriteriaList([*criteria]), pad)

    assert made(length, pad=None) is not None
    assert made(length, ends) is not None
    for other in (
        MaxTimeCriteria(9.0),
        MaxLengthCriteria(9, 8),
        MaxLengthCriteria(8),
        EosTokenCriteria(3),
    ):
        assert made(length, ends, other) is None
    new = MinNewTokensLengthLogitsProcessor(2, 3, [4, 5])
    greedy = made(length, ends, processors=[new, MinLengthLogitsProcessor(4, [4, 5])])
    assert greedy is not None
    assert greedy._least == 5
    assert made(length, processors=[new]) is None
    for other in (MinLengthLogitsProcessor(4, [4]), TemperatureLogitsWarper(0.5)):
        assert made(length, ends, processors=[new, other]) is None
