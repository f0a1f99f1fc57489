"""Exports a trained network with effops operators to a package that C++ runs without Python.

    python examples/aotinductor/export.py --out build/aotinductor

writes model.pt2 (AOTInductor's package, any batch size), images.pt (photographs, preprocessed), logits.pt (what Python
computes for them) and labels.txt. The program of main.cpp runs them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

import effops
from effops import data

# The kernels a C++ process can load: those of the libraries. Triton's operators are Python.
BACKENDS = {"cpu": "cpp", "cuda": "cuda"}


def photographs(folder: Path | None, count: int) -> tuple[Tensor, list[str]]:
    """Some photographs, preprocessed, and the names of the classes."""
    source = data.open_source(folder)
    names = data.spread(source.names, count)
    return torch.stack([data.preprocess(source.read(name)) for name in names]), data.imagenet_labels(source)[0]


def export(model: nn.Module, images: Tensor, device: str) -> torch.export.ExportedProgram:
    """The model's graph for any batch size, with the operators of the device's kernels."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    with effops.use_backend(BACKENDS[device]), torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    found = Counter(str(node.target) for node in program.graph.nodes if str(node.target).startswith("effops."))
    if not found:
        raise RuntimeError("the exported graph holds no effops operator")
    for name, uses in found.items():
        print(f"{uses:3d} x {name}")
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default="mobilenet_v2", help="name of a model with trained weights")
    parser.add_argument("--images", type=Path, help="folder of photographs (default: as `effops run`)")
    parser.add_argument("--count", type=int, default=4, help="how many photographs, at least 2")
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cpu", help="what the package is for")
    args = parser.parse_args()
    if args.count < 2:
        parser.error(f"--count must be at least 2: a graph exported from one image is for one image, got {args.count}")

    images, labels = photographs(args.images, args.count)
    images = images.to(args.device)
    model = effops.create_model(args.model, pretrained=True).eval().to(args.device)
    program = export(model, images, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(args.out / "model.pt2"))
    with torch.no_grad():
        torch.save(model(images).cpu(), args.out / "logits.pt")
    torch.save(images.cpu(), args.out / "images.pt")
    (args.out / "labels.txt").write_text("\n".join(labels) + "\n")
    print(f"{args.out}: model.pt2, images.pt, logits.pt, labels.txt")


if __name__ == "__main__":
    main()
