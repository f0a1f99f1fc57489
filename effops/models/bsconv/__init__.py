"""The networks of "Rethinking Depthwise Separable Convolutions: How Intra-Kernel Correlations Lead to Improved
MobileNets" (Haase and Amthor, CVPR 2020, arXiv 2003.13549): blueprint separable convolutions (BSConv).

    layers.py       what they share: the drop-in rule, the base class, the keys of the authors' package
    resnet.py       ResNets and WideResNets for CIFAR, ResNets for ImageNet (Table 2, Figure 6)
    vgg.py          VGG-16 (Table 4)
    densenet.py     DenseNet-121 (Table 4)
    xception.py     Xception (Table 4)
    bottlenecks.py  networks of linear bottlenecks, which become BSConv-S ones by their loss alone (section 4.2):
                    mobilenetv2.py and mobilenetv3.py (Tables 1 and 3), efficientnet.py and mnasnet.py (Table 4)
    mobilenetv1.py  MobileNetV1 (Tables 1 and 3)

Importing this package registers them. A name without a suffix is the standard network; `_bsconvu` is the unconstrained
variant (section 3.3.1), `_bsconvs` the subspace variant (section 3.3.2), to be trained with `effops.orthonormal_loss`.
"""

from effops.models.bsconv import (
    bottlenecks,
    densenet,
    efficientnet,
    layers,
    mnasnet,
    mobilenetv1,
    mobilenetv2,
    mobilenetv3,
    resnet,
    vgg,
    xception,
)

__all__ = [
    "bottlenecks",
    "densenet",
    "efficientnet",
    "layers",
    "mnasnet",
    "mobilenetv1",
    "mobilenetv2",
    "mobilenetv3",
    "resnet",
    "vgg",
    "xception",
]
