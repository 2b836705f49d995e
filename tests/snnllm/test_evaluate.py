"""Token perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm.data import load_text, token_windows, tokenize
from snnllm.evaluate import token_perplexity

FLOAT32_RELATIVE = 1e-5  # two summation orders of a few hundred float32 losses


def random_ids(*shape: int) -> Tensor:
    return torch.randint(128, shape, generator=torch.Generator().manual_seed(1))


def test_equals_the_loss_of_transformers(tiny_llama: Any) -> None:
    windows = random_ids(5, 24)
    result = token_perplexity(tiny_llama, windows)
    losses = [tiny_llama(w[None], labels=w[None]).loss.item() for w in windows]
    assert result.window_nll == pytest.approx(losses, rel=FLOAT32_RELATIVE)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 5), rel=FLOAT32_RELATIVE)
    assert (result.windows, result.window_length, result.tokens) == (5, 24, 5 * 23)
    assert result.seconds > 0


def test_batches_change_nothing(tiny_llama: Any) -> None:
    windows = random_ids(5, 24)
    one, three = (token_perplexity(tiny_llama, windows, batch_size=n).nll for n in (1, 3))
    assert one == pytest.approx(three, rel=FLOAT32_RELATIVE)


def test_windows_beyond_the_context_are_refused(tiny_llama: Any) -> None:
    window = random_ids(1, 129)
    with pytest.raises(ValueError, match=r"129 tokens are longer .*\(128, .*--window, at most 128"):
        token_perplexity(tiny_llama, window)
    token_perplexity(tiny_llama, window[:, :128])
    rope = tiny_llama.config.rope_parameters
    tiny_llama.config.rope_parameters = {**rope, "rope_type": "linear", "factor": 4.0}
    token_perplexity(tiny_llama, window)


def test_long_windows_are_reduced_in_chunks(tiny_llama: Any) -> None:
    tiny_llama.config.max_position_embeddings = 600
    window = random_ids(1, 600)
    expected = tiny_llama(window, labels=window).loss.item()
    assert token_perplexity(tiny_llama, window).nll == pytest.approx(expected, rel=FLOAT32_RELATIVE)


def test_half_precision_logits_are_reduced_in_float32(tiny_llama: Any) -> None:
    windows = random_ids(2, 24)
    model = tiny_llama.bfloat16()
    logits = model(windows).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert token_perplexity(model, windows).nll == pytest.approx(
        expected.item(), rel=1e-3
    )  # a batch of 1 and of 2 round differently in bfloat16


def test_leaves_the_model_as_it_was(tiny_llama: Any) -> None:
    tiny_llama.train()
    token_perplexity(tiny_llama, random_ids(1, 8))
    assert tiny_llama.training
    assert all(p.grad is None and p.requires_grad for p in tiny_llama.parameters())


def test_progress_wraps_the_batches(tiny_llama: Any) -> None:
    seen: list[int] = []

    def progress(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        assert len(batches) == 3
        for batch in batches:
            yield batch
            seen.append(len(batch))

    token_perplexity(tiny_llama, random_ids(5, 8), batch_size=2, progress=progress)
    assert seen == [2, 2, 1]


def test_the_result_names_its_convention_and_is_json(tiny_llama: Any) -> None:
    result = token_perplexity(tiny_llama, random_ids(2, 8))
    loaded = json.loads(json.dumps(result.to_dict()))
    assert loaded["metric"] == result.metric == "token_ppl@8"
    assert loaded["perplexity"] == result.perplexity
    assert len(loaded["window_nll"]) == 2


def test_nan_names_the_window(tiny_llama: Any) -> None:
    windows = random_ids(4, 8).clamp(max=100)
    windows[2, 5] = 101
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[101] = math.nan
    with pytest.raises(FloatingPointError, match=r"window 2 \(of 4, counted from 0\) is nan"):
        token_perplexity(tiny_llama, windows, batch_size=3)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 1), (1, 2, 8)])
def test_bad_shape(tiny_llama: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"windows of token ids \[n >= 1, W >= 2\]"):
        token_perplexity(tiny_llama, torch.zeros(shape, dtype=torch.int64))


def test_bad_batch_size(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        token_perplexity(tiny_llama, random_ids(1, 8), batch_size=0)


@pytest.mark.parametrize("token", [-1, 128])
def test_tokens_of_another_vocabulary(tiny_llama: Any, token: int) -> None:
    windows = random_ids(1, 8)
    windows[0, 3] = token
    with pytest.raises(ValueError, match=r"vocabulary of 128; use the tokenizer"):
        token_perplexity(tiny_llama, windows)


def test_a_trained_model_predicts_a_story(stories_model: Any, stories_tokenizer: Any) -> None:
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big dog. The dog was very happy and wanted to play with her."
    )
    ids = tokenize(story, stories_tokenizer)
    assert token_perplexity(stories_model, token_windows(ids, len(ids))).perplexity < 10


@pytest.mark.slow
def test_smollm2_on_wikitext(
    smollm2_model: Any, smollm2_tokenizer: Any, wikitext_test: Path
) -> None:
    ids = tokenize(load_text(wikitext_test), smollm2_tokenizer)
    result = token_perplexity(smollm2_model, token_windows(ids, 512, limit=12))
    assert result.perplexity == pytest.approx(28.916, rel=1e-3)
