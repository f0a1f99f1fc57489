"""What the image classifiers of the registry have in common, in timm's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from effops.models.features import FeatureInfo, Step, run_stages, stages_of
from effops.modules._arguments import ActivationLike, make_activation

__all__ = ["ImageClassifier", "activation_factory"]

# Where torch has an in-place form the stock twin should use it, as timm and torchvision do; fused kernels do not care.
_INPLACE = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
}


def activation_factory(layers: ModuleType, act: ActivationLike) -> Callable[[], nn.Module]:
    """What makes the activation modules of a network: in place in the stock twin.

    Args:
        layers: `effops.modules` or `effops.stock`.
        act: an activation's name, a module or a module class.

    Raises:
        TypeError, ValueError: not an activation.

    Example:
        >>> effops.models.activation_factory(effops.stock, "relu6")()
        ReLU6(inplace=True)
    """
    if layers.__name__ == "effops.stock" and isinstance(act, str) and act in _INPLACE:
        return partial(_INPLACE[act], inplace=True)
    return partial(make_activation, "model", "act", act)


class ImageClassifier(nn.Module):
    """Features, global average pool, classifier.

    Subclasses define `forward_features` and set `num_features`, `num_classes`, `classifier` and `steps`: the parts that
    `forward_features` runs one after another. `register_model` shows one.

    Example:
        >>> model = create_model("vgnetg_1_0mp", num_classes=0).eval()
        >>> isinstance(model, effops.models.ImageClassifier), model(torch.zeros(1, 3, 64, 64)).shape
        (True, torch.Size([1, 368]))
        >>> model.reset_classifier(5)
        >>> model.forward_head(model.forward_features(torch.zeros(1, 3, 64, 64))).shape
        torch.Size([1, 5])
    """

    name: str = ""  # in the registry; `create_model` sets it
    num_features: int
    num_classes: int
    classifier: nn.Module
    steps: Sequence[Step]

    @property
    def feature_info(self) -> FeatureInfo:
        """The stages' feature maps: channels, reductions, sub-modules."""
        return FeatureInfo(stages_of(self.steps))

    @property
    def head_hidden_size(self) -> int:
        """The classifier's inputs: the pooled features. (timm's word for it.)"""
        return self.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_features, h, w]."""
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The features and the stages' maps, as timm gives them; all stages run.

        Args:
            x: [N, in_channels, H, W].
            indices: stages of which the maps are given; negative ones count from the end. None for all.
            intermediates_only: the maps alone.

        Returns:
            (what `forward_features` gives, the maps), or the maps.

        Raises:
            TypeError, ValueError: indices of a wrong kind, out of range, or twice.

        Example:
            >>> model = create_model("vgnetg_1_0mp").eval()
            >>> features, (first, last) = model.forward_intermediates(torch.zeros(1, 3, 64, 64), (0, -1))
            >>> tuple(first.shape), tuple(last.shape), last is features
            ((1, 28, 32, 32), (1, 368, 2, 2), True)
        """
        info = FeatureInfo(stages_of(self.steps), indices)
        x, maps = run_stages(self, x, info.stages, info.out_indices)
        return maps if intermediates_only else (x, maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, h, w] -> [N, num_classes], or the pooled features [N, num_features] with `pre_logits`."""
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer (nn.Identity where num_classes is 0)."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new, untrained one; with 0 classes the model gives pooled features."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an int, got {num_classes!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        parameter = next(self.parameters())
        self.num_classes = num_classes
        self._set_classifier(
            nn.Linear(self.head_hidden_size, num_classes, device=parameter.device, dtype=parameter.dtype)
            if num_classes
            else nn.Identity()
        )

    def _set_classifier(self, head: nn.Module) -> None:
        self.classifier = head
