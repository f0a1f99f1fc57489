"""Weights in files: safetensors written and read, torch's own .pth read."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import effops

__all__ = ["Weights", "load_into", "load_weights", "read_weights", "save_weights"]

_SUFFIX = ".safetensors"
# Of torch's message about a state dict that does not fit: it may name hundreds of keys.
_LINES, _CHARACTERS = 4, 240


class Weights(NamedTuple):
    """A state dict, and what the file says about it."""

    state: dict[str, Tensor]
    metadata: dict[str, str]


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's state dict as safetensors, with the model's name and the version of effops.

    The file is complete or not there: it is written beside its place and then renamed.

    Args:
        model: from `create_model`; any module does, which then has no name.
        path: ends in ".safetensors".

    Raises:
        ValueError: another suffix.
        RuntimeError: safetensors is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/digits.safetensors"
        ...     effops.models.save_weights(create_model("mnist_7k_dw", num_classes=3), path)
        ...     model = create_model("mnist_7k_dw", pretrained=path)
        >>> model.num_classes
        3
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"the weights' file must end in {_SUFFIX}, got {path}")
    # Copies: safetensors takes neither shared memory nor channels_last.
    state = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    metadata = {"effops.model": getattr(model, "name", ""), "effops.version": effops.__version__, "format": "pt"}
    _write(path, _safetensors().torch.save(state, metadata))


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Loads weights from a file into a model.

    Args:
        model: takes them, in its own device and dtype.
        path: a safetensors file (".safetensors"), or one of `torch.save` with a state dict, which is read with
            weights_only=True.
        strict: the file has exactly the model's keys; False ignores others and leaves out missing ones, as
            `load_state_dict` does: what a `FeatureExtractor` needs for a whole classifier's file.

    Raises:
        RuntimeError: the file is missing, damaged, no state dict or does not fit; or safetensors is not installed.

    Example:
        >>> import tempfile
        >>> model, backbone = create_model("mnist_7k_dw"), create_model("mnist_7k_dw", features_only=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/digits.pth"
        ...     torch.save(model.state_dict(), path)
        ...     effops.models.load_weights(backbone, path, strict=False)
        >>> torch.equal(backbone.features.conv1.conv.weight, model.features.conv1.conv.weight)
        True
    """
    load_into(model, read_weights(path), f"{getattr(model, 'name', '') or type(model).__name__!r}", strict=strict)


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads a file as `load_weights` does, onto the CPU.

    Raises:
        RuntimeError: the file is missing, damaged or no state dict; or safetensors is not installed.
    """
    path = Path(path)
    library = _safetensors() if path.suffix == _SUFFIX else None
    if not path.exists():
        raise RuntimeError(f"the weights file {path} does not exist")
    try:
        if library is None:
            weights = Weights(torch.load(path, map_location="cpu", weights_only=True), {})
        else:
            with library.safe_open(path, framework="pt") as file:
                weights = Weights({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # whatever the unpickler, the zip reader or safetensors met
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"the weights file {path} cannot be read as a state dict: {reason}") from error
    state = weights.state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RuntimeError(f"the weights file {path} holds {type(state).__name__}, not a state dict of tensors")
    return Weights(dict(state), weights.metadata)


def load_into(model: nn.Module, weights: Weights, what: str, *, strict: bool = True) -> None:
    """`model.load_state_dict` with an error that says `what` the weights do not fit, in a few lines.

    Raises:
        RuntimeError: they do not fit; if not `strict`, no key does or a shape differs.
    """
    origin = weights.metadata.get("effops.model")
    saved = f" (the file was saved from {origin!r})" if origin else ""
    try:
        missing = model.load_state_dict(weights.state, strict=strict).missing_keys
    except RuntimeError as error:
        raise RuntimeError(f"the weights do not fit {what}{saved}: {_shortened(str(error))}") from error
    if missing and len(missing) == len(model.state_dict()):
        raise RuntimeError(f"the weights do not fit {what}{saved}: they have none of its keys, such as {missing[0]!r}")


def _shortened(message: str) -> str:
    lines = [line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]} ..." for line in message.splitlines()]
    more = [f"and {len(lines) - _LINES} lines more"] if len(lines) > _LINES else []
    return "\n".join(lines[:_LINES] + more)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError("safetensors is not installed: pip install safetensors") from error
    return safetensors
