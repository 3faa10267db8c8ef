"""Optional packages: which extra brings them, and what is said when they are missing."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from equipoise import extras
from equipoise.errors import MissingExtraError

DISTRIBUTIONS = {
    "onnx_ir": "onnx-ir",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "pynvml": "nvidia-ml-py",
    "torch_pruning": "torch-pruning",
    "model_signing": "model-signing",
    "tomli_w": "tomli-w",
}


class NotInstalled:
    """A finder under which one package does not exist."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("module", extras.EXTRA_OF)
def test_the_named_extra_brings_the_package(repository: Path, module: str) -> None:
    """The line in the error installs what is missing: the table agrees with pyproject.toml."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extras.EXTRA_OF[module]]
    assert DISTRIBUTIONS.get(module, module) in {Requirement(line).name for line in lines}


def test_require_gives_the_module() -> None:
    """A submodule too."""
    assert extras.require("json.decoder").__name__ == "json.decoder"


@pytest.mark.parametrize(("module", "extra"), [("seqeval", "tune"), ("PIL.Image", "vision")])
def test_a_missing_package_is_an_error_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    """The package, the extra and the pip line are named; the cause is kept."""
    top = module.partition(".")[0]
    for name in [n for n in sys.modules if n.partition(".")[0] == top]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(top), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=f"'{top}'.*extra '{extra}'") as caught:
        extras.require(module)
    assert caught.value.hint == f'Install it with: pip install "equipoise[{extra}]"'
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_package_of_no_extra_names_all() -> None:
    """The extra that holds every other."""
    with pytest.raises(MissingExtraError, match="'no_such_package'") as caught:
        extras.require("no_such_package")
    assert "equipoise[all]" in caught.value.hint


def test_a_package_that_misses_another_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken installation says what it lacks, not what is there."""
    (tmp_path / "half_installed.py").write_text("import a_dependency_of_it")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_it"):
        extras.require("half_installed")


def test_installed_looks_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that fails on import is installed all the same."""
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert extras.installed("explosive")
    assert not extras.installed("no_such_package")
    assert not extras.installed("no_such_package.part")
