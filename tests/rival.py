"""Smp: DeepLabV3Plus of segmentation_models_pytorch, another library, for `speed`.

Not installed with this one: pip install segmentation-models-pytorch, best into an
environment of its own. Copied beside the five as smp.py it is a method like them.
"""
import segmentation_models_pytorch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = {"default": {}}


class Smp(nn.Module):
    """The other library's network behind this one's contract."""

    def __init__(self, network: nn.Module, num_classes: int):
        super().__init__()
        self.network = network
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": []}."""
        H, W = images.shape[-2:]
        if H % 16 or W % 16:  # which it does not take
            images = F.pad(images, (0, -W % 16, 0, -H % 16))
        return {"out": self.network(images)[..., :H, :W], "aux": []}


def build(num_classes: int, *, backbone="resnet18", weights="none") -> nn.Module:
    """Their defaults: output stride 16, 256 channels, separable convolutions."""
    network = segmentation_models_pytorch.DeepLabV3Plus(
        encoder_name=backbone, encoder_weights=None, classes=num_classes)
    return Smp(network, num_classes)
