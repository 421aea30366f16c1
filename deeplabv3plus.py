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
    | Sec. 3.2, Fig. 4  | Xception                     | --backbone xception65 [N10] |
    | Sec. 3.1, Eq. (1) | atrous_convolution           | a kernel with holes |
    | Fig. 2, rates     | atrous_rates                 | 6, 12, 18 at output stride 16 |
    | Sec. 4.1, Table 1 | build, low_channels          | 1x1 to 48 channels |
    | Sec. 4.1, Table 2 | build, refine                | [3x3, 256] twice |
    | Table 2, Conv3    | TwoLevelDecoder              | res3 on the way, too |
    | Table 3           | CoarseClassifier             | the rival without a decoder |
    | Table 7           | build, image_level           | ASPP with its average or not |

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
               ResNet-50, 19 classes, `evaluate.py cost deeplabv3plus`). On scores: not
               measured.
    N2  Rates of ASPP.
        Paper: Fig. 2: 6, 12 and 18, which are those of output stride 16. That they
               double at 8 is said in DeepLabv3's paper (arXiv:1706.05587).
        Code:  The same.
        Here:  The same, as (3, 6, 9) times 32 / output stride. Without dilation that
               gives 3, 6 and 9, as in the rows that NRD prints.
        Effect: None: the paper's strides have the paper's rates.
    N3  Dilation of the first 3x3 convolution of a dilated stage.
        Paper: Silent.
        Code:  A ResNet has its strides in the last unit of a stage. Without its stride
               this unit keeps the dilation of before, and the next stage has the whole
               dilation from its first unit on.
        Here:  As torchvision and mmsegmentation, whose strides are in the first unit of
               a stage. Its 3x3 has half of the stage's dilation, because it still sees
               the grid of the stage before; see `dilate_stage` in common.py.
        Effect: The dilation changes no cost, the place of the strides does: see N6. On
               scores: not measured.
    N4  Dropout.
        Paper: Silent.
        Code:  0.1 behind ASPP's projection. mmsegmentation has none there, and 0.1
               before the classifier.
        Here:  As mmsegmentation.
        Effect: Not measured.
    N5  Auxiliary head.
        Paper: None.
        Code:  None. mmsegmentation has an FCN head on res4, whose loss has the weight
               0.4.
        Here:  As mmsegmentation. `aux=False` removes the head; the paper's own recipe
               (voc) gives its loss the weight 0.
        Effect: It gives the early layers a short way to a loss, which should help a
               network that starts from scratch. On streets it does not show: two
               trainings without it reach a mean mIoU of 0.5691, two with it 0.5703
               (results/README.md).
    N6  Separable convolutions, and costs of Table 3.
        Paper: The final model has separable convolutions in ASPP and decoder. Sec. 4:
               without them it costs more and scores about the same. Table 3 counts
               ResNet-101 without them, at a size that is not stated (513x513 is the
               crop of training): at output strides 32, 16 and 8 it takes 52.43, 81.02
               and 276.18 G multiply-adds without a decoder, and 74.20, 101.28 and
               297.92 with one.
        Code:  The same; two switches choose between both kinds of convolution.
        Here:  Separable. `separable=False` is the variant `plain`; `no-decoder` is the
               network to which Table 3 adds the decoder.
        Effect: The decoder of `plain` costs 171.36 GMACs instead of 21.70 (as in N1).
               At 513x513 it adds 21.76, 21.76 and 21.74 at the three strides, where the
               paper's numbers differ by 21.77, 20.26 and 21.74. Only that at 16 is not
               met, and Table 5 contradicts it: there the same decoder adds 21.76 at 16.
               The networks as a whole are not met: resnet101s takes 76.42, 99.96 and
               275.06 with a decoder (+3.0, -1.3 and -7.7 %) and 54.65, 78.20 and 253.32
               without. Three things in the authors' code bring five of the six numbers
               to within 0.4 %, and 101.28 to 1.3 %: strides in the last unit of a
               stage (N3), the dilations 1, 2 and 4 in the last stage (multi-grid),
               and TensorFlow's way of dilating. It pads the map to a multiple of the
               dilation, and the zeros are multiplied, too (at stride 16, ASPP computes
               36x36 positions instead of 33x33). Without multi-grid, 101.28 is met
               within 0.1 %. This is a fit of ours, counted in
               tests/test_deeplabv3plus.py. On scores: not measured.
    N7  Initialisation of ASPP, decoder and heads.
        Paper: Silent.
        Code:  Normal, with a standard deviation of 0.33 for depthwise convolutions,
               0.06 for those that follow them and 0.01 for the classifier, cut off at
               two of it. mmsegmentation draws every convolution with a batch norm from
               Kaiming normal with fan_out, and its classifiers with a standard
               deviation of 0.01.
        Here:  `init="torch"`, torch's default, is ours, for the paper's widths and from
               scratch (FROM_SCRATCH). `init="mmsegmentation"` is in the variants that
               are mmsegmentation's. The authors' has no option.
        Effect: Before a batch norm the scale of weights does not change the function,
               but how fast they turn under SGD: the larger, the slower, by the square.
               mmsegmentation's standard deviation divided by torch's, in its ASPP of
               512 channels on a ResNet-50, is 4.9 for the 1x1, 5.5 for the 3x3
               projection and 0.05 for the depthwise convolutions (measured). On scores:
               not measured.
    N8  What lies over what after an enlargement.
        Paper: Bilinear steps of x4.
        Code:  Sizes are 4k + 1 (513) and the corners are aligned, so position i of the
               1/4 map lies on position i/4 of the context, as the strides of the
               encoder want it. mmsegmentation has align_corners=False, and resizes the
               context to the size of res2.
        Here:  As mmsegmentation where the stride divides the image. Elsewhere the
               context is enlarged by the whole factor and cut.
        Effect: Position i of the 1/4 map gets i/4 - 3/8 of the context: at output
               stride 16, 6 pixels beside what the authors' code takes (computed). The
               shift is the same everywhere, so that convolutions can learn it. On
               scores: not measured.
    N9  Recipes.
        Paper: Sec. 4: VOC's augmented training set (--dataset voc-aug), a learning rate
               of 0.007 with poly decay, crops of 513x513, random scales. The rest is
               left to DeepLabv3's paper. ResNet-101 is the encoder of Tables 1 to 3.
        Code:  30,000 steps, no warm-up, and for ResNets a weight decay of 1e-4.
               Scales are 0.5 to 2 in steps of 0.25. The batch is 8 by default, and a
               comment asks for more than 12, better 16, where batch norm is trained.
               Batch norm averages its statistics with a momentum of 0.0003.
        Here:  `voc` is the code's with a batch of 16; any scale from 0.5 to 2; batch
               norm's momentum is torch's 0.1. `cityscapes` and `ade20k` are for NRD's
               Tables 1 and 5 (`undilated`, `dilated`), which were trained as NRD was:
               see note N12 in nrd.py. All start from torchvision's weights, so ResNets
               have the 7x7 stem; `--backbone resnet101c --weights FILE` is
               mmsegmentation's.
        Effect: Not measured.
    N10 Xception.
        Paper: Sec. 3.2 and Fig. 4: more layers, every pooling a separable convolution
               with a stride, batch norm and ReLU behind each depthwise convolution.
               Sec. 4.5: X-71 has more layers in the entry flow.
        Code:  The ReLU stands in front of each separable convolution; only the last
               unit has it behind both halves. xception_71 has two units more. The last
               unit of the exit flow may have the rates 1, 2, 4 (multi-grid). Batch norm
               has an epsilon of 1e-3.
        Here:  As the code, without multi-grid, and with torch's epsilon and start.
        Effect: At 513x513, 54.17 and 177.10 GMACs of Table 5 are met within 0.3 %. Its
               rows without separable convolutions are not: ours are 3.4 to 5.7 % below
               them, and within 0.3 % with the padding of N6 in ASPP. On scores: not
               measured.
    N11 Low-level features of a ResNet.
        Paper: Sec. 3.1: those of the same size; of ResNet-101, Conv2 before its stride.
        Code:  The third convolution of the second unit of the first stage, before the
               sum. The third unit has the stride (N3).
        Here:  The end of the first stage, as mmsegmentation: res2.
        Effect: Channels and costs are equal. On scores: not measured.

