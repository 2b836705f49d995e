"""Packages that are installed but cannot be loaded are hidden from transformers."""

from __future__ import annotations

import _ctypes
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snnllm import _compat

RAISES = "raise RuntimeError('operator torchvision::nms does not exist')\n"


@pytest.fixture
def package(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A package under a name of its own that takes the place of torchvision; importable."""
    folder = tmp_path / f"fake_vision_{abs(hash(request.node.name))}"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_compat, "_EXTENSIONS", {folder.name: "_C*.so"})
    monkeypatch.setitem(sys.modules, folder.name, None)  # restores the entry after the test
    del sys.modules[folder.name]
    return folder


def test_an_extension_that_does_not_load_hides_the_package(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (package / "__init__.py").write_text("")
    (package / "_C.so").write_bytes(b"no shared object")
    with caplog.at_level(logging.INFO, logger="snnllm"):
        assert _compat.hide_broken_packages() == (package.name,)
    assert f"{package.name} is installed but cannot be loaded, hidden: OSError" in caplog.text
    assert importlib.util.find_spec(package.name) is None
    with pytest.raises(ImportError):
        __import__(package.name)


def test_hiding_again_does_nothing(package: Path) -> None:
    (package / "__init__.py").write_text(RAISES)
    assert _compat.hide_broken_packages() == (package.name,)
    assert _compat.hide_broken_packages() == ()


def test_an_import_that_fails_hides_the_package_and_its_parts(package: Path) -> None:
    (package / "part.py").write_text("")
    (package / "__init__.py").write_text(f"from {package.name} import part\n{RAISES}")
    assert _compat.hide_broken_packages() == (package.name,)
    assert f"{package.name}.part" not in sys.modules


def test_a_working_extension_answers_without_an_import(package: Path) -> None:
    (package / "__init__.py").write_text(RAISES)  # would show if it were imported
    (package / "_C.so").symlink_to(_ctypes.__file__)
    assert _compat.hide_broken_packages() == ()
    assert package.name not in sys.modules
    assert importlib.util.find_spec(package.name) is not None


def test_a_working_package_without_an_extension_stays(package: Path) -> None:
    (package / "__init__.py").write_text("")
    assert _compat.hide_broken_packages() == ()
    assert sys.modules[package.name] is not None


def test_an_absent_package_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "_EXTENSIONS", {"fake_vision_absent": "_C*.so"})
    assert _compat.hide_broken_packages() == ()
    assert "fake_vision_absent" not in sys.modules


@pytest.mark.parametrize("name", ["transformers", "spikingjelly"])
def test_without_torch_hiding_waits_for_whoever_would_meet_the_package(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(_compat, "hide_broken_packages", lambda: calls.append(name))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    finders = [*sys.meta_path]
    for module in ("torch", "transformers", "spikingjelly"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    _compat.hide_in_time()
    importlib.util.find_spec("json.tool")
    assert not calls
    for _ in range(2):
        assert importlib.util.find_spec(name) is not None
    assert calls == [name]
    assert sys.meta_path == finders


def test_with_torch_packages_are_hidden_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(_compat, "hide_broken_packages", lambda: calls.append(True))
    monkeypatch.setitem(sys.modules, "torch", sys)
    _compat.hide_in_time()
    assert calls == [True]


@pytest.mark.parametrize(
    "before",
    ["", "import transformers.utils as u; u.is_torchvision_available()"],
    ids=["first", "after transformers"],
)
def test_llama_can_be_imported_beside_broken_packages(tmp_path: Path, before: str) -> None:
    for name, extension in (("torchvision", "_C.so"), ("torchaudio", "lib/_torchaudio.abi3.so")):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(RAISES)
        (tmp_path / name / extension).write_bytes(b"no shared object")
    code = f"{before}\nimport snnllm\nfrom transformers import LlamaForCausalLM\n"
    root = Path(_compat.__file__).parents[1]
    path = os.pathsep.join([str(tmp_path), str(root)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
