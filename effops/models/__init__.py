"""The registry's models. Importing this package registers all of them."""

from effops.models import bsconv, effnet, mobilenetv2, multiception, nuts_and_bolts, vgnet
from effops.models.registry import create_model, is_model, list_models, register_model

__all__ = [
    "bsconv",
    "create_model",
    "effnet",
    "is_model",
    "list_models",
    "mobilenetv2",
    "multiception",
    "nuts_and_bolts",
    "register_model",
    "vgnet",
]