Run
    python deeplabv3plus.py FILE.png           shapes, and the picture of `explain`
    python train.py --method deeplabv3plus     on procedural streets, minutes
    python train.py --method deeplabv3plus --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, WIDTH, Stages, UserError, check_batch, class_legend,
                    colour_bar, conv_bn, conv_bn_relu, describe, fcn_heads, heading,
                    label_colours, make_encoder, panel, separable_conv, show_errors,
                    synthetic_scene, torchvision_names, upsample, viewable, widened)

# --- 1. Config -----------------------------------------------------------------------

MMSEG = {"channels": 512, "projection": 3, "init": "mmsegmentation"}  # [N1] [N7]
PLAIN = {"separable": False}  # the convolutions of Tables 1 to 3  [N6]
VARIANTS = {
    "default": {},
    "os8": {"output_stride": 8},
    "no-image-level": {"image_level": False},  # Table 7
    # Table 1: to how many channels the low-level features are reduced, with one 3x3.
    "reduce-8": PLAIN | {"refine": (3,), "low_channels": 8},
    "reduce-16": PLAIN | {"refine": (3,), "low_channels": 16},
    "reduce-32": PLAIN | {"refine": (3,), "low_channels": 32},
    "reduce-64": PLAIN | {"refine": (3,), "low_channels": 64},
    # Table 2: what refines them, with 48 channels. Two 3x3 are `plain`.
    "one-3x3": PLAIN | {"refine": (3,)},  # 48 channels of Table 1, too
    "three-3x3": PLAIN | {"refine": (3, 3, 3)},
    "half-width": PLAIN | {"refine": (3,), "refine_channels": 128},
    "one-1x1": PLAIN | {"refine": (1,)},
    "conv2-conv3": PLAIN | {"refine": (3,), "conv3": True},
    # Table 3 counts both at output strides 32, 16 and 8: --set output_stride=8.
    "plain": PLAIN,
    "no-decoder": PLAIN | {"decoder": False},  # DeepLabv3, [N6]
    # mmsegmentation's widths, as in the rows that NRD compares with. What is published
    # of them stands in results/published.csv.
    "undilated": MMSEG | {"output_stride": 32},  # NRD's Table 1
    "dilated-os16": MMSEG | {"output_stride": 16},
    "dilated": MMSEG | {"output_stride": 8},  # NRD's Table 5
}

