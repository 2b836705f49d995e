"""Greedy decoding and sampling over recorded passes (`snnllm.decoding`): the loop of `generate`.

Whether all sequences have ended is read one step late, so that the device never waits for the program. Greedy
tokens are chosen and appended in one kernel, where nothing stops but the largest length and end tokens, which a least
length may forbid at first; while they are forbidden, or there are none, nothing is read.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from snnllm.block import CACHE_ARGUMENT
from snnllm.decoding import DecodeSteps
from snnllm.shared_input import kernels_run_on


def sample(
    model: Any,
    steps: DecodeSteps,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Greedy decoding or sampling; the tokens that `GenerationMixin._sample` makes.

    Returns:
        Prompts and new tokens, `[B, S + new]`.
    """
    mask = model_kwargs.get("attention_mask")
    positions = model_kwargs["position_ids"]
    steps.begin(
        model_kwargs[CACHE_ARGUMENT],
        torch.ones_like(input_ids) if mask is None else mask,
        positions[:, -1:] + 1,
        model.dtype,
    )
    pad = generation_config._pad_token_tensor
    greedy = None
    if not generation_config.do_sample:
        greedy = _Greedy.of(input_ids, logits_processor, stopping_criteria, pad)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    logits = None
    if generation_config.prefill_chunk_size is None:
        logits = steps.prefill(model, input_ids, positions)
    if logits is None:
        outputs = model._prefill(
            input_ids, generation_config, model_kwargs, is_first_iteration=True
        )
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        del outputs
    finished = _LateFlags(ended)
    while True:
        tokens = steps.tokens
        if greedy is not None:
            input_ids, ended = greedy(logits, tokens)
        else:
            if logits_processor:  # one may keep them, and the next step writes to the same memory
                logits = logits.clone()
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                probability = nn.functional.softmax(scores, dim=-1)
                chosen = torch.multinomial(probability, num_samples=1).squeeze(1)
            else:
                chosen = torch.argmax(scores, dim=-1)
            if ends:
                chosen = torch.where(ended, pad, chosen)
            tokens.copy_(chosen)
            input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
            ended = ended | stopping_criteria(input_ids, None)
        full = input_ids.shape[1] >= stopping_criteria.max_length
        if streamer is not None:  # which waits for every token anyway
            streamer.put(tokens.cpu())
            if full or bool(ended.all()):
                streamer.end()
                return input_ids.clone()
        elif (greedy is None or greedy.may_end) and finished.before(ended):
            return input_ids[:, :-1].clone()
        elif full:
            return input_ids
        logits = steps(model)


class _Greedy:
    """Prompts and the most likely tokens behind them; end tokens are all that stops before the length.

    Args:
        prompts: `[B, S]`.
        length: Of the sequences in the end.
        ends: End tokens, `[E]`, or None.
        pad: Token behind the end, with `ends`.
        least: Tokens of a sequence, prompt and all, before it may end, with `ends`.
    """

    def __init__(
        self,
        prompts: Tensor,
        length: int,
        ends: Tensor | None,
        pad: Tensor | None,
        least: int = 0,
    ) -> None:
        batch, self._many = prompts.shape
        self._ids = prompts.new_empty((batch, length), dtype=torch.int64)
        self._ids[:, : self._many] = prompts
        self._ended = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
        self._ends = None if ends is None else ends.to(self._ids).reshape(-1)
        self._pad, self._least = pad, least

    @classmethod
    def of(
        cls, prompts: Tensor, processors: Any, criteria: Any, pad: Tensor | None
    ) -> _Greedy | None:
        """None if a processor or a criterion wants to be asked, or to warn of long sequences."""
        length, ends = criteria.max_length, None
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria and ends is None:
                ends = criterion.eos_token_id
                continue
            if type(criterion) is not MaxLengthCriteria or criterion.max_length != length:
                return None
            if length > (criterion.max_position_embeddings or length):
                return None
        least = 0
        for processor in processors or ():
            if type(processor) is MinNewTokensLengthLogitsProcessor:
                own = processor.prompt_length_to_skip + processor.min_new_tokens
            elif type(processor) is MinLengthLogitsProcessor:
                own = processor.min_length
            else:
                return None
            barred = processor.eos_token_id  # in generation the same tensor: no wait for the device
            if ends is None or not (barred is ends or torch.equal(barred.cpu(), ends.cpu())):
                return None
            least = max(least, own)
        return cls(prompts, length, ends, pad, least)

    @property
    def may_end(self) -> bool:
        """Whether the last token may have been an end."""
        return self._ends is not None and self._many > self._least

    def __call__(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token to each sequence.

        Args:
            logits: float32 `[B, V]`.
            tokens: int64 `[B]`, written.

        Returns:
            All tokens up to now `[B, S + new]`, and which sequences have ended, bool `[B]`; both are overwritten.
        """
        place, ends = self._many, self._ends
        barred = place < self._least
        self._many += 1
        if kernels_run_on(logits.device.type):
            from snnllm.kernels.triton.greedy import append_greedy  # needs Triton

            append_greedy(logits, self._ids, place, self._ended, tokens, self._pad, ends, barred)
        else:
            if barred:
                tokens_of = torch.arange(logits.shape[1], device=logits.device)
                logits = logits.masked_fill(torch.isin(tokens_of, cast(Tensor, ends)), -torch.inf)
            torch.argmax(logits, dim=-1, out=tokens)
            if ends is not None:
                torch.where(self._ended, cast(Tensor, self._pad), tokens, out=tokens)
                if not barred:
                    self._ended |= torch.isin(tokens, ends)
            self._ids[:, place] = tokens
        return self._ids[:, : self._many], self._ended


class _LateFlags:
    """Flags on a device, read one step late without waiting for the present step.

    Args:
        flags: Like those to come.
    """

    def __init__(self, flags: Tensor) -> None:
        cuda = flags.device.type == "cuda"
        self._values = [
            torch.zeros(flags.shape, dtype=torch.bool, pin_memory=cuda) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._step = 0

    def before(self, flags: Tensor) -> bool:
        """Remember the flags of this step; whether all were set in the step before, False at the first."""
        now, last = self._step % 2, (self._step + 1) % 2
        self._values[now].copy_(flags, non_blocking=True)
        copied, earlier = self._copied[now], self._copied[last]
        if copied is not None:
            copied.record()
        self._step += 1
        if self._step == 1:
            return False
        if earlier is not None:
            earlier.synchronize()
        return bool(self._values[last].all())
