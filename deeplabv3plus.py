"""DeepLabv3+: enlarge the context by bilinear steps, and sharpen it with 1/4 features.

Liang-Chieh Chen, Yukun Zhu, George Papandreou, Florian Schroff, Hartwig Adam.
"Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation."
ECCV 2018. arXiv:1802.02611

The idea
    Dilation keeps the encoder's map at 1/16 or 1/8 so that less has to be restored;
    ASPP looks at it at five ranges. The decoder enlarges the result to 1/4, puts 48
    channels of early features beside it, which know where the edges are, and lets two
    3x3 convolutions decide. Simple, strong, and costly: all of it runs at 1/4.

Dimension key
    B batch   K classes   D channels of context and decoder (256; 512 in NRD's tables)
    L low-level channels (48)   H, W image size   h, w size of the context map
    q, r = ceil(H/4), ceil(W/4), the size of the low-level features

Paper -> code
    | Fig. 2            | DeepLabv3Plus.forward        | encoder, ASPP, decoder |
    | Sec. 3.1, decoder | DeepLabv3PlusDecoder.forward | up, concatenate, 3x3, 3x3 |
    | Sec. 3.1, encoder | build                        | output stride 16 or 8, rates |
    | Sec. 3.1, eq. (1) | atrous_convolution           | y_i = sum_k x_(i + r k) w_k |
    | Sec. 4.1, 48      | build                        | 1x1 to 48, [3x3, 256] twice |

Notes (paper says / official code does / we do / effect)
    N1  Width: ASPP and decoder 256, ASPP projected by 1x1 / the same; mmsegmentation,
        which NRD compares with, has 512 and projects by 3x3 / the paper's by default,
        `undilated` and `dilated` are mmsegmentation's / x2.4 of the decoder's GMACs.
    N2  Rates: 6, 12, 18 at output stride 16 and twice that at 8 / the same / 96 divided
        by the output stride, hence 3, 6, 9 without dilation, as NRD's rows have / none.
    N3  First 3x3 of a dilated stage: silent / half the dilation (multi-grid aside) / as
        torchvision does, see common.dilate_stage / costs are equal.
    N4  Dropout before the classifier: silent / 0.1 in mmsegmentation / 0.1 / unknown.
    N5  Auxiliary head: none / mmsegmentation has an FCN head on res4, weight 0.4 / with
        it, `aux=False` removes it / speeds up training from scratch.
    N6  Separable convolutions: in the final model / in ASPP and decoder / both, and
        `plain` has none / `plain` costs more and scores about the same (paper, Sec. 4).

Run
    python deeplabv3plus.py                    shapes and costs, seconds on a CPU
    python train.py --method deeplabv3plus     on procedural streets, minutes
    python train.py --method deeplabv3plus --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, Encoder, conv_bn_relu, fcn_heads, label_colours, published,
                    separable_conv, show, upsample, viewable)

# --- 1. Config -----------------------------------------------------------------------

MMSEG = {"channels": 512, "projection": 3}  # [N1]
VARIANTS = {
    "default": {},
    "os8": {"output_stride": 8},
    "plain": {"separable": False},  # [N6]
    # the rows that NRD compares with, in mmsegmentation's widths
    "undilated": MMSEG | {"output_stride": 32},  # NRD's Table 1
    "dilated-os16": MMSEG | {"output_stride": 16},
    "dilated": MMSEG | {"output_stride": 8},  # NRD's Table 5
}

FROM_SCRATCH = {}  # options of `build` in train.py's own recipes
PAPER = "paper, Sec. 4"
MMSEGMENTATION = "mmsegmentation's default; the paper's schedule is for VOC"
RECIPES = {
    "cityscapes": {
        "backbone": ("resnet50", MMSEGMENTATION), "weights": ("imagenet", PAPER),
        "lr": (0.01, MMSEGMENTATION), "weight_decay": (5e-4, MMSEGMENTATION),
        "crop": ((512, 1024), MMSEGMENTATION), "batch": (16, PAPER),
        "iterations": (84_000, "NRD, Table 1"), "warmup": (4000, "NRD, Table 3"),
        "momentum": (0.9, MMSEGMENTATION), "power": (0.9, PAPER),
        "min_lr": (1e-4, MMSEGMENTATION), "scale": ((0.5, 2.0), PAPER),
        "aux_weight": (0.4, MMSEGMENTATION)},  # [N5]
}

# The DeepLabv3+ paper counts Xception models; these rows stand in NRD's paper.
PUBLISHED = [
    published("NRD 1", "undilated", "resnet50c", (1024, 2048), 19, 290.6, decoder=76.4,
              rule="mmcv-sync", miou=78.9, trimap=49.8),
    published("NRD 5", "dilated", "resnet50c", (512, 512), 150, 177.5, rule="mmcv-sync",
              miou=43.95, miou_ms=44.93),
    published("NRD 5", "dilated", "resnet101c", (512, 512), 150, 255.1,
              rule="mmcv-sync", miou=45.47, miou_ms=46.35),
]

# --- 2. Equations --------------------------------------------------------------------


def atrous_convolution(x: Tensor, weight: Tensor, *, rate: int) -> Tensor:
    """Eq. (1): y_i = sum_k x_(i + rate * k) w_k, a kernel with holes.

    x (B, C, h, w), weight (D, C, 3, 3), zero outside the map -> (B, D, h, w). A 3x3
    kernel reaches `rate` positions far and still costs nine products. The twin that
    adds the nine shifted maps one by one is in tests/test_deeplabv3plus.py. The layers
    below say the same through nn.Conv2d(dilation=rate).
    """
    return F.conv2d(x, weight, padding=rate, dilation=rate)


def atrous_rates(output_stride: int) -> tuple[int, ...]:
    """Rates of ASPP that see the same stretch of the image at any stride.  [N2]"""
    return tuple(r * 32 // output_stride for r in (3, 6, 9))


# --- 3. Layers -----------------------------------------------------------------------


class DeepLabv3PlusDecoder(nn.Module):
    """Sec. 3.1: context up to 1/4, beside 48 low-level channels, two 3x3, classifier.

    The low-level features are reduced to 48 because they are many (256) and would
    outweigh the richer context in the concatenation.
    """

    def __init__(self, in_channels: int, low_channels: int, num_classes: int, *,
                 channels=256, reduced=48, separable=True, output_stride=32,
                 dropout=0.1):
        super().__init__()
        convolution = separable_conv if separable else conv_bn_relu
        self.factor, self.stride = output_stride // 4, 4
        self.reduce = conv_bn_relu(low_channels, reduced, 1)
        self.refine = nn.Sequential(*convolution(in_channels + reduced, channels),
                                    *convolution(channels, channels))
        self.classify = nn.Sequential(nn.Dropout2d(dropout),  # [N4]
                                      nn.Conv2d(channels, num_classes, 1))

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        B, D, h, w = context.shape
        low = self.reduce(features["res2"])  # (B, L, q, r)
        up = upsample(context, self.factor, low.shape[-2:])  # (B, D, q, r)
        both = torch.cat([up, low], dim=1)  # (B, D+L, q, r)
        return self.classify(self.refine(both))


# --- 4. Model ------------------------------------------------------------------------


class DeepLabv3Plus(nn.Module):
    """Fig. 2: (dilated) encoder, ASPP, decoder."""

    def __init__(self, encoder: Encoder, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder, self.context = encoder, context
        self.decoder, self.aux_heads = decoder, aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, H/16, W/16)]}."""
        B, _, H, W = images.shape
        features = self.encoder(images)
        context = self.context(features["res5"])  # (B, D, h, w)
        logits = self.decoder(context, features)  # (B, K, q, r)
        out = upsample(logits, self.decoder.stride, (H, W))  # (B, K, H, W)
        aux = [head(features["res4"]) for head in self.aux_heads if self.training]
        return {"out": out, "aux": aux}