FROM_SCRATCH = {"init": "torch"}  # of `build` in train.py's own recipes  [N7]
PAPER = "paper, Sec. 4"
CODE = "official code, train.py"
NRD = "NRD, Sec. 3"
MMSEGMENTATION = "mmsegmentation, which NRD, Sec. 3 inherits"
MMSEG_SCHEDULE = {
    "weights": ("imagenet", NRD), "lr": (0.01, NRD), "weight_decay": (5e-4, NRD),
    "batch": (16, "NRD's code: 4 on each of 4 GPUs"),
    "warmup": (4000, "NRD, Table 3"), "warmup_from": (0.01, "NRD's code"),
    "momentum": (0.9, MMSEGMENTATION), "power": (0.9, MMSEGMENTATION),
    "min_lr": (1e-4, MMSEGMENTATION), "scale": ((0.5, 2.0), MMSEGMENTATION),
    "photometric": (True, MMSEGMENTATION), "aux_weight": (0.4, MMSEGMENTATION)}  # [N5]
RECIPES = {  # [N9]
    # The paper's own data set; the recipes after it are not the paper's.
    "voc": {
        "backbone": ("resnet101", "paper, Table 3"), "weights": ("imagenet", PAPER),
        "lr": (0.007, PAPER), "weight_decay": (1e-4, CODE), "batch": (16, CODE),
        "crop": ((513, 513), PAPER), "iterations": (30_000, CODE),
        "momentum": (0.9, CODE), "power": (0.9, CODE), "min_lr": (0.0, CODE),
        "warmup": (0, CODE), "scale": ((0.5, 2.0), CODE),
        "photometric": (False, CODE), "aux_weight": (0.0, CODE)},  # [N5]
    # NRD's Table 1
    "cityscapes": MMSEG_SCHEDULE | {
        "backbone": ("resnet50", "NRD, Table 1"),
        "crop": ((512, 1024), "NRD, Sec. 3"), "iterations": (84_000, "NRD, Table 1")},
    # NRD's Table 5, which has ResNet-50 and ResNet-101
    "ade20k": MMSEG_SCHEDULE | {
        "backbone": ("resnet101", "NRD, Table 5"),
        "crop": ((512, 512), "NRD, Sec. 3"), "batch": (16, MMSEGMENTATION),
        "base_size": ((2048, 512), "NRD's code, as mmsegmentation"),
        "iterations": (164_000, "NRD, Sec. 3: 160k, and Table 3: 4k of warm-up")},
}

# --- 2. Equations --------------------------------------------------------------------


# task: minutes=15 points=8
def atrous_convolution(x: Tensor, weight: Tensor, *, rate: int) -> Tensor:
    """Eq. (1): y_i = sum_k x_(i + rate * k) w_k, k from -1 to 1: a kernel with holes.

    x (B, C, h, w), weight (D, C, 3, 3), zero outside the map -> (B, D, h, w). A 3x3
    kernel reaches `rate` positions far and still costs nine products. The literal twin,
    `atrous_slowly` in tests/test_deeplabv3plus.py, adds nine shifted maps one by one.
    Encoder and ASPP (common.py) have the same convolution as nn.Conv2d(dilation=rate).
    """
    return F.conv2d(x, weight, padding=rate, dilation=rate)


