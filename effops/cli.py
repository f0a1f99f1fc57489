"""The command line: `effops <command>` and `python -m effops <command>`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import import_module


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _run_info(args: argparse.Namespace) -> int:
    from effops import info

    report = info.collect()
    print(json.dumps(report, indent=2) if args.json else info.text(report))
    return 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a registered model's name")
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 3, 224, 224], metavar=("N", "C", "H", "W"))
    parser.add_argument("--channels-last", action="store_true", help="run it in channels_last")


def _run_explain(args: argparse.Namespace) -> int:
    import torch

    import effops

    model = effops.create_model(args.model).eval()
    x = torch.randn(args.shape)
    if args.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    print(effops.explain(model, x))
    return 0


def _from(module: str, name: str) -> Callable:
    """A command's function that lives elsewhere, imported when it is used."""
    return lambda *args: getattr(import_module(module), name)(*args)


# name: (help, add its arguments to a parser, run it with the parsed arguments and return the exit status)
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "info": ("versions, CPU, backends and why not the others, environment", _add_info, _run_info),
    "list": (
        "the models, and with --counts what they cost and what their papers print",
        _from("effops.models.listing", "add_arguments"),
        _from("effops.models.listing", "main"),
    ),
    "run": (
        "photographs through two networks, stock and effops",
        _from("effops.run", "add_arguments"),
        _from("effops.run", "main"),
    ),
    "explain": ("which backend each layer of a model takes, and why", _add_explain, _run_explain),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="effops", description="Fused convolution chains of efficient CNNs for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (words, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=words, description=words))
    args = parser.parse_args(argv)
    return COMMANDS[args.command][2](args)
