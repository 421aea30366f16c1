"""DeepLabv3+: enlarge the context by bilinear steps, and sharpen it with 1/4 features.

Liang-Chieh Chen, Yukun Zhu, George Papandreou, Florian Schroff, Hartwig Adam.
"Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation."
ECCV 2018. arXiv:1802.02611

The idea
    Dilation keeps the encoder's map at 1/16 or 1/8 of the image, so that less has to be
    restored. ASPP looks at this map at five ranges. The decoder enlarges the result to
    1/4 and puts 48 channels of early features beside it, which know where the edges
    are. Two 3x3 convolutions then decide. Simple and strong, but costly, because all of
    the decoder runs at 1/4.

Dimension key
    B batch   K classes   H, W image size
    h, w = ceil(H/16), ceil(W/16) by default: the coarse grid, of res5 and of context
    q, r = ceil(H/4), ceil(W/4): the finer grid, of the low-level features res2
    C channels that go into a layer   D channels that come out of it; above all, the
      width of context and decoder (256; 512 in NRD's tables)
    L channels to which the low-level features are reduced (48)

Paper -> code
    | Fig. 2            | DeepLabv3Plus.decode         | encoder, ASPP, decoder |
    | Fig. 2, last x4   | DeepLabv3Plus.to_pixels      | from 1/4 to the image's size |
    | Sec. 3.1, decoder | DeepLabv3PlusDecoder.forward | up, concatenate, 3x3, 3x3 |
    | Sec. 3.1, encoder | build                        | output stride 16 or 8 |
    | Sec. 3.1, Eq. (1) | atrous_convolution           | a kernel with holes |
    | Sec. 3.1, rates   | atrous_rates                 | 6, 12, 18 at output stride 16 |
    | Sec. 4.1, 48      | build                        | 1x1 to 48, [3x3, 256] twice |

Notes: what the paper says, what the official code does, what is done here, and what
it changes. "Code" is the authors' TensorFlow code or, where it is named,
mmsegmentation, in which NRD's authors ran the DeepLabv3+ that they compare with.
    N1  Width of ASPP and decoder.
        Paper: 256 channels in both. A 1x1 convolution projects the concatenated
               branches of ASPP.
        Code:  The same. mmsegmentation has 512 channels and projects by a 3x3.
        Here:  As the paper by default. The variants `undilated`, `dilated-os16` and
               `dilated` are mmsegmentation's; the options are `channels`, `projection`.
        Effect: The decoder costs 76.09 GMACs instead of 21.70 (1024x2048 pixels,
               ResNet-50, 19 classes, `python deeplabv3plus.py`). On scores: not
               measured.
    N2  Rates of ASPP.
        Paper: 6, 12 and 18 at output stride 16, and twice that at 8.
        Code:  The same.
        Here:  The same, as (3, 6, 9) times 32 / output stride. Without dilation that
               gives 3, 6 and 9, as in the rows that NRD prints.
        Effect: None: the paper's strides have the paper's rates.
    N3  Dilation of the first 3x3 convolution of a dilated stage.
        Paper: Silent.
        Code:  Half of the stage's dilation (where no multi-grid changes it), because
               this convolution still sees the grid of the stage before.
        Here:  The same; see `dilate_stage` in common.py.
        Effect: Costs are equal either way. On scores: not measured.
    N4  Dropout before the classifier.
        Paper: Silent.
        Code:  mmsegmentation has 0.1.
        Here:  0.1.
        Effect: Not measured.
    N5  Auxiliary head.
        Paper: None.
        Code:  mmsegmentation has an FCN head on res4, whose loss has the weight 0.4.
        Here:  As mmsegmentation. `aux=False` removes the head.
        Effect: It gives the early layers a short way to a loss, which should help a
               network that starts from scratch. Not measured.
    N6  Separable convolutions in ASPP and decoder.
        Paper: The final model has them. Sec. 4: without them it costs more and scores
               about the same.
        Code:  The same.
        Here:  The same; `separable=False` is the variant `plain`.
        Effect: The decoder of `plain` costs 171.36 GMACs instead of 21.70 (as in N1).
               At 513x513 it costs 21.76, and the difference that the decoder makes in
               Table 3 of the paper (ResNet-101, no separable convolutions) is 20.26
               to 21.77, depending on the output stride. On scores: not measured.
    N7  Initialisation of ASPP and decoder.
        Paper: Silent.
        Code:  mmsegmentation starts convolutions with a batch norm from Kaiming normal
               with fan_out.
        Here:  torch's default.
        Effect: Before a batch norm the scale of weights does not change the function,
               but how fast they turn under SGD: the larger, the slower, by the square.
               mmsegmentation's standard deviation divided by ours, in its ASPP of 512
               channels on a ResNet-50, is 4.9 for the 1x1, 5.5 for the 3x3 projection
               and 0.05 for the depthwise convolutions (measured). On scores: not
               measured.

Run
    python deeplabv3plus.py                    shapes and costs, seconds on a CPU
    python train.py --method deeplabv3plus     on procedural streets, minutes
    python train.py --method deeplabv3plus --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, Encoder, conv_bn_relu, fcn_heads, label_colours, print_costs,
                    separable_conv, show, upsample, viewable)

# --- 1. Config -----------------------------------------------------------------------

MMSEG = {"channels": 512, "projection": 3}  # [N1]
VARIANTS = {
    "default": {},
    "os8": {"output_stride": 8},
    "plain": {"separable": False},  # [N6]
    # mmsegmentation's widths, as in the rows that NRD compares with. What is published
    # of them stands in results/published.csv.
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

# --- 2. Equations --------------------------------------------------------------------


def atrous_convolution(x: Tensor, weight: Tensor, *, rate: int) -> Tensor:
    """Eq. (1): y_i = sum_k x_(i + rate * k) w_k, a kernel with holes.

    x (B, C, h, w), weight (D, C, 3, 3), zero outside the map -> (B, D, h, w). A 3x3
    kernel reaches `rate` positions far and still costs nine products. The literal twin,
    `atrous_slowly` in tests/test_deeplabv3plus.py, adds nine shifted maps one by one.
    Encoder and ASPP (common.py) have the same convolution as nn.Conv2d(dilation=rate).
    """
    return F.conv2d(x, weight, padding=rate, dilation=rate)


def atrous_rates(output_stride: int) -> tuple[int, ...]:
    """Rates of ASPP that see the same stretch of the image at any stride.  [N2]"""
    return tuple(rate * 32 // output_stride for rate in (3, 6, 9))


# --- 3. Layers -----------------------------------------------------------------------


class DeepLabv3PlusDecoder(nn.Module):
    """Sec. 3.1: context up to 1/4, beside 48 low-level channels, two 3x3, classifier.

    The low-level features of a ResNet-50 have 256 channels, as many as the context. If
    all of them were concatenated they could outweigh the context, which knows more,
    and training would be harder. Hence the 1x1 that reduces them to 48.
    """

    def __init__(self, in_channels: int, low_channels: int, num_classes: int, *,
                 channels=256, reduced=48, separable=True, output_stride=32,
                 dropout=0.1):
        super().__init__()
        convolution = separable_conv if separable else conv_bn_relu  # [N6] [N7]
        self.stride = 4  # of res2, on whose grid the decoder works
        self.factor = output_stride // self.stride  # from context to there
        self.reduce = conv_bn_relu(low_channels, reduced, 1)
        self.refine = nn.Sequential(*convolution(in_channels + reduced, channels),
                                    *convolution(channels, channels))
        self.classify = nn.Sequential(nn.Dropout2d(dropout),  # [N4]
                                      nn.Conv2d(channels, num_classes, 1))

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        B, D, h, w = context.shape
        low = self.reduce(features["res2"])  # (B, L, q, r)
        # At sizes that the strides do not divide, the enlarged context has up to
        # factor - 1 rows and columns more than res2. They lie beyond the image.
        up = upsample(context, self.factor, low.shape[-2:])  # (B, D, q, r)
        both = torch.cat([up, low], dim=1)  # (B, D+L, q, r)
        return self.classify(self.refine(both))


# --- 4. Model ------------------------------------------------------------------------


class DeepLabv3Plus(nn.Module):
    """Fig. 2: (dilated) encoder, ASPP, decoder."""

    def __init__(self, encoder: Encoder, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.decoder = decoder
        self.aux_heads = aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, H/16, W/16)]}."""
        logits, aux = self.decode(images)
        return {"out": self.to_pixels(logits, images.shape[-2:]), "aux": aux}

    def decode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) -> logits (B, K, q, r), auxiliary logits."""
        features = self.encoder(images)
        context = self.context(features["res5"])  # (B, D, h, w)
        logits = self.decoder(context, features)  # (B, K, q, r)
        aux = [head(features["res4"]) for head in self.aux_heads if self.training]
        return logits, aux

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """The last bilinear step (x4): logits (B, K, H, W) of the size = (H, W) pixels.

        With rows = (lo, hi), those of the rows lo..hi-1 alone, (B, K, hi - lo, W).
        """
        return upsample(logits, self.decoder.stride, size, rows)


def build(num_classes: int, *, backbone="resnet50", weights="none", channels=256,
          low_channels=48, output_stride=16, separable=True, projection=1,
          aux=True) -> DeepLabv3Plus:
    """DeepLabv3+ on a ResNet; VARIANTS names the rows that are compared.

    channels        D, width of ASPP and decoder (256, Sec. 4)
    low_channels    L, width of the reduced low-level features (48, Sec. 4.1)
    output_stride   32 undilated, 16 the paper's default, 8 the most accurate
    separable       depthwise separable convolutions in ASPP and decoder  [N6]
    projection      kernel of ASPP's last convolution  [N1]
    aux             train with an auxiliary head on res4  [N5]
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

    image (1, 3, H, W), normalised -> matplotlib Figure. It shows the energy (mean
    square over channels) of the enlarged context, of the 48 low-level channels, and of
    what the two 3x3 convolutions make of both; and last the predicted labels.
    """
    from matplotlib.figure import Figure
    decoder = model.decoder
    with torch.no_grad():
        features = model.encoder(image)
        context = model.context(features["res5"])
        low = decoder.reduce(features["res2"])
        up = upsample(context, decoder.factor, low.shape[-2:])
        refined = decoder.refine(torch.cat([up, low], dim=1))
        labels = model(image)["out"][0].argmax(0)
    energy = lambda maps: maps[0].square().mean(0)  # many channels -> one picture
    classifier = decoder.classify[-1]
    colours = label_colours(palette, classifier.out_channels)
    pictures = {"image": viewable(image[0]),
                "context, enlarged": energy(up),
                f"low-level, {low.shape[1]} channels": energy(low),
                "refined": energy(refined),
                "labels": colours[labels]}
    figure = Figure(figsize=(14, 2.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(pictures)), pictures):
        show(axis, pictures[name], name)
    return figure


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through DeepLabv3+, and what each variant costs."""
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