# task: minutes=10 points=4 section='Sec. 3.1'
def atrous_rates(output_stride: int) -> tuple[int, ...]:
    """Rates of ASPP that see the same stretch of the image at any stride.  [N2]

    Whole numbers: nn.Conv2d takes no others.
    """
    return tuple(rate * 32 // output_stride for rate in (3, 6, 9))


# --- 3. Layers -----------------------------------------------------------------------


# task: minutes=20 points=7 section='note N7'
def start_as_mmsegmentation(*parts: nn.Module) -> None:
    """Draw the convolutions with a batch norm as mmsegmentation does.  [N7]

    Normal, with variance 2 / fan_out, where fan_out = output channels * kernel area.
    These are the convolutions without a bias.
    """
    for part in parts:
        for conv in part.modules():
            if isinstance(conv, nn.Conv2d) and conv.bias is None:
                nn.init.kaiming_normal_(conv.weight, mode="fan_out",
                                        nonlinearity="relu")


def start_classifier(conv: nn.Conv2d) -> None:
    """The last layer of a head in mmsegmentation: nearly 0, so all classes alike."""
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)


def refinement(in_channels: int, channels: int, kernels: tuple[int, ...],
               separable: bool) -> nn.Sequential:
    """Table 2: one convolution after another, [3x3, channels] or [1x1, channels]."""
    layers = []
    for kernel in kernels:
        if kernel == 3 and separable:  # [N6] [N7]
            layers += separable_conv(in_channels, channels)
        else:
            layers += conv_bn_relu(in_channels, channels, kernel)
        in_channels = channels
    return nn.Sequential(*layers)


class XceptionUnit(nn.Module):
    """Fig. 4: three separable 3x3 convolutions, the third with the stride; a shortcut.

    widths: of the three. shortcut: 'conv', a 1x1 with the stride, 'sum', the input as
    it is, or 'none'. A ReLU stands in front of each separable convolution; with
    `relu_inside`, instead, behind each of its two halves.  [N10]
    """

    def __init__(self, in_channels: int, widths: tuple[int, int, int], *, stride=1,
                 dilation=1, shortcut="conv", relu_inside=False):
        super().__init__()
        self.shortcut = None
        if shortcut == "conv":
            self.shortcut = conv_bn(in_channels, widths[2], stride=stride)
        elif shortcut == "sum":
            self.shortcut = nn.Identity()
        self.convs = nn.ModuleList()
        for width, step in zip(widths, (1, 1, stride)):
            depthwise = conv_bn(in_channels, in_channels, 3, stride=step,
                                dilation=dilation, groups=in_channels)
            pointwise = conv_bn(in_channels, width)
            layers = [nn.ReLU(), depthwise, pointwise]
            if relu_inside:
                layers = [depthwise, nn.ReLU(), pointwise, nn.ReLU()]
            self.convs.append(nn.Sequential(*layers))
            in_channels = width

    def begin(self, x: Tensor) -> Tensor:
        """What the second convolution gives, still on the grid of x."""
        return self.convs[1](self.convs[0](x))

    def finish(self, x: Tensor, begun: Tensor) -> Tensor:
        y = self.convs[2](begun)
        return y if self.shortcut is None else y + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, self.begin(x))


# (width, stride) of the units of the entry flow, and how many of them lie before 1/8.
ENTRY = {"xception65": (((128, 2), (256, 2), (728, 2)), 2),
         "xception71": (((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)), 3)}


class Xception(nn.Module):
    """Sec. 3.2, Fig. 4: the modified aligned Xception; Sec. 4.5: with 71 layers.  [N10]

    images (B, 3, H, W) -> {"stem": (B, 64, H/2, W/2), "res2": (B, 256, H/4, W/4),
    "res3": (B, 256, H/8, W/8), "res4": (B, 728, H/16, W/16), "res5": (B, 2048, H/32,
    W/32)}; every size is rounded up. res2 is what the second convolution of the second
    unit gives, res4 the end of the middle flow. At output strides 16 and 8 the last one
    or two units with a stride go without, and what follows is dilated by as much.
    """

    def __init__(self, name: str, *, output_stride=32):
        super().__init__()
        self.in_channels = 3
        self.output_stride = output_stride
        self.channels = Stages(name, stem=64, res2=256, res3=256, res4=728, res5=2048)
        self.root = nn.Sequential(*conv_bn_relu(3, 32, stride=2), *conv_bn_relu(32, 64))
        entry, self.to_eighth = ENTRY[name]
        plan = [((width,) * 3, stride, {}) for width, stride in entry]
        plan += [((728,) * 3, 1, {"shortcut": "sum"})] * 16
        plan += [((728, 1024, 1024), 2, {}),
                 ((1536, 1536, 2048), 1, {"shortcut": "none", "relu_inside": True})]
        units = []
        channels = 64  # behind the root, where the stride is 2
        reached = 2
        dilation = 1
        for widths, stride, options in plan:
            shrinks = reached * stride <= output_stride
            units.append(XceptionUnit(channels, widths, stride=stride if shrinks else 1,
                                      dilation=dilation, **options))
            if shrinks:
                reached *= stride
            else:
                dilation *= stride
            channels = widths[-1]
        self.entry = nn.ModuleList(units[:len(entry)])
        self.middle = nn.Sequential(*units[len(entry):-2])
        self.exit = nn.Sequential(*units[-2:])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stem = self.root(images)
        x = self.entry[0](stem)
        res2 = self.entry[1].begin(x)
        x = self.entry[1].finish(x, res2)
        for unit in self.entry[2:self.to_eighth]:
            x = unit(x)
        res3 = x
        for unit in self.entry[self.to_eighth:]:
            x = unit(x)
        res4 = self.middle(x)
        if self.training and self.output_stride == 32:
            check_batch(res4[:, 0, ::2, ::2].numel(), self.exit)
        return {"stem": stem, "res2": res2, "res3": res3, "res4": res4,
                "res5": self.exit(res4)}


