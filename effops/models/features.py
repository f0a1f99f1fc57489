"""Feature maps of the image classifiers, in timm's words: `feature_info`, `out_indices`, `features_only`.

A classifier declares the parts of its `forward_features` once, as `Step`s. Stages follow from them: a stage ends with
the last map of each resolution. Its map is what the next part reads, so the last stage's is what `forward_features`
gives. There are no hooks: `run_stages` calls the parts one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from effops.models.classifier import ImageClassifier

__all__ = ["FeatureExtractor", "FeatureInfo", "Stage", "Step", "run_stages", "stages_of"]


class Step(NamedTuple):
    """A part of a network's features.

    `path` is the sub-module's, `channels` what it gives (None: nothing that counts as a map, such as a batch norm on
    the image), `stride` the factor by which it reduces height and width.

    Example:
        >>> effops.models.Step("features.stem", channels=32, stride=2)
        Step(path='features.stem', channels=32, stride=2)
    """

    path: str
    channels: int | None
    stride: int = 1


class Stage(NamedTuple):
    """Parts of one resolution: `paths` run one after another and give `channels` at 1/`reduction` of the image."""

    paths: tuple[str, ...]
    channels: int
    reduction: int


def stages_of(steps: Sequence[Step]) -> tuple[Stage, ...]:
    """Groups steps by resolution: a stage ends with the last map of its size."""
    stages: list[Stage] = []
    ahead: tuple[str, ...] = ()  # steps without a map go with the next one
    reduction = 1
    for path, channels, stride in steps:
        ahead += (path,)
        reduction *= stride
        if channels is None:
            continue
        if stages and stages[-1].reduction == reduction:
            ahead = stages.pop().paths + ahead
        stages.append(Stage(ahead, channels, reduction))
        ahead = ()
    return tuple(stages)


class FeatureInfo:
    """What the feature maps are: channels, reduction and the sub-module that gives each.

    The methods are timm's: without an index they are about the maps that `out_indices` selects, with one about that
    stage of the network.

    Args:
        stages: of the network.
        out_indices: which of them; negative ones count from the end. None for all.

    Raises:
        TypeError, ValueError: indices of a wrong kind, out of range, or twice.

    Example:
        >>> info = create_model("vgnetg_1_0mp").feature_info
        >>> info.channels(), info.reduction()
        ([28, 56, 112, 224, 368], [2, 4, 8, 16, 32])
        >>> info.module_name(1)
        'stages.0'
    """

    def __init__(self, stages: Sequence[Stage], out_indices: Sequence[int] | None = None) -> None:
        self.stages = tuple(stages)
        self.out_indices = _positions(out_indices, len(self.stages))

    def __len__(self) -> int:
        """The number of stages."""
        return len(self.stages)

    def channels(self, index: int | None = None) -> int | list[int]:
        """Channels of the maps, or of the map of one stage."""
        return self._each([stage.channels for stage in self.stages], index)

    def reduction(self, index: int | None = None) -> int | list[int]:
        """By which factor height and width are smaller than the image's (about, where convolutions have no padding)."""
        return self._each([stage.reduction for stage in self.stages], index)

    def module_name(self, index: int | None = None) -> str | list[str]:
        """The sub-modules that give the maps."""
        return self._each([stage.paths[-1] for stage in self.stages], index)

    def _each(self, values: list, index: int | None) -> object:
        return [values[i] for i in self.out_indices] if index is None else values[index]

    def __repr__(self) -> str:
        maps = ", ".join(f"{self.module_name(i)}: {self.channels(i)} / {self.reduction(i)}" for i in self.out_indices)
        return f"{type(self).__name__}({maps})"


def _positions(indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The indices of the maps, in the order in which the network gives them."""
    if indices is None:
        return tuple(range(count))
    if not isinstance(indices, (tuple, list)) or not indices:
        raise TypeError(f"out_indices must be a list of stages, got {indices!r}")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"out_indices must be ints, got {index!r}")
        if not -count <= index < count:
            raise ValueError(f"out_indices must be within the {count} stages ({-count} to {count - 1}), got {index}")
    positions = sorted(index % count for index in indices)
    if len(set(positions)) < len(positions):
        raise ValueError(f"out_indices must differ from each other, got {tuple(indices)}")
    return tuple(positions)


def run_stages(
    root: nn.Module, x: Tensor, stages: Sequence[Stage], wanted: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Runs stages one after another.

    Args:
        root: has the stages' sub-modules.
        x: the image.
        stages: to be run.
        wanted: of which the maps are kept.

    Returns:
        What the last stage gives, and the maps. A pair of VGNet's blocks counts as one map.
    """
    maps = []
    for index, stage in enumerate(stages):
        for path in stage.paths:
            x = root.get_submodule(path)(x)
        if index in wanted:
            maps.append(torch.cat(x, 1) if isinstance(x, tuple) else x)
    return x, maps


class FeatureExtractor(nn.Module):
    """The features of an image classifier: an image -> a list of maps, from fine to coarse.

    It has the classifier's own sub-modules, by their names, up to the last stage that is needed: parameters are shared,
    and `load_state_dict(classifier.state_dict(), strict=False)` loads a whole classifier's weights. Weights in another
    naming (of the papers' authors) go by the classifier: `create_model(name, pretrained=path, features_only=True)`.

    Args:
        model: the classifier.
        out_indices: stages of which the maps are given; negative ones count from the end. None for all.

    Attributes:
        feature_info: channels, reductions and sub-modules, a `FeatureInfo`.

    Shape:
        [N, in_channels, H, W] -> [N, channels, about H / reduction, W / reduction], one for each of out_indices.

    Raises:
        TypeError, ValueError: indices of a wrong kind, out of range, or twice.

    Example:
        >>> backbone = create_model("mobilenet_v2", features_only=True, out_indices=(1, 2, -1)).eval()
        >>> [tuple(y.shape) for y in backbone(torch.zeros(1, 3, 64, 64))]
        [(1, 24, 16, 16), (1, 32, 8, 8), (1, 1280, 2, 2)]
        >>> backbone.feature_info.channels(), backbone.feature_info.reduction()
        ([24, 32, 1280], [4, 8, 32])
    """

    def __init__(self, model: ImageClassifier, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.name = model.name
        self.feature_info = FeatureInfo(model.feature_info.stages, out_indices)
        self.training = model.training
        for stage in self._stages:
            for path in stage.paths:
                self._share(path, model.get_submodule(path))

    @property
    def _stages(self) -> tuple[Stage, ...]:
        return self.feature_info.stages[: self.feature_info.out_indices[-1] + 1]

    def _share(self, path: str, module: nn.Module) -> None:
        *parents, name = path.split(".")
        holder: nn.Module = self
        for parent in parents:
            if parent not in holder._modules:
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
            holder.training = self.training
        holder.add_module(name, module)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, in_channels, H, W] -> the maps."""
        return run_stages(self, x, self._stages, self.feature_info.out_indices)[1]
