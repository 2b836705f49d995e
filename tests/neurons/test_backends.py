"""The kernels emit the integers of the torch reference, and its gradients.

Without a GPU the Triton kernels run in Triton's interpreter and the CuPy source as C++; the tests
marked gpu are the same on the device.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurons import Dynamics, GIFNode, SignedGIFNode, backends, multi_step
from neurons.backends import Reset, Train, cupy_gif, ops

REFUSAL = backends._refusal  # before a fixture replaces it
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)
FLOAT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def cupy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """CuPy: the real one on a GPU, the source compiled as C++ elsewhere."""
    if CUDA:
        pytest.importorskip("cupy")
        yield
        return
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    sys.path.insert(0, str(Path(__file__).parent))
    from fake_cupy import Cupy

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", Cupy(tmp_path_factory.mktemp("cupy")))
        patch.setitem(backends._INSTALLED, "cupy", True)
        patch.setattr(backends, "_refusal", lambda backend, x_seq: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda d: type("S", (), {"cuda_stream": 0}))
        yield
    sys.path.remove(str(Path(__file__).parent))
    cupy_gif._kernel.cache_clear()


@st.composite
def dynamics(draw: st.DrawFn) -> Dynamics:
    reset = draw(st.sampled_from(Reset))
    return Dynamics(
        levels=draw(st.sampled_from([2, 3, 4, 16, 100])),
        signed=draw(st.booleans()),
        v_threshold=draw(st.sampled_from([1.0, 0.3, 1.7])),
        decay=draw(st.sampled_from([1.0, 0.25, 0.9])),
        reset=reset,
        detach_reset=reset == Reset.HARD or draw(st.booleans()),
    )


class Case:
    """One input with everything that goes with it, reproducible from a seed."""

    def __init__(self, steps: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.x_seq = (self.normal(steps, *shape) * 4).to(dtype)
        # Ties, too: charges on the grid of halves.
        self.x_seq = torch.where(
            self.normal(steps, *shape) > 1, (self.x_seq * 2).round() / 2, self.x_seq
        )
        self.v = self.normal(*shape)
        self.grad = self.normal(steps, *shape).to(dtype)
        self.grad_v, self.grad_v_seq = self.normal(*shape), self.normal(steps, *shape)
        self.limits = None
        if seed % 2 and shape:
            self.limits = torch.randint(1, steps + 2, shape[-1:], generator=self.generator)
        self.step = torch.tensor(seed % 3, dtype=torch.int32)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def run(self, spec: Dynamics, backend: str, **options: object) -> tuple[Train, list[Tensor]]:
        x_seq = self.x_seq.to(DEVICE).requires_grad_()
        v = self.v.to(DEVICE).requires_grad_()
        limits = None if self.limits is None else self.limits.to(DEVICE)
        train = multi_step(x_seq, spec, v, limits, self.step.to(DEVICE), backend=backend, **options)
        weight = self.grad.to(DEVICE)
        weight = weight if train.spikes.shape == weight.shape else weight[0]
        outputs = [(train.spikes, weight), (train.v, self.grad_v), (train.v_seq, self.grad_v_seq)]
        pairs = [(y, g.to(DEVICE)) for y, g in outputs if y is not None and y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], [x_seq, v], [g.to(y.dtype) for y, g in pairs]
        )
        return train, list(grads)


def assert_same(case: Case, spec: Dynamics, backend: str, **options: object) -> None:
    (expected, grads), (got, kernel_grads) = (
        case.run(spec, name, **options) for name in ("torch", backend)
    )
    assert got.spikes.dtype == expected.spikes.dtype
    assert torch.equal(got.spikes, expected.spikes)
    assert torch.equal(got.v, expected.v)
    if expected.v_seq is not None:
        assert torch.equal(got.v_seq, expected.v_seq)
    for ours, theirs in zip(kernel_grads, grads, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = FLOAT_TOLERANCE[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 4)


shapes = st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 8), (4, 0)])
cases = st.builds(
    Case,
    st.integers(1, 20),
    shapes,
    st.sampled_from(list(FLOAT_TOLERANCE)),
    st.integers(0, 2**16),
)
options = st.fixed_dictionaries(
    {"store_v_seq": st.booleans(), "output": st.sampled_from(["spikes", "count"])}
)


def allowed(case: Case, spec: Dynamics, chosen: dict[str, object]) -> dict[str, object]:
    """Counts of 16-bit inputs may be too large for their dtype: float32 holds them."""
    return {**chosen, "dtype": torch.float32 if chosen["output"] == "count" else None}


@needs_triton
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases, spec=dynamics(), chosen=options)
def test_triton_equals_torch(case, spec, chosen):
    assert_same(case, spec, "triton", **allowed(case, spec, chosen))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases, spec=dynamics(), chosen=options)
def test_cupy_equals_torch(cupy, case, spec, chosen):
    if not CUDA and case.x_seq.dtype == torch.float16:
        case.x_seq, case.grad = case.x_seq.float(), case.grad.float()
    assert_same(case, spec, "cupy", **allowed(case, spec, chosen))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        st.integers(1, 33),
        st.sampled_from([(5000,), (3, 1025), (64, 1024), (2, 3, 17, 31)]),
        st.sampled_from(list(FLOAT_TOLERANCE)),
        st.integers(0, 2**16),
    ),
    spec=dynamics(),
    chosen=options,
)
def test_kernels_equal_torch_at_size(backend, case, spec, chosen):
    pytest.importorskip(backend)
    assert_same(case, spec, backend, **allowed(case, spec, chosen))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_more_elements_than_32_bits_can_count(backend):
    pytest.importorskip(backend)
    neurons = 2**30 + 8  # three steps: beyond 2**31 and 2**32 bytes
    x_seq = torch.empty(3, neurons, dtype=torch.bfloat16, device="cuda").normal_()
    spec = Dynamics(4)
    train = multi_step(x_seq, spec, 0.5, dtype=torch.int8, store_v=False, backend=backend)
    for part in (slice(0, 1000), slice(-1000, None)):
        expected = multi_step(x_seq[:, part], spec, 0.5, dtype=torch.int8, backend="torch")
        assert torch.equal(train.spikes[:, part], expected.spikes)


@pytest.mark.gpu
@needs_triton
def test_a_new_number_of_steps_does_not_recompile():
    from neurons.backends.triton_gif import _forward

    def compiled() -> int:
        return sum(len(kernels[0]) for kernels in _forward.device_caches.values())

    before = None
    for steps in (1, 2, 3, 16, 17):
        multi_step(torch.randn(steps, 4096, device="cuda"), Dynamics(7), backend="triton")
        before = compiled() if before is None else before
    assert compiled() == before


# ---- shapes, dtypes, outputs


@pytest.fixture(params=["triton", "cupy"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "cupy":
        request.getfixturevalue("cupy")
    elif importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    return str(request.param)


def charges(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * 4


def test_non_contiguous_inputs(kernel):
    x_seq = charges(6, 4, 3).transpose(0, 2)
    expected = multi_step(x_seq, Dynamics(4), 0.5, backend="torch")
    got = multi_step(x_seq, Dynamics(4), 0.5, backend=kernel)
    assert torch.equal(got.spikes, expected.spikes)
    assert torch.equal(got.v, expected.v)


@pytest.mark.parametrize("limits", [[[1], [2], [3]], [[[1, 2], [2, 1], [3, 3]]], [2]])
def test_steps_per_channel_of_any_axes(kernel, limits):
    x_seq, limits = charges(4, 5, 3, 2), torch.tensor(limits, device=DEVICE)
    for step in (0, 1, torch.ones((), dtype=torch.int32, device=DEVICE)):
        expected = multi_step(x_seq, Dynamics(4), 0.5, limits, step, backend="torch")
        got = multi_step(x_seq, Dynamics(4), 0.5, limits, step, backend=kernel)
        assert torch.equal(got.spikes, expected.spikes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_integer_spikes_and_counts(kernel, dtype):
    x_seq = charges(5, 3, 7)
    for output in ("spikes", "count"):
        expected = multi_step(x_seq, Dynamics(8), 0.5, output=output, backend="torch")
        got = multi_step(x_seq, Dynamics(8), 0.5, output=output, dtype=dtype, backend=kernel)
        assert got.spikes.dtype == dtype
        assert not got.spikes.requires_grad
        assert torch.equal(got.spikes.float(), expected.spikes)


def test_what_is_not_asked_for_is_not_there(kernel):
    for backend in ("torch", kernel):
        train = multi_step(charges(3, 4), Dynamics(4), store_v=False, backend=backend)
        assert train.v.numel() == 0
        assert train.v_seq is None


def test_nan_stays_visible(kernel):
    x_seq = charges(2, 4)
    x_seq[0, 1] = float("nan")
    for signed in (False, True):
        train = multi_step(x_seq, Dynamics(4, signed), backend=kernel)
        assert train.spikes.isnan().any(0).tolist() == [False, True, False, False]
        assert train.v.isnan().tolist() == [False, True, False, False]


def test_gradients_of_the_membranes_alone(kernel):
    grads = []
    for backend in ("torch", kernel):
        x_seq = charges(3, 4).requires_grad_()
        train = multi_step(x_seq, Dynamics(4), 0.5, store_v_seq=True, backend=backend)
        grads.append(torch.autograd.grad(train.v_seq[0].sum(), x_seq, retain_graph=True)[0])
        grads.append(torch.autograd.grad(train.v.sum(), x_seq)[0])
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


@needs_triton
@pytest.mark.parametrize("train", [False, True])
def test_opcheck(train):
    x_seq = charges(3, 8).requires_grad_(train)
    v = charges(8, seed=1).requires_grad_(train)
    steps = torch.tensor([1, 2, 1, 1, 2, 2, 3, 3], dtype=torch.int32, device=DEVICE)
    step = torch.zeros((), dtype=torch.int32, device=DEVICE)
    shared = (0.5, 0.3, 0.9, 4, True)
    flags = (False, False, -3.0, 3.0, False, torch.float32)
    arguments = (x_seq, v, steps, step, *shared, *flags, True, True, train, "triton")
    torch.library.opcheck(torch.ops.neurons.gif_forward.default, arguments)
    arguments = (x_seq.detach(), None, None, None, *shared, *flags, False, False, False, "triton")
    torch.library.opcheck(torch.ops.neurons.gif_forward.default, arguments)
    gates = ops.gif_forward(x_seq, v, steps, step, *shared, *flags, True, True, True, "triton")[3]
    grads = (charges(3, 8), charges(8), charges(3, 8), gates, 3, 0.3, 0.9)
    rest = (False, False, False, torch.float32, True, "triton")
    torch.library.opcheck(torch.ops.neurons.gif_backward.default, (*grads, *rest))


# ---- nodes


both = pytest.mark.parametrize("node_class", [GIFNode, SignedGIFNode])


@both
@pytest.mark.parametrize("mode", ["s", "m"])
def test_nodes_are_the_same_on_every_backend(kernel, node_class, mode):
    arguments = {"levels": 4, "v_threshold": 0.7, "decay": 0.5, "steps_per_channel": [1, 2, 3]}
    nodes = [
        node_class(**arguments, step_mode=mode, backend=name).to(DEVICE)
        for name in ("torch", kernel)
    ]
    for node in nodes:
        node.store_v_seq = True
    x_seq, grads = charges(2, 5, 3).requires_grad_(), []
    for _ in range(2):  # from the reset state, and on from there
        outputs = [
            node(x_seq) if mode == "m" else torch.stack([node(x) for x in x_seq]) for node in nodes
        ]
        assert torch.equal(*outputs)
        assert torch.equal(nodes[0].v, nodes[1].v)
        assert torch.equal(nodes[0].v_seq, nodes[1].v_seq)
        assert torch.equal(nodes[0].step, nodes[1].step)
    grads = [torch.autograd.grad(node.v.sum(), x_seq)[0] for node in nodes]
    torch.testing.assert_close(*grads)


def test_a_node_without_state_starts_fresh(kernel):
    x_seq = charges(3, 4)
    for backend in ("torch", kernel):
        node = GIFNode(4, step_mode="m", keep_state=False, store_v_seq=True, backend=backend)
        assert torch.equal(node(x_seq), node(x_seq))
        assert (node.v, node.step) == (0.5, 0.0)
        assert node.v_seq.shape == (3, 4)
        assert "keep_state=False" in repr(node)


def test_spike_dtype(kernel):
    for backend in ("torch", kernel):
        node = GIFNode(4, step_mode="m", spike_dtype=torch.int8, backend=backend)
        assert node(charges(2, 3)).dtype == torch.int8


@needs_triton
@both
def test_compiles_without_breaks(node_class):
    torch.compiler.reset()
    node = node_class(4, step_mode="m", backend="triton")
    twin = node_class(4, step_mode="m", backend="torch")
    compiled = torch.compile(node, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    for steps in (2, 3):
        x_seq = charges(steps, 5, 3).requires_grad_()
        y, expected = compiled(x_seq), twin(x_seq)
        assert torch.equal(y, expected)
        weight = charges(steps, 5, 3, seed=1)
        grads = [torch.autograd.grad((z * weight).sum(), x_seq)[0] for z in (y, expected)]
        torch.testing.assert_close(*grads)
        node.reset()
        twin.reset()


def test_auto_says_what_it_chose():
    node = GIFNode(4, step_mode="m")
    assert node.extra_repr().endswith("backend=auto")
    node.to(DEVICE)(charges(2, 3))
    chosen = "triton" if CUDA and "triton" in node.supported_backends else "torch"
    assert f"backend=auto ({chosen})" in repr(node)


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture):
    from neurons import node

    node._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="neurons.node"):
        for _ in range(3):
            GIFNode(4, step_mode="m").to(DEVICE)(charges(2, 3))
    assert len(caplog.messages) == 1
    assert "GIFNode: backend auto runs on" in caplog.messages[0]


def test_the_backend_can_be_changed():
    node = GIFNode(4, step_mode="m", backend="torch")
    assert "backend=torch" in repr(node)
    assert node.supported_backends[0] == "torch"
    if "triton" in node.supported_backends:
        node.backend = "triton"
        assert torch.equal(node(charges(2, 3)), GIFNode(4, step_mode="m")(charges(2, 3)))


def test_other_surrogates_run_on_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(backends._INSTALLED, "triton", True)

    class Surrogate(torch.nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.floor().clamp(0, 3)

    surrogate = Surrogate()
    node = GIFNode(4, step_mode="m", surrogate_function=surrogate)
    assert node.supported_backends == ("torch",)
    assert torch.equal(node(charges(2, 3)), GIFNode(4, step_mode="m")(charges(2, 3)))
    with pytest.raises(ValueError, match=r"gradients of neurons\.surrogate only"):
        node.backend = "triton"
    node = GIFNode(4, step_mode="m", backend="triton")
    node.surrogate_function = surrogate
    with pytest.raises(ValueError, match=r"gradients of neurons\.surrogate only"):
        node(charges(2, 3))


# ---- refusals


@pytest.mark.parametrize(
    ("backend", "command"),
    [("triton", "pip install 'snnllm[triton]'"), ("cupy", "pip install 'snnllm[cupy]'")],
)
def test_a_missing_backend_names_the_install_command(monkeypatch, backend, command):
    monkeypatch.setitem(backends._INSTALLED, backend, False)
    for build in (
        lambda: GIFNode(4, backend=backend),
        lambda: multi_step(charges(2, 3), Dynamics(4), backend=backend),
    ):
        with pytest.raises(ImportError) as error:
            build()
        assert command in str(error.value)
    assert backend not in backends.available_backends()


@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_kernels_refuse_other_devices_and_dtypes(monkeypatch, backend):
    monkeypatch.setitem(backends._INSTALLED, backend, True)
    monkeypatch.setattr(backends, "_refusal", REFUSAL)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA tensor, got one on cpu"):
        multi_step(torch.zeros(2, 3), Dynamics(4), backend=backend)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match=r"got torch\.float64; convert the input"):
        multi_step(torch.zeros(2, 3, dtype=torch.float64), Dynamics(4), backend=backend)


Build = Callable[[], object]


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: GIFNode(4, backend="numpy"), ValueError, "backend must be one of"),
        (lambda: GIFNode(4, decay=0.0), ValueError, r"decay must lie in \(0, 1\]"),
        (lambda: GIFNode(4, decay="1"), TypeError, "decay must be a float, got str"),
        (lambda: Dynamics(1), ValueError, "levels must be at least 2"),
        (lambda: Dynamics(4, v_threshold=0.0), ValueError, "v_threshold must be positive"),
        (lambda: Dynamics(4, decay=1.5), ValueError, r"decay must lie in \(0, 1\]"),
        (lambda: Dynamics(4, reset=Reset.HARD), ValueError, "hard reset passes no gradient"),
        (lambda: multi_step(torch.zeros(0, 3), Dynamics(4)), ValueError, "at least one time step"),
        (lambda: multi_step(torch.zeros(()), Dynamics(4)), ValueError, "at least one time step"),
        (
            lambda: multi_step(torch.zeros(2, 3, dtype=torch.int32), Dynamics(4)),
            TypeError,
            r"must be floating point, got torch\.int32",
        ),
        (
            lambda: multi_step(torch.zeros(2, 3), Dynamics(256), dtype=torch.int8),
            ValueError,
            r"torch\.int8 cannot hold 255 exactly",
        ),
        (
            lambda: multi_step(torch.zeros(2, 3), Dynamics(4, True), dtype=torch.uint8),
            ValueError,
            r"torch\.uint8 cannot hold \+-3 exactly",
        ),
        (
            lambda: multi_step(torch.zeros(100, 3), Dynamics(4), output="count", dtype=torch.int8),
            ValueError,
            r"torch\.int8 cannot hold 300 exactly",
        ),
        (
            lambda: cupy_gif.macros(torch.float32, torch.float64),
            ValueError,
            r"write spikes as one of .*, got torch\.float64",
        ),
    ],
)
def test_bad_arguments(build: Build, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        build()