ENCODERS = {name: partial(Xception, name) for name in ENTRY}  # for every method


class DeepLabv3PlusDecoder(nn.Module):
    """Secs. 3.1, 4.1: context at 1/4, beside 48 low-level channels; 3x3, 3x3, classes.

    The low-level features of a ResNet-50 have 256 channels, as many as the context. If
    all of them were concatenated they could outweigh the context, which knows more,
    and training would be harder. Hence the 1x1 that reduces them to 48. `kernels` has
    the size of each convolution that refines both: (3, 3), [3x3, 256] twice.
    """

    # task: minutes=25 points=8 section='Sec. 4.1'
    def __init__(self, in_channels: int, low_channels: int, num_classes: int, *,
                 channels=256, reduced=48, kernels=(3, 3), separable=True,
                 output_stride=32, dropout=0.1):
        """The layers of Sec. 4.1, and two numbers.

        reduce    1x1 with norm and ReLU, from low_channels to `reduced`
        refine    `refinement` of the context's and the reduced channels to `channels`
        classify  nn.Sequential of a dropout of whole channels [N4] and a 1x1 with bias
        stride    of res2, on whose grid the decoder works
        factor    by which the context is enlarged, from output_stride to `stride`
        """
        super().__init__()
        self.stride = 4  # of res2, on whose grid the decoder works
        self.factor = output_stride // self.stride  # from context to there
        self.reduce = conv_bn_relu(low_channels, reduced, 1)
        self.refine = refinement(in_channels + reduced, channels, kernels, separable)
        self.classify = nn.Sequential(nn.Dropout2d(dropout),  # [N4]
                                      nn.Conv2d(channels, num_classes, 1))

    # task: minutes=25 points=10 hides=deeplabv3plus.TwoLevelDecoder.forward
    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        """Sec. 3.1: context (B, D, h, w), features["res2"] -> logits (B, K, q, r).

        The context is enlarged bilinearly by self.factor and cut to the size of res2
        [N8]. Concatenated, it stands before the reduced low-level channels [N11]. Both
        are refined together, then classified.
        """
        B, D, h, w = context.shape
        low = self.reduce(features["res2"])  # (B, L, q, r)
        # At sizes that the strides do not divide, the enlarged context has up to
        # factor - 1 rows and columns more than res2. They lie beyond the image.  [N8]
        up = upsample(context, self.factor, low.shape[-2:])  # (B, D, q, r)
        both = torch.cat([up, low], dim=1)  # (B, D+L, q, r)
        return self.classify(self.refine(both))


class TwoLevelDecoder(DeepLabv3PlusDecoder):
    """Table 2, last row: context up to 1/8, beside res3; that up to 1/4, beside res2.

    Sec. 4.1 calls it similar to U-Net, and found no significant gain.
    """

    def __init__(self, in_channels: int, middle_channels: int, low_channels: int,
                 num_classes: int, *, channels=256, reduced=48, kernels=(3,),
                 separable=True, output_stride=32):
        super().__init__(channels, low_channels, num_classes, channels=channels,
                         reduced=reduced, kernels=kernels, separable=separable,
                         output_stride=8)
        self.to_middle = output_stride // 8
        self.reduce_middle = conv_bn_relu(middle_channels, reduced, 1)
        self.refine_middle = refinement(in_channels + reduced, channels, kernels,
                                        separable)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        middle = self.reduce_middle(features["res3"])
        up = upsample(context, self.to_middle, middle.shape[-2:])
        both = torch.cat([up, middle], dim=1)
        return super().forward(self.refine_middle(both), features)


class CoarseClassifier(nn.Module):
    """No decoder, which is DeepLabv3: the classifier at the output stride.  [N6]"""

    def __init__(self, in_channels: int, num_classes: int, *, output_stride: int,
                 dropout=0.1):
        super().__init__()
        self.stride = output_stride
        self.classify = nn.Sequential(nn.Dropout2d(dropout),  # [N4]
                                      nn.Conv2d(in_channels, num_classes, 1))

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(context)


# --- 4. Model ------------------------------------------------------------------------


