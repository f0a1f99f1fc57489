"""VGG-16 with batch norms (arXiv 1409.1556), standard and as the BSConv paper's Table 4 has it (`vgg16_bn_bsconvu`).

The paper does not describe the head. Its "up to 8.5x less parameters" (section 5.3, 120 classes) fits an average pool
and one linear layer (14,784,696 against 1,746,744: 8.46x) and excludes VGG's three linear layers (1.11x); so that is
the head here. The convolutions have biases, as VGG's do; the blueprint's depthwise convolutions inherit them.

The state-dict keys of `features` in the standard form are torchvision's; a blueprint separable convolution has its
batch norm inside.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from effops.models.bsconv.layers import BlueprintClassifier, DropIn, conv_norm_act, register_drop_ins
from effops.models.classifier import activation_factory
from effops.models.features import Step

__all__ = ["VGG"]

# Channels of the convolutions between two max pools: configuration D of the paper.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(BlueprintClassifier):
    """VGG-16 with batch norms, an average pool and one linear layer.

    Args:
        layers: `effops.modules` or `effops.stock`.
        form: as in `DropIn`.
        num_classes: outputs of the classifier; 0 for none. Table 4 has 120 (Stanford Dogs).
        in_channels: of the input image.
        data_bn: as in `BlueprintClassifier`.

    Shape:
        [N, in_channels, H, W] -> [N, num_classes], H and W at least 32.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> standard, blueprint = (create_model(name, num_classes=120) for name in list_models("vgg16_bn*"))
        >>> [sum(p.numel() for p in model.parameters()) for model in (standard, blueprint)]
        [14784696, 1746744]
    """

    def __init__(
        self,
        layers: ModuleType,
        form: str = "standard",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        data_bn: bool = False,
    ) -> None:
        super().__init__(in_channels, data_bn)
        conv, act = DropIn(layers, form), activation_factory(layers, "relu")
        features: list[nn.Module] = []
        channels = in_channels
        for stage in _STAGES:
            for after in stage:
                unit = conv_norm_act(conv(channels, after, bias=True), after, act())
                made = list(unit) if isinstance(unit, nn.Sequential) else [unit]
                self.steps += (Step(f"features.{len(features) + index}", after) for index in range(len(made)))
                features += made
                channels = after
            self.steps.append(Step(f"features.{len(features)}", channels, 2))
            features.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*features)
        self._add_classifier(channels, num_classes)


register_drop_ins("vgg16_bn", VGG)
