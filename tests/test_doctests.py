"""Every public name has an example in its docstring, and it gives what it says, also on the reference backend."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import api_docs
import pytest
import torch
from conftest import require_backend

import effops
from effops.models import registry

MODULES = {module: names for _, modules in api_docs.PAGES.values() for module, names in modules.items()}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_PARSER = doctest.DocTestParser()


def _documented(module: str) -> Iterator[tuple[str, Any]]:
    """The module, its public names and their methods."""
    yield module, importlib.import_module(module)
    for name, value in api_docs.members(module, MODULES[module]).items():
        yield f"{module}.{name}", value
        if inspect.isclass(value):
            yield from ((f"{module}.{name}.{method}", body) for method, body in api_docs.methods(value))


def _examples(name: str, value: Any) -> doctest.DocTest:
    names: dict[str, Any] = {}
    exec(api_docs.PRELUDE, names)
    return _PARSER.get_doctest(inspect.getdoc(value) or "", names, name, name, 0)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_example(module: str) -> None:
    members = api_docs.members(module, MODULES[module]).items()
    assert not [name for name, value in members if not _examples(name, value).examples]


WITH_EXAMPLES = [module for module in MODULES if any(_examples(*place).examples for place in _documented(module))]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))  # an example adds a model
    if module == "effops.autograd":  # calls kernels by name
        require_backend("cpp")
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    for name, value in _documented(module):
        torch.manual_seed(0)
        with effops.use_backend(backend) if backend != "auto" else nullcontext():
            runner.run(_examples(name, value), out=report.append)
    assert runner.failures == 0, "".join(report)