class DeepLabv3Plus(nn.Module):
    """Fig. 2: (dilated) encoder, ASPP, decoder."""

    def __init__(self, encoder: nn.Module, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.decoder = decoder
        self.aux_heads = aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, ., .)]}."""
        logits, aux = self.decode(images)
        return {"out": self.to_pixels(logits, images.shape[-2:]), "aux": aux}

    def decode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) -> logits (B, K, q, r), auxiliary logits.

        Without a decoder the logits are on the coarse grid, (B, K, h, w).
        """
        features = self.encoder(images)
        context = self.context(features["res5"])  # (B, D, h, w)
        logits = self.decoder(context, features)
        aux = [head(features["res4"]) for head in self.aux_heads if self.training]
        return logits, aux

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """The last bilinear step (x4): logits (B, K, H, W) of the size = (H, W) pixels.

        Without a decoder it is the only one, by the whole output stride.
        With rows = (lo, hi), those of the rows lo..hi-1 alone, (B, K, hi - lo, W).
        """
        return upsample(widened(logits), self.decoder.stride, size, rows)


def build(num_classes: int, *, backbone="resnet50", weights="none", channels=256,
          low_channels=48, refine=(3, 3), refine_channels=0, conv3=False,
          output_stride=16, separable=True, projection=1, image_level=True,
          decoder=True, init="torch", aux=True) -> DeepLabv3Plus:
    """DeepLabv3+ on any encoder; VARIANTS names the rows that are compared.

    channels        D, width of ASPP and decoder (256, Sec. 4)
    low_channels    L, width of the reduced low-level features (48, Sec. 4.1)
    refine          kernels of the convolutions behind the concatenation (Table 2)
    refine_channels their width, 0: `channels`
    conv3           concatenate res3 on the way, too (Table 2)
    output_stride   32 undilated, 16 the paper's default, 8 the most accurate
    separable       depthwise separable convolutions in ASPP and decoder  [N6]
    projection      kernel of ASPP's last convolution  [N1]
    image_level     the global average of ASPP; on Cityscapes better without (Table 7)
    decoder         False: classify at the output stride, as DeepLabv3 does  [N6]
    init            'torch' or 'mmsegmentation': how the weights are drawn  [N7]
    aux             train with an auxiliary head on res4  [N5]
    """
    if init not in ("torch", "mmsegmentation"):
        raise UserError(f"init={init!r}: must be 'torch' or 'mmsegmentation'")
    encoder = make_encoder(backbone, num_classes, weights=weights,
                           output_stride=output_stride)  # [N3]
    context = ASPP(encoder.channels["res5"], channels, separable=separable,
                   rates=atrous_rates(output_stride), projection=projection,
                   image_level=image_level)
    shape = {"channels": refine_channels or channels, "reduced": low_channels,
             "kernels": tuple(refine), "separable": separable,
             "output_stride": output_stride}
    widths = encoder.channels
    if decoder and conv3:
        top = TwoLevelDecoder(channels, widths["res3"], widths["res2"], num_classes,
                              **shape)
    elif decoder:
        top = DeepLabv3PlusDecoder(channels, widths["res2"], num_classes, **shape)
    else:
        top = CoarseClassifier(channels, num_classes, output_stride=output_stride)
    heads = fcn_heads(encoder, num_classes, aux)  # [N5]
    if init == "mmsegmentation":  # [N7]
        start_as_mmsegmentation(context, top, heads)
        start_classifier(top.classify[-1])
        for head in heads:
            start_classifier(head.layers[-1])
    return DeepLabv3Plus(encoder, context, top, heads)


# From here on: the names of mmsegmentation's checkpoints, for `convert`.


def block_names(official: str, ours: str, at: int = 0) -> dict[str, str]:
    """A convolution with its norm: theirs are .conv and .bn, ours are numbered."""
    return {f"{official}.conv": f"{ours}.{at}", f"{official}.bn": f"{ours}.{at + 1}"}


def separable_names(official: str, ours: str, at: int = 0) -> dict[str, str]:
    """Depthwise and pointwise, three layers each (convolution, norm, ReLU)."""
    return (block_names(f"{official}.depthwise_conv", ours, at)
            | block_names(f"{official}.pointwise_conv", ours, at + 3))


def shared_names() -> dict[str, str]:
    """Layers of mmsegmentation's separable ASPP head and of its auxiliary FCN head."""
    names = block_names("decode_head.image_pool.1", "context.pool", 1)
    names |= block_names("decode_head.aspp_modules.0", "context.branches.0")
    for i in (1, 2, 3):
        names |= separable_names(f"decode_head.aspp_modules.{i}",
                                 f"context.branches.{i}")
    names |= block_names("decode_head.bottleneck", "context.project")
    names |= block_names("auxiliary_head.convs.0", "aux_heads.0.layers")
    return names | {"auxiliary_head.conv_seg": "aux_heads.0.layers.4"}


