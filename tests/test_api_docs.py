"""docs/api is what the docstrings say and has every public name; its links lead somewhere; arguments are documented."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import api_docs
import pytest
from torch.autograd import Function

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
        prose = re.sub(r"^```.*?^```|^    [^\n]*", "", text, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            path, _, anchor = target.partition("#")
            assert (FOLDER / path).is_file(), f"{file}: {target}"
            assert not anchor or f'<a id="{anchor}"></a>' in pages[path], f"{file}: {target}"


def _documented_arguments(value: Any) -> tuple[set[str], bool]:
    """The names in the section Args, or Attributes; and whether another docstring has the others."""
    _, *parts = api_docs.SECTION.split((inspect.getdoc(value) or "") + "\n")
    sections = dict(zip(parts[::3], parts[1::3], strict=True))
    entries = api_docs.entries(sections.get("Args") or sections.get("Attributes") or "")
    names = {name.strip(" *") for entry in entries for name in entry.partition(": ")[0].split(",")} - {""}
    return names - {"The others"}, "The others" in names


@pytest.mark.parametrize("value", MEMBERS)
def test_arguments_are_those_of_the_signature(value: Any) -> None:
    """Without a section, the text at least uses their names. `device` and `dtype` are explained with the modules."""
    function = inspect.isclass(value) and issubclass(value, Function)
    signature = inspect.signature(value.forward if function else value)
    taken = set(signature.parameters) - {"ctx", "device", "dtype"}
    if taken <= {"args", "kwargs"}:  # the signature does not tell
        return
    named, others = _documented_arguments(value)
    if not named and not others:
        named = taken & set(re.findall(r"\w+", inspect.getdoc(value) or ""))
    assert others or not taken - named, f"not in Args: {', '.join(sorted(taken - named))}"
    unknown = named - set(signature.parameters)
    assert not unknown, f"no arguments: {', '.join(sorted(unknown))}"