def build(num_classes: int, *, backbone="resnet50", weights="none", channels=256,
          low_channels=48, output_stride=16, separable=True, projection=1,
          aux=True) -> DeepLabv3Plus:
    """DeepLabv3+ on a ResNet; VARIANTS names the rows that are compared.

    channels        width D of ASPP and decoder (256, Sec. 4)
    low_channels    width L of the reduced low-level features (48, Sec. 4.1)
    output_stride   32 undilated, 16 the paper's default, 8 the most accurate
    separable       depthwise separable convolutions in ASPP and decoder  [N6]
    projection      kernel of ASPP's last convolution  [N1]
    """
    encoder = Encoder(backbone, weights=weights, output_stride=output_stride)  # [N3]
    context = ASPP(encoder.channels["res5"], channels, separable=separable,
                   rates=atrous_rates(output_stride), projection=projection)
    decoder = DeepLabv3PlusDecoder(
        channels, encoder.channels["res2"], num_classes, channels=channels,
        reduced=low_channels, separable=separable, output_stride=output_stride)
    heads = fcn_heads(encoder, num_classes, aux)  # [N5]
    return DeepLabv3Plus(encoder, context, decoder, heads)


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: DeepLabv3Plus, image: Tensor, *, palette=None):
    """Fig. 2 from the model's own tensors: where context ends and edges begin.

    image (1, 3, H, W), normalised -> matplotlib Figure with the energy (mean square
    over channels) of the enlarged context, of the 48 low-level channels, and of what
    the two 3x3 convolutions make of both; and the labels.
    """
    from matplotlib.figure import Figure
    with torch.no_grad():
        features, decoder = model.encoder(image), model.decoder
        context = model.context(features["res5"])
        low = decoder.reduce(features["res2"])
        up = upsample(context, decoder.factor, low.shape[-2:])
        refined = decoder.refine(torch.cat([up, low], dim=1))
        labels = model(image)["out"][0].argmax(0)
    energy = lambda maps: maps[0].square().mean(0)
    colours = label_colours(palette, decoder.classify[1].out_channels)
    pictures = {"image": viewable(image[0]), "context, enlarged": energy(up),
                "low-level, 48 channels": energy(low), "refined": energy(refined),
                "labels": colours[labels]}
    figure = Figure(figsize=(14, 2.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(pictures)), pictures):
        show(axis, pictures[name], name)
    return figure


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through DeepLabv3+, and what each variant costs."""
    from evaluate import print_costs
    model = build(19, backbone="resnet18").eval()
    image = torch.randn(1, 3, 96, 160)
    features = model.encoder(image)
    context = model.context(features["res5"])
    logits = model.decoder(context, features)
    for name, x in {"image": image, **features, "context": context, "logits": logits,
                    "out": model(image)["out"]}.items():
        print(f"{name:<8} {tuple(x.shape)}")
    print_costs("deeplabv3plus", (1024, 2048))


if __name__ == "__main__":
    demo()
