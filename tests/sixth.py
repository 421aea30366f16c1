"""Sixth: add up what the stages of the encoder say of a pixel.

The least that a method needs: VARIANTS and `build`, see build_model in common.py.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from common import make_encoder, widened

VARIANTS = {"default": {}, "coarse": {"stages": ("res5",)}}


class Sixth(nn.Module):
    """Each stage is classified by a 1x1 convolution; the enlarged logits are added."""

    def __init__(self, trunk: nn.Module, stages: tuple[str, ...], num_classes: int):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({
            stage: nn.Conv2d(trunk.channels[stage], num_classes, 1)
            for stage in stages})

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": []}."""
        B, _, H, W = images.shape
        features, out = self.trunk(images), 0
        for stage, head in self.heads.items():
            logits = widened(head(features[stage]))
            out = out + F.interpolate(logits, (H, W), mode="bilinear")  # (B, K, H, W)
        return {"out": out, "aux": []}


def build(num_classes: int, *, backbone="resnet18", weights="none",
          stages=("res2", "res3", "res4", "res5")) -> nn.Module:
    """stages: which ones are asked."""
    trunk = make_encoder(backbone, num_classes, weights=weights)
    return Sixth(trunk, stages, num_classes)
