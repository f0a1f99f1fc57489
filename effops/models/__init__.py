"""The registry's models. Importing this package registers all of them.

Example:
    >>> list_models("vgnetg_1_?mp")
    ['vgnetg_1_0mp', 'vgnetg_1_5mp']
    >>> model = create_model("effnet_v2_svhn").eval()
    >>> twin = create_model("effnet_v2_svhn", reference=True).eval()
    >>> twin.load_state_dict(model.state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(1, 3, 32, 32)
    >>> torch.allclose(model(x), twin(x), atol=1e-5)
    True
"""

from effops.models import bsconv, effnet, mobilenetv2, multiception, nuts_and_bolts, vgnet
from effops.models.classifier import ImageClassifier, activation_factory
from effops.models.features import FeatureExtractor, FeatureInfo, Step
from effops.models.registry import create_model, is_model, list_models, register_model
from effops.models.weights import load_weights, save_weights

__all__ = [
    "FeatureExtractor",
    "FeatureInfo",
    "ImageClassifier",
    "Step",
    "activation_factory",
    "bsconv",
    "create_model",
    "effnet",
    "is_model",
    "list_models",
    "load_weights",
    "mobilenetv2",
    "multiception",
    "nuts_and_bolts",
    "register_model",
    "save_weights",
    "vgnet",
]
