"""Token embedding and output head in 8 bits: codes, modules in and outside of a model, kernels, checkpoints."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from snnllm import shared_input, vocabulary
from snnllm.block import device_bytes
from snnllm.card import write_card
from snnllm.config import SpikeConfig
from snnllm.conversion import as_source, convert, estimate
from snnllm.execution import View, use_view
from snnllm.inspection import matmuls
from snnllm.kernels import get_backend
from snnllm.kernels.cpu.head import MOST_ROWS, head_rows, multiplies
from snnllm.modeling import SpikingLlamaForCausalLM, load, spiking_config
from snnllm.operations import count_operations
from snnllm.random_model import Shape, llama_config, random_spiking
from snnllm.vocabulary import (
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedTable,
    quantize_table,
    reference_logits,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PIPELINES = {"rtn": "W4A4T2", "rotated": "W4A4T2", "omniquant": "W4A4T2", "gptq": "TW1.4A4T2"}
REORDERED = 2.0**-20
"""Of float32 sums in any order, in units of `sum |x c| s`."""


def random_table(tokens: int, channels: int, seed: int = 0) -> QuantizedTable:
    generator = torch.Generator().manual_seed(seed)
    return quantize_table(0.02 * torch.randn(tokens, channels, generator=generator))


def rows_of(count: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, channels, generator=generator).to(dtype)


def check_logits(logits: Tensor, x: Tensor, table: QuantizedTable) -> None:
    """Logits beside those of float64."""
    x, codes, scale = x.double(), table.codes.double(), table.scale.double()
    exact, sizes = (x @ codes.T) * scale, (x.abs() @ codes.abs().T) * scale
    kind = torch.finfo(logits.dtype)  # one rounding, of normal or subnormal results
    allowed = REORDERED * sizes + kind.eps * (exact.abs() + kind.smallest_normal)
    assert ((logits.double() - exact).abs() <= allowed).all()


# -- codes ---------------------------------------------------------------------------------------------------------


def test_codes_round_half_to_even():
    table = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.6], [254.0, 1, 3, 5, -1, -3, 0]])
    codes, scale = quantize_table(table)
    assert scale.tolist() == [1.0, 2.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127], [127, 0, 2, 2, 0, -2, 0]]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_half_a_step_at_most(dtype, monkeypatch):
    table = (0.02 * torch.randn(31, 40)).to(dtype)
    table[3] = 0
    table[5] = 1e-7  # float32 has no scale of subnormal precision for less
    whole = quantize_table(table)
    monkeypatch.setattr(vocabulary, "_FLOATS", 120)  # three rows at a time
    codes, scale = quantize_table(table)
    assert torch.equal(codes, whole.codes)
    assert torch.equal(scale, whole.scale)
    assert codes.abs().amax(1).tolist() == [127 if i != 3 else 0 for i in range(31)]
    assert (scale > 0).all()
    error = codes.double() * scale.double()[:, None] - table.double()
    assert (error.abs() <= 0.50001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_codes_is_refused(bad):
    table = torch.ones(4, 3)
    table[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite values, which have no codes"):
        quantize_table(table)


# -- modules -------------------------------------------------------------------------------------------------------


def modules_of(table: QuantizedTable) -> tuple[QuantizedEmbedding, QuantizedHead]:
    embedding, head = QuantizedEmbedding(*table.codes.shape), QuantizedHead(*table.codes.shape)
    for module in (embedding, head):
        module.set_table(table)
    return embedding, head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_and_logits_follow_the_cast_and_scales_do_not(dtype):
    table = random_table(50, 33)
    embedding, head = (module.to(dtype) for module in modules_of(table))
    assert embedding.weight_scale.dtype == head.weight_scale.dtype == torch.float32
    assert embedding.weight.dtype == head.weight.dtype == torch.int8
    assert torch.equal(head.weight_scale, table.scale)
    ids = torch.tensor([[0, 49, 7], [7, 1, 2]])
    expected = (table.codes[ids] * table.scale[ids][..., None]).to(dtype)
    assert embedding(ids).dtype == dtype
    assert torch.equal(embedding(ids), expected)
    x = rows_of(6, 33, dtype).view(2, 3, 33)
    assert head(x).dtype == dtype
    assert head(x).shape == (2, 3, 50)
    if dtype is not torch.float64:
        check_logits(head(x).flatten(0, 1), x.flatten(0, 1), table)
    sizes = (embedding.num_embeddings, embedding.embedding_dim, head.out_features, head.in_features)
    assert sizes == (50, 33, 50, 33)
    assert "tokens=50, channels=33, bits=8" in repr(head)
    with pytest.raises(IndexError):
        embedding(torch.tensor([50]))


def test_float64_is_summed_in_float64():
    table, x = random_table(70, 40), rows_of(3, 40, torch.float64)
    exact = (x @ table.codes.double().T) * table.scale.double()
    assert torch.allclose(reference_logits(x, *table), exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("count", [1, MOST_ROWS, MOST_ROWS + 1, 40])
@pytest.mark.parametrize("channels", [1, 64, 577])
def test_the_reference_is_a_product(count, channels, monkeypatch):
    table, x = random_table(130, channels), rows_of(count, channels)
    check_logits(reference_logits(x, *table), x, table)
    monkeypatch.setattr(vocabulary, "_FLOATS", 3 * channels)
    check_logits(reference_logits(x, *table), x, table)
    half = x.half()
    check_logits(reference_logits(half, *table), half, table)


def test_the_head_has_a_gradient():
    table, x = random_table(130, 24), rows_of(3, 24).requires_grad_()
    weight = table.codes.float() * table.scale[:, None]
    expected = torch.autograd.grad((x @ weight.T).square().sum(), x)
    head = modules_of(table)[1]
    assert torch.allclose(torch.autograd.grad(head(x).square().sum(), x)[0], expected[0], rtol=1e-4)


@pytest.mark.skipif(get_backend("auto", "cpu").name != "native", reason="needs a C compiler")
@pytest.mark.parametrize("channels", [1, 63, 64, 200, 577])
@pytest.mark.parametrize("count", [1, 3, MOST_ROWS])
def test_few_rows_run_in_c(channels, count, monkeypatch):
    table, x = random_table(130, channels), rows_of(count, channels)
    check_logits(head_rows(x, *table), x, table)
    head = modules_of(table)[1]
    monkeypatch.setattr(vocabulary, "reference_logits", lambda *given: pytest.fail("not in C"))
    assert torch.equal(head(x), head_rows(x, *table))
    wide = torch.stack([x, x], dim=2)[:, :, 0]  # strided
    assert torch.equal(head(wide), head(x))
    assert not multiplies(rows_of(MOST_ROWS + 1, channels))
    assert not multiplies(x.double())


# -- kernels -------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if CUDA else torch.float16])
@pytest.mark.parametrize(("tokens", "channels"), [(512, 64), (33, 96), (130, 577), (1, 1)])
@pytest.mark.parametrize("count", [1, 5, 16, 17, 40])
def test_the_kernel_is_a_product(tokens, channels, count, dtype):
    from snnllm.kernels.triton.vocabulary import head_logits

    table, x = random_table(tokens, channels), rows_of(count, channels, dtype)
    codes, scale = (part.to(DEVICE) for part in table)
    logits = head_logits(x.to(DEVICE), codes, scale)
    assert logits.dtype == dtype
    check_logits(logits.cpu(), x, table)
    assert torch.equal(logits, head_logits(x.to(DEVICE), codes, scale))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [5, 1024, 1500])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_the_kernel_looks_up(channels, dtype, kind):
    from snnllm.kernels.triton.vocabulary import embed

    codes, scale = (part.to(DEVICE) for part in random_table(33, channels))
    ids = torch.tensor([[0, 32, 7], [7, -1, 33]], dtype=kind, device=DEVICE)
    rows = embed(ids, codes, scale, dtype)
    known = ids.clamp(0, 32)
    expected = (codes[known] * scale[known][..., None]).to(dtype)
    expected[1, 1:] = float("nan")  # no tokens
    assert torch.equal(rows, expected) or torch.equal(rows.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(rows.isnan(), expected.isnan())


@needs_triton
def test_a_model_runs_in_the_kernels(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(shared_input, "kernels_run_on", lambda kind: True)
    spike = SpikeConfig.preset("W4A4", embedding_bits=8)
    model = random_spiking(
        llama_config(Shape(32, 48, 2, 1, 1, 65), 64), spike, torch.device(DEVICE), torch.float32
    )
    ids = torch.arange(3, 9, device=DEVICE)[None]
    used: list[str] = []
    from snnllm.kernels.triton import vocabulary as kernels

    for name in ("embed", "head_logits"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=run: (used.append(n), f(*a))[1])
    with torch.no_grad():
        logits = model(ids).logits
        assert used == ["embed", "head_logits"]
        monkeypatch.setattr(vocabulary, "DTYPES", ())
        expected = model(ids).logits
    assert len(used) == 2
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


@needs_triton
def test_the_operators_are_traced():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from snnllm.kernels.triton.vocabulary import embed, head_logits

    with FakeTensorMode():
        codes, scale = torch.empty(50, 24, dtype=torch.int8), torch.empty(50)
        rows = embed(torch.empty(2, 3, dtype=torch.int64), codes, scale, torch.float16)
        assert (rows.shape, rows.dtype) == ((2, 3, 24), torch.float16)
        logits = head_logits(rows[0], codes, scale)
        assert (logits.shape, logits.dtype) == ((3, 50), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "channels"), [(32000, 4096), (49152, 576), (128256, 2048), (32001, 4096)]
)
def test_the_kernel_at_real_shapes(tokens, channels, dtype):
    from snnllm.kernels.triton.vocabulary import embed, head_logits

    table = random_table(tokens, channels)
    codes, scale = (part.cuda() for part in table)
    for count in (1, 4, 16, 33, 300):
        x = rows_of(count, channels, dtype).cuda()
        logits = head_logits(x, codes, scale)
        check_logits(logits, x, QuantizedTable(codes, scale))
        assert torch.equal(logits, head_logits(x, codes, scale))
    ids = torch.tensor([0, tokens - 1, 5]).cuda()
    rows = (codes[ids] * scale[ids][:, None]).to(dtype)
    assert torch.equal(embed(ids, codes, scale, dtype), rows)


@pytest.mark.gpu
def test_recorded_steps_and_a_compiled_head():
    spike = SpikeConfig.preset("W4A4T2", embedding_bits=8)
    shape = Shape(256, 512, 4, 2, 2, 1001)
    model = random_spiking(llama_config(shape, 256), spike, torch.device("cuda"), torch.bfloat16)
    ids = torch.randint(3, 1001, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "eos_token_id": None}
    texts = [model.generate(ids, **options) for _ in range(4)]
    assert model._steps._buffers.step is not None
    assert texts[0].shape == (2, 21)
    for text in texts[2:]:  # the second one pads the prompts as it records them, these replay
        assert torch.equal(text, texts[1])
    head, x = model.lm_head, torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(head, fullgraph=True)(x), head(x))


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*PIPELINES, "tied rtn", "tied rotated"])
def converted(request, make_llama, token_ids, tmp_path_factory):
    """A dense model, its checkpoint with tables of 8 bits, and whether one table is shared."""
    pipeline = request.param.removeprefix("tied ")
    tied = request.param != pipeline
    dense = make_llama(tie_word_embeddings=tied, vocab_size=129)
    folder = tmp_path_factory.mktemp("tables") / "out"
    spike = SpikeConfig.preset(PIPELINES[pipeline], embedding_bits=8)
    convert(dense, folder, spike, token_ids[:2], pipeline=pipeline)
    return dense, folder, tied and pipeline == "rtn"  # the rotated pipeline unties them


def tables_in(folder: Any) -> dict[str, Tensor]:
    state = load_file(folder / "model.safetensors")
    return {k: v for k, v in state.items() if k.startswith(("model.embed_tokens", "lm_head"))}


def test_a_checkpoint_holds_codes_and_scales(converted):
    _, folder, shared = converted
    tables = tables_in(folder)
    names = ("model.embed_tokens",) if shared else ("lm_head", "model.embed_tokens")
    assert sorted(tables) == [f"{n}.{part}" for n in names for part in ("weight", "weight_scale")]
    for name in names:
        assert tables[f"{name}.weight"].dtype == torch.int8
        assert tables[f"{name}.weight"].shape == (129, 32)
        assert tables[f"{name}.weight_scale"].dtype == torch.float32


def test_tables_keep_the_values_of_the_source(make_llama, token_ids, tmp_path):
    dense = make_llama()
    spike = SpikeConfig.preset("W4A4", embedding_bits=8)
    convert(dense, tmp_path / "out", spike, token_ids[:1], pipeline="rtn")
    model = load(tmp_path / "out")
    for ours, theirs in (
        (model.model.embed_tokens, dense.model.embed_tokens),
        (model.lm_head, dense.lm_head),
    ):
        expected = quantize_table(theirs.weight)
        assert torch.equal(ours.weight, expected.codes)
        assert torch.equal(ours.weight_scale, expected.scale)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_loaded_saved_and_loaded_again(converted, token_ids, tmp_path, dtype, caplog):
    _, folder, shared = converted
    auto = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    model = load(folder, dtype)
    assert not [r for r in caplog.records if "MISSING" in r.getMessage()]
    assert model.dtype == (dtype or torch.float32)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.save_pretrained(tmp_path / "again")
    before, after = tables_in(folder), tables_in(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    again = load(tmp_path / "again")
    with torch.no_grad():
        expected = model(token_ids).logits
        assert torch.equal(auto(token_ids).logits, expected)
        assert torch.equal(again(token_ids).logits, expected)
        assert expected.dtype == model.dtype
    for one in (model, auto, again, copy.deepcopy(model)):
        embedding, head = one.model.embed_tokens, one.lm_head
        assert (embedding.weight is head.weight) == shared
        assert (embedding.weight_scale is head.scale) == shared
        assert embedding.weight_scale.dtype == head.scale.dtype == torch.float32


def test_a_cast_keeps_tied_tables_tied(converted, token_ids):
    _, folder, shared = converted
    model, half = load(folder), load(folder, torch.bfloat16)
    model.to(torch.bfloat16).tie_weights()
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.scale is model.model.embed_tokens.weight_scale) == shared
    assert model.lm_head.scale.dtype == torch.float32
    rows = model.model.embed_tokens(token_ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, half.model.embed_tokens(token_ids))
    assert torch.equal(model.lm_head(rows), half.lm_head(rows))
    with torch.no_grad():
        assert model(token_ids).logits.dtype == torch.bfloat16


def test_the_views_have_equal_logits_and_generate(converted, token_ids):
    model = load(converted[1])
    logits, texts = [], []
    for view in View:
        with use_view(model, view), torch.no_grad():
            logits.append(model(token_ids[:2]).logits)
            texts.append(model.generate(token_ids[:1, :5], max_new_tokens=4, min_new_tokens=4))
    assert all(torch.equal(logits[0], other) for other in logits)
    assert all(torch.equal(texts[0], other) for other in texts)
    assert texts[0].shape == (1, 9)


def test_eight_bits_change_logits_a_little(make_llama, token_ids, tmp_path):
    dense, logits = make_llama(), {}
    for bits in (8, 16):
        spike = SpikeConfig.preset("W8A8", embedding_bits=bits)
        convert(dense, tmp_path / str(bits), spike, token_ids[:1], pipeline="rtn")
        with torch.no_grad():
            logits[bits] = load(tmp_path / str(bits))(token_ids).logits
    assert type(load(tmp_path / "16").lm_head) is torch.nn.Linear
    noise = (logits[8] - logits[16]).square().sum() / logits[16].square().sum()
    assert 1e-6 < float(noise) < 1e-2


def test_sizes_are_those_of_the_tables(make_llama, token_ids, tmp_path):
    dense, spike = make_llama(vocab_size=8192), SpikeConfig.preset("W4A4")
    wide = SpikeConfig.preset("W4A4", embedding_bits=8)
    saved = 2 * 8192 * (32 * 4 - (32 + 4))  # float32 beside codes and a scale, two tables
    source, sizes, held = as_source(dense), [], []
    for name, config in (("float", spike), ("codes", wide)):
        report = convert(dense, tmp_path / name, config, token_ids[:1], pipeline="rtn")
        need = estimate(source, config, 1, 24, "rtn")
        # The rest, of the tiny blocks, is names and masks, which nobody estimates.
        assert report.weight_bytes - need.disk_mib * 2**20 == pytest.approx(16000, abs=8000)
        sizes.append(report.weight_bytes)
        held.append(device_bytes(load(tmp_path / name)))
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=1000)  # the header
    assert held[0] - held[1] == saved


def test_reports_say_eight_bits(converted, token_ids, tmp_path):
    _, folder, shared = converted
    model = load(folder)
    head = next(row for row in matmuls(model) if row.name == "lm_head")
    assert (head.spiking, head.coding, head.shape) == (False, "float x int8 levels", "129x32")
    assert head.bytes == 129 * (32 if shared else 36)
    report = count_operations(model, token_ids[:1])
    part = next(part for part in report.float_parts if part.name == "lm_head")
    assert part.rule == "logits of every token, weights of 8 bits"
    assert part.macs == 24 * 32 * 129
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    assert report.parameter_bytes == sum(
        t.numel() * t.element_size() for t in tensors.values() if t.numel()
    )
    write_card(folder, model.config.spike, {})
    text = (folder / "README.md").read_text()
    assert "Embedding and head: 8-bit integer levels, one scale per token." in text


def test_tables_of_codes_are_not_resized(converted, convert_tiny):
    model = load(converted[1])
    assert model.resize_token_embeddings() is model.model.embed_tokens
    with pytest.raises(ValueError, match="embedding_bits=8: tables of codes are not resized"):
        model.resize_token_embeddings(140)
    tokens = model.config.vocab_size
    assert model.resize_token_embeddings(tokens) is model.model.embed_tokens
    with pytest.raises(ValueError, match="tables of codes are not resized"):
        model.resize_token_embeddings(pad_to_multiple_of=2 * tokens)
    with pytest.raises(ValueError, match="tables of codes are not replaced"):
        model.set_input_embeddings(torch.nn.Embedding(tokens, 4))
    with pytest.raises(ValueError, match="tables of codes are not replaced"):
        model.set_output_embeddings(torch.nn.Linear(4, tokens))
    plain = load(convert_tiny()[1])
    assert plain.resize_token_embeddings(140).num_embeddings == 140


def test_checkpoints_without_the_field_are_as_before(convert_tiny):
    values = SpikeConfig.preset("W4A4T2").to_dict()
    assert values.pop("embedding_bits") == 16
    assert SpikeConfig.from_dict(values) == SpikeConfig.preset("W4A4T2")
    model = load(convert_tiny()[1])
    assert type(model.model.embed_tokens) is torch.nn.Embedding


@pytest.mark.parametrize("bits", [4, 7, 9, 32])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="embedding_bits must be in 8..8 or 16"):
        SpikeConfig(embedding_bits=bits)


def test_a_broken_embedding_is_refused_before(make_llama, token_ids, tmp_path):
    dense = make_llama()
    with torch.no_grad():
        dense.model.embed_tokens.weight[5, 5] = float("inf")
    spike = SpikeConfig.preset("W4A4", embedding_bits=8)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds NaN or infinite"):
        convert(dense, tmp_path / "out", spike, token_ids[:1], pipeline="rtn")


def test_a_random_model_has_tables_of_the_usual_size():
    spike = SpikeConfig.preset("W4A4", embedding_bits=8)
    config = llama_config(Shape(32, 48, 2, 1, 1, 512), 64)
    model = random_spiking(config, spike, torch.device("cpu"), torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    for module in (model.model.embed_tokens, model.lm_head):
        table = module.weight.float() * module.weight_scale[:, None]
        assert float(table.std()) == pytest.approx(0.02, rel=0.02)
        assert int(module.weight.abs().max()) == 127
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model(torch.arange(5)[None]).logits.dtype == torch.bfloat16
    again = random_spiking(config, spike, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert type(SpikingLlamaForCausalLM(spiking_config(config, spike)).lm_head) is QuantizedHead
