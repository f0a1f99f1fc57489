"""docs/api, the API reference, from the docstrings: `make docs`. Google's sections in, Markdown out."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn
from torch.autograd import Function

import effops
from effops.models import registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.operators import OPERATORS  # noqa: E402 (the benchmarks are no part of the installed package)

# What every example presupposes; tests/test_doctests.py runs them with these names and no others.
PRELUDE = """\
import torch
import torch.nn.functional as F
from torch import nn

import effops
import effops.functional as EF
from effops import create_model, list_models
"""
_MODELS = (
    "vgnet", "mobilenetv2", "effnet", "multiception", "nuts_and_bolts",
    "bsconv", "bsconv.mobilenetv1", "bsconv.mobilenetv2", "bsconv.mobilenetv3", "bsconv.efficientnet", "bsconv.mnasnet",
    "bsconv.resnet", "bsconv.vgg", "bsconv.densenet", "bsconv.xception",
)  # fmt: skip
# Title and modules of each page. Of a module come its docstring and the names given here, or all in its `__all__`.
PAGES = {
    "functional.md": ("Functions", {"effops.functional": (), "effops.ops.dwconv.banks": ("NamedBank", "bank")}),
    "modules.md": ("Modules", {"effops.modules": ()}),
    "models.md": (
        "Models",
        {
            "effops.models": (),
            **dict.fromkeys(map("effops.models.{}".format, _MODELS), ()),
            "effops.models.bsconv.bottlenecks": ("BottleneckClassifier",),
            "effops.models.bsconv.layers": ("BlueprintClassifier", "DropIn", "bsconv_key_map"),
            "effops.models.flops": (),
        },
    ),
    "backends.md": ("Backends", {"effops.backends": (), "effops.info": ()}),
    "autograd.md": ("Autograd functions", {"effops.autograd": ()}),
}
_WRITTEN = "Written by `make docs` from the docstrings, not by hand."
_NAME = re.compile(r"`(?:\w+\.)*(\w*[A-Z_]\w*)`")  # not plain words: those are parameters
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")
SECTION = re.compile(r"^([A-Z][A-Za-z ]+):\n((?:    .*\n|\n)+)", re.MULTILINE)


def members(module: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The documented objects of a module by name, sorted; modules among them are sections of their own."""
    found = importlib.import_module(module)
    values = {name: getattr(found, name) for name in sorted(names or found.__all__)}
    return {name: value for name, value in values.items() if not inspect.ismodule(value)}


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class, or a base that is not public, documents."""
    for base in cls.__mro__ if not issubclass(cls, Function) else ():
        if base.__module__.startswith("effops.") and (base is cls or base.__name__ not in _LINKS):
            for name, value in vars(base).items():
                documented = isinstance(value, (property, classmethod, FunctionType)) and value.__doc__
                if documented and not name.startswith("_") and inspect.getattr_static(cls, name) is value:
                    yield name, getattr(value, "__func__", value)


def _links() -> dict[str, str]:
    """Where each public name is documented, but those that several modules have."""
    found: dict[str, str] = {}
    for file, (_, modules) in PAGES.items():
        for module, names in modules.items():
            for name in members(module, names):
                found[name] = "" if name in found else f"{file}#{module}.{name}"
    return found


_LINKS = _links()


def _linked(prose: str) -> str:
    """The prose with links on the public names in backquotes; the lines of code blocks stay."""

    def link(match: re.Match[str]) -> str:
        place = _LINKS.get(match[1])
        return f"[{match[0]}]({place})" if place else match[0]

    return "\n".join(line if line.startswith("    ") else _NAME.sub(link, line) for line in prose.split("\n"))


def entries(body: str) -> list[str]:
    """Those of a section such as Args, each in one line."""
    return [" ".join(entry.split()) for entry in re.split(r"\n(?=\S)", textwrap.dedent(body).strip())]


def _entry(text: str) -> str:
    match = _ENTRY.fullmatch(text)
    return f"* `{match[1].replace(', ', '`, `')}`: {_linked(match[2])}" if match else f"* {_linked(text)}"


def _section(title: str, body: str) -> str:
    if title == "Example":
        return f"**Example**\n\n```pycon\n{textwrap.dedent(body).strip()}\n```"
    if title in ("Returns", "Shape"):
        return f"**{title}**\n\n{_linked(textwrap.dedent(body).strip())}"
    return f"**{title}**\n\n" + "\n".join(map(_entry, entries(body)))


def markdown(value: Any) -> str:
    """The docstring of a module, class or function."""
    text, *parts = SECTION.split((inspect.getdoc(value) or "") + "\n")
    rendered = [_linked(text.strip())]
    for title, body, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        rendered += [_section(title, body), _linked(text.strip())]
    return "\n\n".join(filter(None, rendered)) + "\n"


def signature(name: str, value: Any) -> str:
    """The call as Python writes it, in one line where it is short."""
    if getattr(value, "__init__", None) is nn.Module.__init__:
        return f"```python\n{name}()\n```\n"
    found = inspect.signature(getattr(value, "fget", value))
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    returns = found.empty if inspect.isclass(value) else found.return_annotation
    text = str(found.replace(parameters=parameters, return_annotation=returns))
    text = re.sub(r"ForwardRef\(('.*?')[^)]*\)", r"\1", text)
    text = re.sub(r"(: |-> )'(.*?)'", r"\1\2", text)  # annotations are strings
    text = text.replace("() -> ", ": ") if isinstance(value, property) else text
    text = re.sub(r"<class 'torch\.nn\.[\w.]*\.(\w+)'>", r"nn.\1", text)
    if len(text) > 100:
        inside, end = text[1:].rsplit(")", 1)
        text = "(\n    " + re.sub(r", (?=\*|\w+: )", ",\n    ", inside) + f",\n){end}"
    return f"```python\n{name}{text}\n```\n"


def _member(module: str, name: str, value: Any) -> Iterator[str]:
    yield f'<a id="{module}.{name}"></a>\n\n### {name}\n'
    function = inspect.isclass(value) and issubclass(value, Function)  # its docstring says how to call it
    yield ("" if function else signature(name, value) + "\n") + markdown(value)
    for method, body in methods(value) if inspect.isclass(value) else ():
        yield f"#### {name}.{method}\n\n{signature(method, body)}\n{markdown(body)}"
    source = Path(inspect.getsourcefile(inspect.unwrap(value)))
    path = source.relative_to(Path(effops.__file__).parent.parent).as_posix()
    yield f"Source: [{path}](../../{path})\n"


def _registered(module: str) -> str:
    """The names that a module has given the registry of models."""
    builders = {name: entry.builder for name, entry in registry._MODELS.items()}
    names = [name for name in sorted(builders) if getattr(builders[name], "func", builders[name]).__module__ == module]
    return f"Registered: {', '.join(f'`{name}`' for name in names)}.\n" if names else ""


def _page(title: str, modules: dict[str, tuple[str, ...]]) -> str:
    parts = [f"# {title}\n", f"{_WRITTEN} All pages: [README.md](README.md).\n"]
    for module, names in modules.items():
        parts += [f"## {module}\n", markdown(importlib.import_module(module)), *filter(None, [_registered(module)])]
        for name, value in members(module, names).items():
            parts += _member(module, name, value)
    return "\n".join(parts)


def _index() -> str:
    """README.md of the reference: the operators, then every name page by page."""
    rooms = pages = ""
    for operator in OPERATORS:
        kinds = (operator.functions, operator.modules, operator.autograd)
        cells = (_linked(", ".join(f"`{name}`" for name in names)) or "-" for names in kinds)
        rooms += f"| `{operator.op}`: {operator.what} | {' | '.join(cells)} |\n"
    for file, (title, modules) in PAGES.items():
        pages += f"\n## [{title}]({file})\n\n"
        for module, names in modules.items():
            linked = ", ".join(f"[`{name}`]({file}#{module}.{name})" for name in members(module, names))
            pages += f"* `{module}`: {linked}\n" if linked else ""
    return (
        f"# API reference\n\n{_WRITTEN} The examples are run by the tests; they presuppose\n\n"
        f"```python\n{PRELUDE}```\n\n## Operators\n\n"
        f"| operator | functions | modules | autograd functions |\n|---|---|---|---|\n{rooms}{pages}"
    )


def texts() -> dict[str, str]:
    """The files of docs/api by name."""
    return {"README.md": _index()} | {file: _page(*page) for file, page in PAGES.items()}


def main() -> None:
    for file, text in texts().items():
        (Path(sys.argv[1]) / file).write_text(text)


if __name__ == "__main__":
    main()