def decoder_names() -> dict[str, str]:
    """Layers of its DeepLabv3+ decoder."""
    return (block_names("decode_head.c1_bottleneck", "decoder.reduce")
            | separable_names("decode_head.sep_bottleneck.0", "decoder.refine")
            | separable_names("decode_head.sep_bottleneck.1", "decoder.refine", 6)
            | {"decode_head.conv_seg": "decoder.classify.1"})


def renamed(state: dict, model: nn.Module, names: dict[str, str]) -> dict:
    """An official state dict in the names of `model`; UserError if they do not fit.

    `names` says what each layer of the heads is called here. What `model` does not have
    because it was built with aux=False is left out.
    """
    stages = {"conv1": "stem.0", "bn1": "stem.1", "layer1": "res2", "layer2": "res3",
              "layer3": "res4", "layer4": "res5"}
    own = model.state_dict()
    result = {}
    strange = []
    for key, value in state.get("state_dict", state).items():
        key = key.removeprefix("module.")
        layer, _, kind = key.rpartition(".")
        if key.startswith("backbone."):
            (key,) = torchvision_names({key: value})
            stage, _, rest = key.partition(".")
            key = f"encoder.{stages.get(stage, stage)}.{rest}"
        elif key.startswith("auxiliary_head.") and not len(model.aux_heads):
            continue
        elif layer in names:
            key = f"{names[layer]}.{kind}"
        if key in own and own[key].shape == value.shape:
            result[key] = value
        else:
            strange.append(key)
    missing = [key for key in own if key not in result
               and not key.endswith("num_batches_tracked")]
    if strange or missing:
        raise UserError(
            f"{len(strange)} tensors have no place in this network "
            f"({', '.join(strange[:3])}), {len(missing)} of its own are missing "
            f"({', '.join(missing[:3])}); is it for another variant, backbone, stem or "
            f"number of classes?")
    return {key: own[key] for key in own if key not in result} | result


def convert(state: dict, model: DeepLabv3Plus) -> dict:
    """A checkpoint of mmsegmentation's DeepLabv3+ as a state dict of `model`.

    `model` must be one of the variants in mmsegmentation's widths (`undilated`,
    `dilated-os16`, `dilated`). All weights are the same there; only the names differ.
    """
    return renamed(state, model, shared_names() | decoder_names())


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: DeepLabv3Plus, image: Tensor, *, palette=None, classes=None):
    """Fig. 2 from the model's own tensors: what the low-level channels add.

    image (1, 3, H, W), normalised -> matplotlib Figure. Above: the image and the mean
    size of the numbers in the enlarged context, in the 48 low-level channels and in
    what the 3x3 convolutions make of both. Below: the labels with the low-level
    channels and without, where every channel has its mean over the image instead, and
    where the two differ. `palette` and `classes` have a colour and a name per class.
    """
    from matplotlib.figure import Figure
    decoder = model.decoder
    if not isinstance(decoder, DeepLabv3PlusDecoder):
        raise UserError("nothing to explain: this variant has no decoder")
    H, W = image.shape[-2:]
    with torch.no_grad():
        up, low, refined, logits = steps_of_decoder(model, image)
        labels = model.to_pixels(logits, (H, W))[0].argmax(0)
        _, _, _, logits = steps_of_decoder(model, image, flat=True)
        without = model.to_pixels(logits, (H, W))[0].argmax(0)
    picture = viewable(image[0])
    colours = label_colours(palette, logits.shape[1])

    row = 3.4 * H / W + 2.1  # inches: four pictures side by side, and captions
    figure = Figure(figsize=(WIDTH, 2 * row + 1), layout="constrained")
    top, above, below, names = figure.subfigures(4, 1, height_ratios=(0.4, row, row,
                                                                      0.5))
    heading(top, "DeepLabv3+: enlarge what the coarse map knows, and join it with "
            f"{low.shape[1]} early channels that see edges and colours")
    draw_features(above, picture, up, low, refined, model.encoder.output_stride)
    draw_difference(below, picture, labels, without, colours)
    class_legend(names, torch.cat([labels, without]), colours, classes)
    return figure


def steps_of_decoder(model: DeepLabv3Plus, image: Tensor, *, flat=False):
    """The decoder's own layers one by one: both that it joins, refined, logits.

    `flat` puts every low-level channel's mean over the image into the place of that
    channel: what remains of it has no edges.
    """
    decoder = model.decoder
    seen = {}

    def flatten(layer, args, low):
        return low.mean((2, 3), keepdim=True).expand_as(low) if flat else None

    def remember(layer, args, result):
        seen["both"], seen["refined"] = args[0], result

    handles = [decoder.reduce.register_forward_hook(flatten),
               decoder.refine.register_forward_hook(remember)]
    logits, _ = model.decode(image)
    for handle in handles:
        handle.remove()
    L = decoder.reduce[0].out_channels
    return seen["both"][:, :-L], seen["both"][:, -L:], seen["refined"], logits


