"""docs/api: written from the docstrings as they are, with every public name, its arguments and links that lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import api_docs
import pytest
from torch.autograd import Function

import effops

FOLDER = api_docs.ROOT / "docs" / "api"
PUBLIC = ("effops", "effops.functional", "effops.modules", "effops.models", "effops.autograd", "effops.backends")
MEMBERS = [
    pytest.param(value, id=f"{module}.{name}")
    for _, modules in api_docs.PAGES.values()
    for module, names in modules.items()
    for name, value in api_docs.members(module, names).items()
]


def test_the_pages_are_what_the_docstrings_say() -> None:
    written = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    assert written == api_docs.texts(), "docs/api is not what the docstrings say: make docs"


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_a_page(package: str) -> None:
    pages = "".join(path.read_text() for path in FOLDER.glob("*.md"))
    shown = set(re.findall(r'^<a id="[\w.]+\.(\w+)"></a>$', pages, re.MULTILINE))
    shown |= set(re.findall(r"^## ([\w.]+)$", pages, re.MULTILINE))
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__"}:
        value = getattr(module, name)
        assert (value.__name__ if inspect.ismodule(value) else name) in shown, f"{package}.{name} is in no page"


def test_links_lead_to_a_page_and_a_place_in_it() -> None:
    pages = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    for file, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|^    .*$", "", text, flags=re.DOTALL | re.M)):
            path, _, anchor = target.partition("#")
            assert (FOLDER / path).is_file(), f"{file}: {target}"
            assert not anchor or f'<a id="{anchor}"></a>' in pages[path], f"{file}: {target}"


def _documented_arguments(value: Any) -> tuple[set[str], bool]:
    """The names in the section Args, or Attributes; and whether it refers to another docstring for others."""
    sections = api_docs.SECTION.split((inspect.getdoc(value) or "") + "\n")
    body = "".join(
        text for title, text in zip(sections[1::3], sections[2::3], strict=True) if title in ("Args", "Attributes")
    )
    found = {
        name.strip(" *")
        for names in re.findall(r"^(?:\S.*?; )?((?:\*{0,2}\w+(?:, )?)+): ", textwrap.dedent(body), re.MULTILINE)
        for name in names.split(",")
    }
    return found, "\n    The others: as " in "\n" + body


@pytest.mark.parametrize("value", MEMBERS)
def test_arguments_are_those_of_the_signature(value: Any) -> None:
    if inspect.isclass(value) and issubclass(value, Function):
        call = value.forward
    else:
        call = value
    taken = set(inspect.signature(call).parameters) - {"ctx", "args", "device", "dtype"}
    named, others = _documented_arguments(value)
    assert others or not taken - named, f"not in Args: {', '.join(sorted(taken - named))}"
    assert not named - taken - {"device", "dtype"}, f"no arguments: {', '.join(sorted(named - taken))}"
