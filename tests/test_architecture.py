"""The shape of the source tree: import direction, docstrings, prints, file sizes."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import snnllm

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("neurons", "snnllm", "sims")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LIBRARY_MODULES = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "sims"]
MAY_PRINT = ("snnllm/cli/", "snnllm/__main__.py")
MAX_LINES = 400

# neurons -> snnllm -> sims: what each package may not import. Exceptions: `snnllm simulate`
# (and `demo`) and `snnllm reproduce` are the command line's doors to the scripts, imported when the
# command runs.
REACHES_UP = {"snnllm/cli/simulate.py", "snnllm/cli/reproduction.py"}
FORBIDDEN = {"neurons": {"snnllm", "sims"}, "snnllm": {"sims"}, "sims": set[str]()}
NEURONS_MAY_IMPORT = {"neurons", "torch", "spikingjelly", *sys.stdlib_module_names}
# Optional, and imported when a kernel is launched only.
KERNELS_MAY_IMPORT = {"neurons/backends/": {"triton", "cupy"}}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level names of everything a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield relative(path).partition("/")[0] if node.level else str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                str(argument.value).partition(".")[0]
                for argument in node.args
                if isinstance(argument, ast.Constant)
            )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_in_one_direction(path: Path) -> None:
    package = relative(path).partition("/")[0]
    if relative(path) in REACHES_UP:
        return
    assert not FORBIDDEN[package] & set(imported_packages(path))


@pytest.mark.parametrize(
    "path", [path for path in MODULES if relative(path).startswith("neurons/")], ids=relative
)
def test_neurons_needs_torch_and_spikingjelly_only(path: Path) -> None:
    folder = f"{relative(path.parent)}/"
    assert set(imported_packages(path)) <= NEURONS_MAY_IMPORT | KERNELS_MAY_IMPORT.get(
        folder, set()
    )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", LIBRARY_MODULES, ids=relative)
def test_libraries_do_not_print(path: Path) -> None:
    if relative(path).startswith(MAY_PRINT):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [call.lineno for call in calls if ast.unparse(call.func) == "print"]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_stay_readable(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= MAX_LINES


def modules_after(code: str) -> set[str]:
    """Names of the modules loaded after the code ran in a fresh interpreter."""
    code += "\nimport sys\nprint('\\n'.join(k for k, v in sys.modules.items() if v is not None))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_importing_neurons_loads_no_llm_library_and_no_plots() -> None:
    names = [relative(path)[:-3].replace("/", ".") for path in MODULES]
    neurons = [n.removesuffix(".__init__") for n in names if n.startswith("neurons.")]
    loaded = modules_after("\n".join(f"import {name}" for name in neurons))
    assert "neurons" in loaded
    assert not loaded & {"transformers", "matplotlib", "snnllm", "sims", "cupy"}


def test_importing_snnllm_is_light() -> None:
    assert not modules_after("import snnllm") & HEAVY


# What a user waits for; a command that ends before it needs any of it answers at once.
HEAVY = {"torch", "transformers", "spikingjelly", "triton", "matplotlib", "torchvision", "lm_eval"}
TEXTS = ["--text", "pydoc:test", "--calibration", "pydoc:train"]
ANSWERS = {
    "help": ["--help"],
    "version": ["--version"],
    "no command": ["nothing"],
    **{
        f"{name} --help": [name, "--help"]
        for name in [
            "convert",
            "eval",
            "generate",
            "simulate",
            "inspect",
            "bench",
            "reproduce",
            "demo",
        ]
    },
    "option": ["convert", "model", "out", "--score", "x"],
    "preset": ["convert", "model", "out", "--preset", "int4"],
    "count": ["convert", "model", "out", "--nsamples", "0"],
    "text": ["convert", "model", "out", "--calibration", "no/such.txt"],
    "output": ["convert", "model", "snnllm"],
    "recipe": ["convert", "model", "out", "--pipeline", "rtn", "--recipe", "paper"],
    "budget": ["convert", "model", "out", "--pipeline", "gptq", "--mean-steps", "9"],
    "convert": ["convert", "no/such/model", "out"],
    "eval": ["eval", "no/such/model"],
    "generate": ["generate", "no/such/model", "Once"],
    "simulate": ["simulate", "no/such/model", "Once"],
    "inspect": ["inspect", "snnllm"],
    "bench": ["bench", "--model", "no/such/model"],
    "table": ["reproduce", "none"],
    "jobs": ["reproduce", "all", "--jobs", "0"],
    "number": ["reproduce", "all", "--limit", "0"],
    "text of rows": ["reproduce", "all", "--text", "no/such.txt"],
    "reproduce": ["reproduce", "all", "--model", "no/such/model", *TEXTS],
    "demo": ["demo", "--model", "no/such/model"],
}


@pytest.mark.parametrize("case", ANSWERS)
def test_help_and_simple_errors_load_nothing_heavy(case: str) -> None:
    code = f"""
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from snnllm.cli import main
error = StringIO()
with suppress(SystemExit), redirect_stdout(StringIO()), redirect_stderr(error):
    main({ANSWERS[case]!r})
assert ("error: " in error.getvalue()) == {not ANSWERS[case][-1].startswith("--")}, error.getvalue()
"""
    assert not modules_after(code) & HEAVY


@pytest.mark.parametrize("name", snnllm.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(snnllm, name) is not None
    assert name in dir(snnllm)


def test_no_public_name_is_shadowed_by_a_module() -> None:
    modules = {path.stem for path in (ROOT / "snnllm").iterdir()}
    assert not modules & set(snnllm.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        snnllm.nothing  # noqa: B018


def test_public_names_are_the_objects_of_their_modules() -> None:
    assert snnllm.load_text is importlib.import_module("snnllm.data").load_text