def size_of_numbers(x: Tensor) -> Tensor:
    """Root of the mean square over channels, a picture (q, r) of maps (1, C, q, r)."""
    return x[0].square().mean(0).sqrt()


DISTANCES = (1, 2, 4, 8, 16, 32)


def changed_by_distance(labels: Tensor, without: Tensor) -> list[float]:
    """Share of changed pixels in rings around boundaries, 1, 2, 3-4, 5-8, .. away.

    The last number is the share of those that are farther away than all DISTANCES. A
    boundary are both pixels of every pair of neighbours whose classes differ; they are
    at distance 1.
    """
    near = torch.zeros_like(labels, dtype=torch.bool)
    down = labels[1:] != labels[:-1]
    near[1:] |= down
    near[:-1] |= down
    along = labels[:, 1:] != labels[:, :-1]
    near[:, 1:] |= along
    near[:, :-1] |= along
    changed = labels != without
    shares = []
    inner = torch.zeros_like(near)
    for distance in DISTANCES:
        reach = distance - 1  # distance 1: the pixels of the boundary themselves
        side = 2 * reach + 1
        outer = F.max_pool2d(near[None].float(), (side, 1), 1, (reach, 0))
        outer = F.max_pool2d(outer, (1, side), 1, (0, reach))[0] > 0
        shares.append(changed[outer & ~inner].float().mean().nan_to_num().item())
        inner = outer
    return [*shares, changed[~inner].float().mean().nan_to_num().item()]


def draw_features(figure, picture: Tensor, up: Tensor, low: Tensor,
                  refined: Tensor, stride: int) -> None:
    """The image, and where the numbers of the decoder's three tensors are large."""
    axes = figure.subplots(1, 4)
    panel(axes[0], picture, "Image",
          f"The coarse map has one position for {stride}x{stride} of these pixels, and "
          "edges are lost in it.", chars=34)
    shown = ((up, "Context, enlarged", "A bilinear step brings the coarse map to 1/4 "
              "of the image, smooth, without edges."),
             (low, f"{low.shape[1]} low-level channels", "They come from early layers "
              "at 1/4 of the image and answer to edges and colours."),
             (refined, "Both, refined", "Convolutions read both, so that areas can end "
              "where edges are."))
    for axis, (x, title, caption) in zip(axes[1:], shown):
        drawn = panel(axis, size_of_numbers(x), title)
        colour_bar(drawn, "root mean square of channels", caption, chars=32)


def draw_difference(figure, picture: Tensor, labels: Tensor, without: Tensor,
                    colours: Tensor) -> None:
    """Labels with and without the low-level channels, and where they differ."""
    axes = figure.subplots(1, 4)
    changed = labels != without
    panel(axes[0], colours[labels], "Labels",
          "This is the prediction, for which context and low-level channels decide "
          "together.", chars=34)
    panel(axes[1], colours[without], "Without low-level",
          "Each low-level channel is set to its mean over the image, so that the "
          "context alone decides where things are.", chars=34)
    grey = 0.5 + 0.5 * picture.mean(2, keepdim=True).expand(-1, -1, 3)
    black = torch.zeros(3)
    panel(axes[2], torch.where(changed[..., None], black, grey), "What they change",
          f"Black pixels, {changed.float().mean():.1%} of all, change class when the "
          "low-level channels are flat.", chars=34)
    shares = [100 * share for share in changed_by_distance(labels, without)]
    names = [*map(str, DISTANCES), "more"]
    axes[3].bar(names, shares, color="0.4")
    axes[3].spines[["top", "right"]].set_visible(False)
    describe(axes[3], "Changed pixels, in %",
             "Where bars are high the low-level channels decide, and where they are "
             "low the context does.",
             unit="rings, up to .. pixels from a boundary", chars=34)


# --- 6. Demo -------------------------------------------------------------------------


def demo(file: str = "") -> None:
    """The way of one small image through DeepLabv3+; its picture, if a file is named.

    Nothing is trained here, so the picture shows what comes by chance.
    """
    model = build(19, backbone="resnet18", **FROM_SCRATCH).eval()
    image = synthetic_scene(96, 160)
    with torch.no_grad():
        features = model.encoder(image)
        context = model.context(features["res5"])
        logits = model.decoder(context, features)
        out = model(image)["out"]
    for name, x in {"image": image, **features, "context": context, "logits": logits,
                    "out": out}.items():
        print(f"{name:<8} {tuple(x.shape)}")
    if file:
        explain(model, image).savefig(file, dpi=100)
        print(f"picture of the untrained network: {file}")
    print("costs: python evaluate.py cost deeplabv3plus")


if __name__ == "__main__":
    with show_errors():
        demo(*sys.argv[1:2])
