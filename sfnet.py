"""SFNet: let each fine position say where in the coarse map its meaning lies.

Xiangtai Li, Ansheng You, Zhen Zhu, Houlong Zhao, Maoke Yang, Kuiyuan Yang, Shaohua
Tan, Yunhai Tong. "Semantic Flow for Fast and Accurate Scene Parsing." ECCV 2020.
arXiv:2002.10120

The idea
    A feature pyramid adds the enlarged coarse map to the finer one, position by
    position. But strides and pooling have moved things: what the coarse map knows
    about a pole is not exactly above the pole. Treat the maps like two video frames:
    predict the flow between them, and fetch each fine position's coarse feature from
    where the flow points. Zero flow is the ordinary pyramid.

Dimension key
    B batch   K classes (the paper's C)   C channels of a map   H, W image size
    D channels of every map of the pyramid (128 or 256)   n maps that are fused (4)
    h, w the coarser map of a pair   q, r the finer one
    l level of the pyramid: F_5, at 1/32, is the coarsest and F_2, at 1/4, the finest

Paper -> code
    | Fig. 3 (c)         | SFNet.decode       | encoder, context, decoder |
    | Fig. 3 (c), end    | SFNet.to_pixels    | from the finest level to pixels |
    | Fig. 3 (a)         | FAM.forward        | flow from both maps, then warp |
    | Fig. 3 (b)         | warp               | Eq. (2), then Eq. (3) |
    | Sec. 3.2, Eq. (1)  | predict_flow       | conv_l(cat(F_l, F_(l-1))) |
    | Sec. 3.2, Eq. (2)  | source_points      | p_l = (p_(l-1) + flow) / 2 |
    | Eq. (2), its unit  | in_pixels          | a flow of 1 is one fine pixel |
    | Sec. 3.2, Eq. (3)  | sample             | weighted sum of 4 neighbours of p_l |
    | Sec. 3.1, FPN      | ZeroFlow           | bilinear enlargement, FAM's rival |
    | Sec. 3.3, decoder  | AlignedFPN.forward | top-down sums, fusion at 1/4 |
    | Sec. 3.3, cascaded | supervision_head   | one more classifier on every sum |
    | Table 3, DF1, DF2  | DFEncoder          | --backbone df2 [N18] |
    | Table 2 (c)        | correlation        | FlowNet-C's matching, rival of cat |
    | Table 2 (d)        | Deformable         | deformable convolution, rival of FAM |
    | official code      | convert            | its checkpoints |
    | Figs. 2, 5         | explain            | flow, aligned map, labels |

Notes: what the paper says, what the official code does, what is done here, and what
it changes. "Code" is SFSegNets, the repository that the paper names. The authors'
older code, TorchCV, is mentioned where the two differ.
    N1  Layers of FAM.
        Paper: Sec. 3.2 first says that "two convolutional layers with the kernel size
               of 3x3" predict the flow, and later that FAM "only contains one 3x3
               convolution layer". It also says that every map is brought to one width
               by "two 1x1 convolution layers before entering the next level".
        Code:  Each of the two maps goes through its own 1x1 convolution to half of its
               channels. One 3x3 convolution turns both results into the flow. None of
               the three has a bias. One 1x1 convolution per level, the lateral, brings
               the encoder's map to the pyramid's width, 128 for ResNet-18 and 256 for
               deeper ones, which the paper does not name.
        Here:  As the code.
        Effect: The network then has 12,869,715 parameters on `resnet18s` without
               auxiliary heads, the 12.87 M of the paper's Tables 3 and 4.
    N2  Unit of the flow.
        Paper: In Eq. (2) a flow of 1 is one pixel of the finer map.
        Code:  The flow is divided by the width and the height of the finer map and is
               added to a grid that runs from -1 to 1. This grid is 2 long, so a flow
               of 1 is about half a pixel: (r - 1) / (2 r) along x, (q - 1) / (2 q)
               along y.
        Here:  As the paper. `flow_unit="released"` is the code's unit. The two differ
               by a factor that depends on the size of the map, so weights of the one
               are not exactly weights of the other, and `convert` asks for the code's.
        Effect: For the same function, the flow weights of the paper's unit get 2.05
               times the gradient of the code's, and one step of SGD at the same
               learning rate moves the sampling points 4.22 times as far (0.01256 and
               0.00298 pixels; measured, weights converted). From the same initial
               weights the paper's flow is twice as long. The paper's runs, and so the
               learning rate 0.01 of its recipe, belong to the code's unit. On scores:
               not measured.
    N3  Corners: how positions of maps of two sizes belong together.
        Paper: Silent, but Eq. (2) without flow sends position 2i to position i.
        Code:  Enlargement and warping did not use the same convention at first. Since
               July 2022 both have align_corners=True.
        Here:  True everywhere, since a convolution of stride 2 with padding 1 centres
               its output i on its input 2i.
        Effect: Only then does zero flow give plain bilinear enlargement. The price is
               at the right and the bottom border of the logits. Position i of the 1/4
               map belongs to pixel 4i, but the last position is put on the image's last
               pixel, which is up to 2 pixels from there on a ResNet, and up to 3 with
               ceil_mode=False (computed for widths of 64 to 99).
    N4  Neighbours outside the map.
        Paper: Eq. (3) sums over the neighbours of p_l and does not speak of borders.
        Code:  A neighbour outside the map counts as zero.
        Here:  As the code.
        Effect: A flow that points out of the picture fetches nothing. On scores: not
               measured.
    N5  Rounding in the max pooling behind the stem.
        Paper: Silent.
        Code:  TorchCV rounded up in 2019. SFSegNets, which came later, rounds down.
        Here:  Up, so that an image of 1024 pixels gives maps of 257, 129, 65 and 33
               rows. `ceil_mode=False` rounds down.
        Effect: Each of these sizes is 2n - 1 for the next size n, which is what Eq. (2)
               needs to halve positions exactly. The printed 123.5 GFLOPs are met only
               when pooling rounds up; rounding down costs 121.9.
    N6  Final fusion of the four levels.
        Paper: Sec. 3.3: "we also replace these up-sampling operations with the
               proposed FAM". Sec. 4.1: "for fast speed, we adopt FAMs only in the
               adjacent feature pyramids". The fusion enlarges 1/32 to 1/4 at once, so
               its levels are not adjacent.
        Code:  The fusion enlarges bilinearly and concatenates the finest level first.
        Here:  Bilinear as well, but the coarsest level is first. `convert` permutes the
               input channels of `fuse`.
        Effect: Three more FAMs in the fusion would give SFNet 12.93 M parameters on
               `resnet18s`, where Tables 3 and 4 print 12.87 M, so the paper's network
               has none there. The order does not matter to a network that is trained
               here.
    N7  A 3x3 convolution on the sums.
        Paper: Names none. In Sec. 3.3 maps are "fused into their bottom levels via
               element-wise addition", then "up-sampled to the same resolution" and
               "concatenated together for prediction".
        Code:  Every sum goes through a 3x3 convolution with batch norm and ReLU on its
               way to the concatenation. The next finer level gets the sum without it.
        Here:  As the code.
        Effect: Not measured.
    N8  Deep supervision and hard pixels.
        Paper: Sec. 3.3 supervises "intermediate outputs of the decoder" and mines
               "by only training on the 10% hardest pixels sorted by cross-entropy
               loss". It gives neither the weights of the losses nor the set that the
               10 % are of.
        Code:  Each sum has a head whose loss has weight 1. Every loss keeps the pixels
               whose true class has a probability below 0.7, and at least 100,000
               pixels: in SFSegNets of the 2 images of one process, which is 4.8 % of
               two crops of 1024x1024, in TorchCV of each image, which is 9.5 %. But
               SFSegNets' scripts for ResNet-18 and ResNet-101 have no heads and keep at
               least 10,000 pixels.
        Here:  The losses have weight 1, as in the code. Of each image the hardest 10 %
               count, as in the paper. TorchCV's rule is `--ohem 0.095 --ohem-threshold
               0.7`; with 0.048 it is SFSegNets' with heads, and with `--set aux=False
               --ohem 0.0048` without, but for counting image by image.
        Effect: The paper's Params do not include the heads. Without them streets' mIoU
               is 0.4 points lower, which two seeds do not decide. The two rules agree
               at the end of training and not at its start, when nearly every pixel is
               below 0.7 and the code's rule trains on all: on synthetic logits of 19
               classes the loss is 5.18 by the paper's rule and 3.40 by the code's.
               Where 0.4 % of the pixels are below 0.7, it is 0.116 by the paper's rule,
               0.120 by TorchCV's and 0.179 with SFSegNets' 4.8 % (measured). What the
               rules do to scores was not measured.
    N9  Biases of convolutions before a batch norm.
        Paper: Silent.
        Code:  The laterals and the auxiliary heads have them, other layers do not.
        Here:  As the code.
        Effect: None but on the number of parameters: the batch norm subtracts what the
               bias has added.
    N10 Stem and dilation of the ResNets.
        Paper: "ResNet series"; Sec. 3.3 gives every stage a convolution of stride 2.
        Code:  The stem is three 3x3 convolutions with 64, 64 and 128 channels. By
               default, "variant D", the second convolution of every block of res4 and
               res5 is also dilated, by 2 and by 4, although the stages keep their
               stride. TorchCV has no dilation.
        Here:  `--backbone resnet18s` has that stem. There is no dilation, since the
               paper names none; `extra_dilation` adds the code's. The variant
               `released` has it, the code's pooling [N5] and its flow unit [N2].
        Effect: Costs are equal. With the same weights, in float64, `released` gives the
               logits of the released network to 1e-10 (tests/test_sfnet.py), while
               without the dilation they differ by up to 0.11 where the largest is 0.17.
               On the scores of a network trained here: not measured.
    N11 Costs of the kernel sizes, Table 2 (b).
        Paper: 120.4, 123.5, 131.6 and 140.5 GFLOPs for k = 1, 3, 5, 7.
        Code:  Has k = 3 only.
        Here:  `kernel` is the k of the flow convolution, N1's 3x3. Plain multiply-adds
               go from 122.83 for k = 1 to 123.89 for k = 7 (`evaluate.py cost`).
        Effect: A kernel of side k adds a cost proportional to k^2. The four printed
               numbers do not grow like that, so more than k was changed between them.
               Do not compare these costs.
    N12 Rivals of PPM and FAM in Tables 1 and 2.
        Paper: Names them without their dimensions.
        Code:  Not released, but for an ASPP with rates 6, 12 and 18 at 1/16.
        Here:  As usual in the field. FCN: one 3x3 convolution. ASPP: rates 3, 6 and 9,
               at 1/32. Correlation: offsets of up to 4 positions, at F_5 alone, because
               FAM has there the 77.5 that Table 2 (c) compares it with. Non-local: its
               last batch norm usually starts at 0; ours starts at 1, or no gradient
               would reach theta, phi and g in the first step. Deformable convolution:
               offsets start at 0.
        Effect: Table 1 (c) prints 148.0 GFLOPs with the non-local module and 138.6 with
               ASPP; ours cost 123.95 and 125.40 (`evaluate.py cost`). On scores: not
               measured.
    N13 Numbers in the paper that disagree with each other.
        Paper: FAM without PPM has 77.2 in Table 1 (a) and 76.4 in (c). FAM with PPM has
               78.7 in (a) and 78.3 in (b) and (c). k = 5 has 78.1 in Table 2 (b) and
               78.2 in the text. The gain on Context with ResNet-101 is 2.7 in Table 5
               (a) and 2.6 in the text. FPN and SFNet on ResNet-101 have 77.6 and 79.8
               in Table 1 (d), where the whole image goes in, and again in Table 7,
               where windows and flipping are used; the mean of FPN's 19 IoUs there is
               77.3. In our copy of Table 1 (b) the row of 77.8 has the same three ticks
               as the row of 78.3, and in Table 2 (d) each row of DCN and FAM has three,
               where the text speaks of F_5 alone for the first of each.
        Here:  `fam-f4-f5` is our guess for the row of 77.8, `dcn-f5` and `fam-f5`
               follow the text.
        Effect: Compare a score with rows of its own table only.
    N14 Schedule of training.
        Paper: Sec. 4.1, Cityscapes: "all networks are trained with the same setting",
               SGD with batch 16, 50,000 steps, learning rate 0.01, power 0.9 of the
               "poly" decay, weight decay 5e-4, images flipped, scaled by 0.75 to 2, and
               cropped to 1024. Sec. 8: 120 epochs with batch 16, for Context crop 512
               and learning rate 1e-3, for ADE20K crop 512 and 1e-2, for CamVid crop 640
               and 1e-3. Sec. 8 is silent on decay, power and scale, and on whether
               CamVid's val images are trained on.
        Code:  SFSegNets has no script for ADE20K, Context or CamVid. Those for
               Cityscapes have 300 epochs, power 1, weight decay 1e-4, scale 0.5 to 2,
               random colours and blur, and half of the crops drawn so that rare classes
               come as often as frequent ones. TorchCV is nearly as the paper on
               Cityscapes, with scale 0.7 to 2.1 and batch 8, and has no file for ADE20K
               or Context either.
        Here:  As the paper; where Sec. 8 is silent, the setting of Sec. 4.1. The
               scripts' values are `--weight-decay 1e-4 --power 1 --scale 0.5 2`.
        Effect: Not measured.
    N15 Pyramid pooling, and PSPNet.
        Paper: Takes PPM from PSPNet and gives no widths. Tables 4 and 5 compare with
               PSPNet's own scores.
        Code:  Each of the pooled maps gets the pyramid's width D through a 1x1
               convolution and a batch norm, with no ReLU behind them, and a 1x1
               convolution joins all. In PSPNet's own code and in mmsegmentation, whose
               PSPNet NRD's tables list, there is a ReLU, and a 3x3 convolution joins.
        Here:  SFNet as its code; `context="ppm-relu"` adds the ReLU. The variant
               `pspnet` has both the ReLU and the 3x3 convolution. It still differs from
               PSPNet's code, which dilates the first block of a stage like the others,
               and from mmsegmentation, which enlarges without aligned corners [N3].
        Effect: The ReLU changes no printed digit of a cost; `pspnet` comes within
               0.05 % of the printed costs. On scores: not measured.
    N16 Scales in testing.
        Paper: Tables 1 to 3 and 6 use one scale and the whole image. Sec. 7 states for
               the test set of Cityscapes, Tables 4 and 8, "7 scales 0.5, 0.75, 1, 1.25,
               1.5, 1.75, 2.0 with flip operation"; Table 7 uses windows and flipping.
               Table 5 is multi-scale with flipping and names no scales.
        Code:  Its script for the test set of Cityscapes uses the same seven scales, in
               sliding windows.
        Here:  `evaluate.py score RUN --flip --scales 0.5 0.75 1 1.25 1.5 1.75 2`, and
               --window for windows. Without options: one scale, the whole image.
        Effect: Not measured.
    N17 What the paper has and this file has not.
        Paper: DenseASPP in Table 1 (c); in Table 3, SFNet trained first for 50,000
               steps on train and val of Mapillary Vistas, with the longer side of each
               image resized to 2048, and then for 50,000 on Cityscapes "with the same
               setting".
        Code:  Has a script for Mapillary, and no DenseASPP.
        Here:  Mapillary is read, and what is trained from its weights has a recipe of
               its own ("finetuned cityscapes"), the same setting once more. Not run.
        Effect: Mapillary gains 1.5 points on the test set: 80.4 instead of 78.9 in
               Table 3. The row of DenseASPP is not reproduced here.
    N18 DF1 and DF2.
        Paper: Encoders of Tables 1 (d), 3 and 6, taken from another paper, with 9.03
               and 10.53 M parameters in Table 3. Which maps the pyramid reads, and how
               wide it is, is not said.
        Code:  Three levels, of 128, 256 and 512 channels; a pyramid of 64. DF1 has its
               last two levels at 1/32, and nothing of its pyramid is finer than 1/16.
        Here:  The code's levels, with a pyramid of 128, as on ResNet-18. `--set
               channels=64` is the code's. ShuffleNetV2, of which nothing is said
               either, has levels at 1/32, 1/16 and 1/8 and a pyramid of 128.
        Effect: With 128 the GMACs of Table 1 (d) are met within 0.8 % (DF1) and 0.4 %
               (DF2); with 64 they would be 12 and 17 % below. The parameters are 9.24
               and 18.70 M, with 64 8.42 and 17.88 M. DF2 alone has 17.47 M, so the
               10.53 of the table cannot be its. On scores: not measured.

Run
    python sfnet.py [FILE.png]                 shapes, and a picture, seconds on a CPU
    python train.py --method sfnet             on procedural streets, minutes
    python train.py --method sfnet --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import DeformConv2d, deform_conv2d

from common import (ASPP, Stages, UserError, check_batch, class_patches, conv_bn,
                    conv_bn_relu, dilate_stage, fcn_heads, full_precision,
                    label_colours, make_encoder, placed_panel, rows_at, show_errors,
                    synthetic_scene, viewable, widened)

# --- 1. Config -----------------------------------------------------------------------

VARIANTS = {
    "default": {},
    # Table 1 (a): from FCN to FAM + PPM
    "fcn": {"decoder": "fcn", "context": "conv"},  # [N12]
    "dilated-fcn": {"decoder": "fcn", "context": "conv", "output_stride": 8},
    "fpn-no-ppm": {"context": "none", "aligned": ()},
    "no-ppm": {"context": "none"},
    "fpn": {"aligned": ()},  # literally SFNet in which every flow is zero
    # Table 1 (b): which levels are aligned with the next finer one
    "fam-f3": {"aligned": (3,)},
    "fam-f4": {"aligned": (4,)},
    "fam-f5": {"aligned": (5,)},
    "fam-f4-f5": {"aligned": (4, 5)},  # [N13]
    # Table 1 (c): context modules, without DenseASPP  [N12] [N17]
    "aspp": {"context": "aspp"},
    "non-local": {"context": "non-local"},
    # Table 2: inside FAM
    "fam-deconv": {"upsampling": "deconv"},
    "fam-nearest": {"upsampling": "nearest"},
    "k1": {"kernel": 1},  # [N11]
    "k5": {"kernel": 5},
    "k7": {"kernel": 7},
    "correlation": {"align": "correlation", "aligned": (5,)},  # [N12]
    "dcn-f5": {"align": "dcn", "aligned": (5,)},
    "dcn": {"align": "dcn"},
    # the network that both SFNet and NRD compare with  [N15]
    "pspnet": {"decoder": "fcn", "context": "psp", "output_stride": 8, "channels": 512},
    # SFSegNets' network, for its checkpoints  [N2] [N5] [N10]
    "released": {"flow_unit": "released", "ceil_mode": False, "extra_dilation": True},
}

FROM_SCRATCH = {}  # options of `build` in train.py's own recipes
SEC41 = "paper, Sec. 4.1"
SEC8 = "paper, Sec. 8"
SAME = "paper, Sec. 4.1, since Sec. 8 names none"
SEC7 = "paper, Sec. 7"
DEEP = ("by its parameters the paper's is {0}s, with a deep stem, for which "
        "torchvision has no weights: --backbone {0}s --weights FILE")  # [N1] [N10]
SHARED = {"weights": ("imagenet", "paper, Sec. 3.3"), "momentum": (0.9, SEC41),
          "weight_decay": (5e-4, SEC41), "power": (0.9, SEC41),
          "min_lr": (0.0, "paper, Sec. 4.1: poly ends at 0"),
          "warmup": (0, "the paper names none"), "scale": ((0.75, 2.0), SEC41),
          "photometric": (False, "paper, Sec. 4.1: flip, scale and crop only"),
          "ohem": (0.1, "paper, Sec. 3.3"),  # [N8]
          "ohem_threshold": (0.0, "paper, Sec. 3.3"),
          "aux_weight": (1.0, "official code")}
OTHERS = SHARED | {  # Sec. 8: data sets other than Cityscapes
    "momentum": (0.9, SAME), "weight_decay": (5e-4, SAME), "power": (0.9, SAME),
    "min_lr": (0.0, SAME), "scale": ((0.75, 2.0), SAME), "photometric": (False, SAME),
    "batch": (16, SEC8), "epochs": (120, SEC8)}
CITYSCAPES = SHARED | {
    "backbone": ("resnet18", DEEP.format("resnet18")), "batch": (16, SEC41),
    "lr": (0.01, SEC41), "crop": ((1024, 1024), SEC41), "iterations": (50_000, SEC41)}
RECIPES = {  # [N14]; the scales of testing are no part of it  [N16]
    "cityscapes": CITYSCAPES,
    # Table 3, the row with a dagger: the first run, and what is started from it  [N17]
    "mapillary": CITYSCAPES | {
        "iterations": (50_000, SEC7),
        "base_size": ((2048, 2048), SEC7 + ": the longer side")},
    "finetuned cityscapes": CITYSCAPES | {"iterations": (50_000, SEC7)},
    "ade20k": OTHERS | {
        "backbone": ("resnet50", DEEP.format("resnet50")), "lr": (0.01, SEC8),
        "crop": ((512, 512), SEC8)},
    "context60": OTHERS | {
        "backbone": ("resnet50", DEEP.format("resnet50")), "lr": (0.001, SEC8),
        "crop": ((512, 512), SEC8)},
    "camvid": OTHERS | {
        "backbone": ("resnet18", DEEP.format("resnet18")), "lr": (0.001, SEC8),
        "crop": ((640, 640), SEC8)},
}

# --- 2. Equations --------------------------------------------------------------------


# task: minutes=15 points=5 section='Sec. 3.1' hides=efficientfcn.to_corners
def enlarge(x: Tensor, size: tuple[int, int],
            rows: tuple[int, int] | None = None) -> Tensor:
    """Bilinear enlargement that keeps the corners: 0 goes to 0, h-1 to q-1.  [N3]

    x (B, C, h, w), size (q, r) -> (B, C, q, r); with rows (lo, hi) the rows lo..hi-1
    of that alone, (B, C, hi - lo, r), so that a large image can be done in strips.
    `rows_at` in common.py gives the rows of x at fractional positions.
    """
    q, r = size
    if rows:
        lo, hi = rows
        h = x.shape[-2]
        y = torch.arange(lo, hi, dtype=torch.float64)
        x = rows_at(x, y * (h - 1) / max(q - 1, 1))
        q = hi - lo  # as many rows as x has now: below only the columns get more
    # A single row is the first of two: torch.export cannot divide by its q - 1 = 0.
    x = F.interpolate(x, (max(q, 2), max(r, 2)), mode="bilinear", align_corners=True)
    return x[..., :q, :r]


def concatenate(coarse: Tensor, fine: Tensor) -> Tensor:
    """The cat of Eq. (1): (B, C, q, r) twice -> (B, 2*C, q, r), coarse map first."""
    return torch.cat([coarse, fine], dim=1)


def predict_flow(coarse: Tensor, fine: Tensor, convolution, *,
                 match=concatenate) -> Tensor:
    """Eq. (1): flow = conv_l(cat(F_l, F_(l-1))), where F_l is already enlarged.

    (B, C, q, r) twice -> (B, 2, q, r): channel 0 along x, channel 1 along y. It is a
    flow as in a video: per position of the fine map, how far from there to look in the
    coarse one. In Table 2 (c) `match` is `correlation` instead of cat.
    """
    return convolution(match(coarse, fine))


def in_pixels(flow: Tensor, unit: str) -> Tensor:
    """A predicted flow (B, 2, q, r) in the unit of Eq. (2), pixels of the finer map.

    In the unit "released" the flow is divided by (r, q) and then added to a grid that
    is 2 long and r - 1 pixels wide: 1 is (r - 1) / (2 r) pixels.  [N2]
    """
    if unit == "pixels":
        return flow
    q, r = flow.shape[-2:]
    x = flow[:, 0] * (r - 1) / (2 * r)  # (B, q, r)
    y = flow[:, 1] * (q - 1) / (2 * q)  # (B, q, r)
    return torch.stack([x, y], dim=1)


# task: minutes=25 points=8
def source_points(flow: Tensor, coarse_size: tuple[int, int]) -> Tensor:
    """Eq. (2): p_l = (p_(l-1) + flow(p_(l-1))) / 2, for every fine position.

    flow (B, 2, q, r) in pixels of the finer map [N2], coarse_size (h, w) -> p_l, the
    same shape and dtype, in pixels of the coarser one, x before y. In 16 bits positions
    beyond 256 would be off, so FAM.forward gives the flow in float32.

    The half is written (h - 1) / (q - 1). It is exactly 1/2 where q = 2h - 1 [N5];
    otherwise multiplying by 1/2 would no longer send the last position to the last.
    """
    B, _, q, r = flow.shape
    h, w = coarse_size
    columns = torch.arange(r, device=flow.device, dtype=flow.dtype)
    rows = torch.arange(q, device=flow.device, dtype=flow.dtype)[:, None]
    x = columns + flow[:, 0]  # (B, q, r)
    y = rows + flow[:, 1]  # (B, q, r)
    # A map of one row or column has no far end: max(.., 1) keeps 0 / 0 away.
    return torch.stack([x * (w - 1) / max(r - 1, 1), y * (h - 1) / max(q - 1, 1)], 1)


# task: minutes=30 points=9 needs=sfnet.source_points
def sample(coarse: Tensor, points: Tensor) -> Tensor:
    """Eq. (3): a weighted sum of the four neighbours of each p_l, the near weigh more.

    coarse (B, D, h, w), points (B, 2, q, r) -> (B, D, q, r); neighbours outside the
    map count as zero [N4]. The weights depend on p_l, and so on the flow, which is how
    the flow gets a gradient. The loop over the four neighbours is `warp_slowly` in
    tests/test_sfnet.py.
    """
    h, w = coarse.shape[-2:]
    x, y = points.unbind(dim=1)
    # grid_sample calls the centres of the first and the last pixel -1 and 1.
    grid = torch.stack([2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1], dim=-1)
    return F.grid_sample(coarse, grid, padding_mode="zeros", align_corners=True)


# task: minutes=10 points=5 needs=sfnet.sample
def warp(coarse: Tensor, flow: Tensor) -> Tensor:
    """Fig. 3 (b): coarse (B, D, h, w), flow (B, 2, q, r) -> coarse at p + flow(p).

    Zero flow is `enlarge`; a flow of (1, 0) everywhere fetches each feature one fine
    pixel further right, so the picture moves to the *left*.
    """
    return sample(coarse, source_points(flow, coarse.shape[-2:]))


# task: minutes=25 points=7
def correlation(coarse: Tensor, fine: Tensor, *, reach: int) -> Tensor:
    """FlowNet-C: how well coarse(p + o) fits fine(p), for every offset o in reach.

    (B, C, q, r) twice -> (B, (2*reach + 1)^2, q, r), the mean over channels of the
    product; offsets row by row, zero outside the map. Sec. 3.2 doubts that maps which
    differ so much in meaning can be matched.
    """
    B, C, q, r = fine.shape
    side = 2 * reach + 1
    padded = F.pad(coarse, (reach,) * 4)
    scores = [(padded[..., y:y + q, x:x + r] * fine).mean(dim=1)
              for y in range(side) for x in range(side)]
    return torch.stack(scores, dim=1)


# --- 3. Layers -----------------------------------------------------------------------


class FAM(nn.Module):
    """Flow alignment module, Fig. 3 (a): bring the coarse map onto the fine one's grid.

    coarse (B, D, h, w), fine (B, D, q, r) -> aligned coarse (B, D, q, r). The flow is
    predicted from reduced copies; what is warped is the coarse map itself.
    """

    def __init__(self, channels: int, *, kernel=3, upsampling="bilinear",
                 reach: int | None = None, flow_unit="pixels"):
        super().__init__()
        self.flow_unit = flow_unit  # [N2]
        half = channels // 2
        self.reduce_coarse = nn.Conv2d(channels, half, 1, bias=False)  # [N1]
        self.reduce_fine = nn.Conv2d(channels, half, 1, bias=False)
        # Table 2 (a). Whatever it is, it is called as up(x, size).
        if upsampling == "bilinear":
            self.up = enlarge
        elif upsampling == "nearest":
            self.up = partial(F.interpolate, mode="nearest")
        else:
            # Like `enlarge` it centres output 2i on input i: kernel 3, padding 1. With
            # stride 2 it can give 2n - 1 or 2n rows for n; `size` says which.
            self.up = nn.ConvTranspose2d(half, half, 3, 2, padding=1, bias=False)
        # Table 2 (c): what shows the convolution how the two maps fit together.
        if reach is None:
            self.match = concatenate
            matched = 2 * half
        else:
            self.match = partial(correlation, reach=reach)
            matched = (2 * reach + 1)**2
        self.flow = nn.Conv2d(matched, 2, kernel, padding=kernel // 2, bias=False)

    # task: minutes=25 points=8 needs=sfnet.warp section='Fig. 3 (a)'
    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """coarse (B, D, h, w), fine (B, D, q, r) -> coarse on fine's grid (B, D, q, r).

        Both maps are reduced to D/2 channels. The reduced coarse one is then enlarged
        by self.up(x, size), and self.flow predicts the flow from both, which self.match
        has brought together: `predict_flow`, Eq. (1). In pixels (`in_pixels`) it warps
        `coarse` itself, in float32 also under autocast (full_precision) and in a model
        in 16 bits (widened), which gets the result in the type of its weights.
        """
        B, D, q, r = fine.shape
        fine_code = self.reduce_fine(fine)  # (B, D/2, q, r)
        coarse_code = self.up(self.reduce_coarse(coarse), (q, r))  # (B, D/2, q, r)
        flow = predict_flow(coarse_code, fine_code, self.flow,
                            match=self.match)  # (B, 2, q, r)
        # Half precision knows positions beyond 256 to a quarter pixel at best, so the
        # sampling points are computed in float32 even where autocast is on.
        with full_precision(flow):
            aligned = warp(widened(coarse), in_pixels(widened(flow), self.flow_unit))
        return aligned.to(self.flow.weight.dtype)


class ZeroFlow(nn.Module):
    """Plain enlargement: what FAM does when every flow is zero. It learns nothing.

    It stands in the pyramid wherever there is no FAM. Where it stands at every level,
    in the variant `fpn`, the network is literally SFNet with zero flow, and that is
    the ordinary feature pyramid of Sec. 3.1.
    """

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return enlarge(coarse, fine.shape[-2:])


class Deformable(nn.Module):
    """Table 2 (d): a deformable 3x3 convolution (Dai et al., 2017) in FAM's place.

    Each of the 9 taps of the kernel has a flow of its own, and the result is a new
    feature, not the coarse one from elsewhere. The offsets start at 0, so that at first
    this is an ordinary convolution. They can leave 0, since what gives them their
    gradient is the convolution's weights, and those start at random values.  [N12]
    """

    def __init__(self, channels: int):
        super().__init__()
        self.offsets = nn.Conv2d(2 * channels, 2 * 9, 3, padding=1)
        self.convolution = DeformConv2d(2 * channels, channels, 3, padding=1)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        B, D, q, r = fine.shape
        both = concatenate(enlarge(coarse, (q, r)), fine)  # (B, 2*D, q, r)
        offsets = self.offsets(both)  # (B, 18, q, r)
        # Its sampling points, too, need float32: 16 bits round what lies beyond 256.
        layer = self.convolution
        with full_precision(both):
            moved = deform_conv2d(widened(both), widened(offsets),
                                  widened(layer.weight), widened(layer.bias),
                                  padding=layer.padding)
        return moved.to(layer.weight.dtype)


def conv_bias_bn_relu(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """common.conv_bn_relu with the released code's needless bias.  [N9]"""
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2),
                         nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class PPM(nn.Module):
    """Pyramid pooling (PSPNet): the map beside its averages over 1, 4, 9 and 36 cells.

    An average over a whole cell tells each position what else is in the scene. `relu`
    and a `projection` of 3 make it the one of PSPNet itself.  [N15]
    """

    def __init__(self, in_channels: int, channels: int, *, bins=(1, 2, 3, 6),
                 projection=1, relu=False):
        super().__init__()
        reduce = partial(conv_bn_relu, kernel=1) if relu else conv_bn
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *reduce(in_channels, channels))
            for side in bins)
        self.project = nn.Sequential(
            *conv_bn_relu(in_channels + len(bins) * channels, channels, projection),
            nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for branch in self.branches:
                check_batch(len(x) * branch[0].output_size**2, branch)
        views = [enlarge(branch(x), x.shape[-2:]) for branch in self.branches]
        return self.project(torch.cat(views + [x], dim=1))


class NonLocal(nn.Module):
    """Table 1 (c): every position looks at every other (Wang et al., 2018).  [N12]

    y_i = sum_j softmax_j(theta_i . phi_j) g_j, added to x through a 1x1 with batch
    norm. No biases: one in phi would add the same to all j, and softmax forgets it.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        # theta, phi and g at once, each with half of the channels.
        self.split = nn.Conv2d(in_channels, 3 * (in_channels // 2), 1, bias=False)
        self.back = conv_bn(in_channels // 2, in_channels)
        self.project = conv_bn_relu(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        theta, phi, g = self.split(x).flatten(2).chunk(3, dim=1)
        # (B, h*w, C/2) x (B, C/2, h*w) -> (B, h*w, h*w)
        attention = torch.bmm(theta.mT, phi).softmax(dim=2)  # (B, h*w, h*w)
        # (B, C/2, h*w) x (B, h*w, h*w) -> (B, C/2, h*w)
        y = torch.bmm(g, attention.mT).reshape(B, C // 2, h, w)  # (B, C/2, h, w)
        return self.project(x + self.back(y))


def supervision_head(channels: int, num_classes: int) -> nn.Sequential:
    """The auxiliary classifier of one sum, which helps it learn; gone in eval.  [N8]"""
    return nn.Sequential(*conv_bias_bn_relu(channels, channels, 3), nn.Dropout2d(0.1),
                         nn.Conv2d(channels, num_classes, 1))


class AlignedFPN(nn.Module):
    """Sec. 3.3: from coarse to fine, align and add; then classify all levels at once.

    stages: the encoder's stages on the way down, coarse first, and the channels of
    each. align: for each stage the module that brings the coarser sum onto its grid,
    called as align(coarse, fine).
    """

    def __init__(self, stages: dict[str, int], channels: int, num_classes: int,
                 align: dict[str, nn.Module]):
        super().__init__()
        D = channels
        n = 1 + len(stages)  # the sums and the context
        self.stages = tuple(stages)
        self.align = nn.ModuleDict(align)
        self.laterals = nn.ModuleDict({stage: conv_bias_bn_relu(C, D, 1)
                                       for stage, C in stages.items()})
        self.smooth = nn.ModuleDict({stage: conv_bn_relu(D, D) for stage in stages})
        self.fuse = nn.Sequential(*conv_bn_relu(n * D, D), nn.Conv2d(D, num_classes, 1))

    # task: minutes=25 points=8 needs=sfnet.FAM.forward section='Sec. 3.3'
    def top_down(self, context: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
        """One sum per stage, coarse first. The next finer one builds on it as it is.

        context (B, D, h, w) -> [(B, D, q, r) of each stage]. A sum is the lateral's
        output plus the coarser sum on its grid: align(coarse, fine), where `fine` is
        the lateral's output, too.
        The 3x3 convolutions of `forward` do not lie on this way.  [N7]
        """
        coarse = context
        sums = []
        for stage in self.stages:
            fine = self.laterals[stage](features[stage])
            coarse = fine + self.align[stage](coarse, fine)
            sums.append(coarse)
        return sums

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        """-> logits at the finest stage, and the maps that auxiliary heads look at."""
        sums = self.top_down(context, features)
        levels = [context] + [self.smooth[s](x) for s, x in zip(self.stages, sums)]
        B, D, q, r = sums[-1].shape
        n = len(levels)
        views = [enlarge(x, (q, r)) for x in levels]  # no FAM here  [N6]
        fused = torch.cat(views, dim=1)  # (B, n*D, q, r)
        return self.fuse(fused), sums


class FCNDecoder(nn.Module):
    """Table 1 (a) and PSPNet: classify the context where it is, no way down at all."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        return self.classify(context), [features["res4"]]


# (width, blocks) of each group of res3, res4 and the two parts of res5: DF1 and DF2 of
# Partial Order Pruning (arXiv:1903.03777).
DF = {"df1": ([(64, 3)], [(128, 3)], [(256, 3)], [(512, 1)]),
      "df2": ([(64, 2), (128, 1)], [(128, 10), (256, 1)], [(256, 4)], [(512, 2)])}
# The stages that stand for F_4 and F_3, of 256 and 128 channels.  [N18]
DF_PYRAMID = {"df1": {4: "res5a", 3: "res4"}, "df2": {4: "res4", 3: "res3"}}


def blocks(in_channels: int, groups: list[tuple[int, int]], stride: int):
    """ResNet-18's blocks; the first has the stride, a 1x1 fits its shortcut."""
    layers = []
    for width, count in groups:
        for _ in range(count):
            shortcut = None
            if stride > 1 or width != in_channels:
                shortcut = conv_bn(in_channels, width, stride=stride)
            layers.append(BasicBlock(in_channels, width, stride, shortcut))
            in_channels = width
            stride = 1
    return nn.Sequential(*layers)


class DFEncoder(nn.Module):
    """DF1 or DF2, made for speed: no pooling, and thin until 1/8.  [N18]

    images (B, 3, H, W) -> {"stem": (B, 32, H/2, W/2), "res2": (B, 64, H/4, W/4), "res3"
    at 1/8, "res4" at 1/16, "res5a" and "res5" at 1/32}; every size is rounded up.
    `pyramid` says which stages stand for the levels F_4 and F_3 of the paper.
    """

    def __init__(self, name: str, *, output_stride=32):
        super().__init__()
        self.in_channels = 3
        self.output_stride = output_stride
        res3, res4, res5a, res5 = DF[name]
        width3, width4, width5a, width5 = (groups[-1][0] for groups in DF[name])
        self.stem = conv_bn_relu(3, 32, stride=2)
        self.res2 = conv_bn_relu(32, 64, stride=2)
        self.res3 = blocks(64, res3, stride=2)
        self.res4 = blocks(width3, res4, stride=2)
        self.res5a = blocks(width4, res5a, stride=2)
        self.res5 = blocks(width5a, res5, stride=1)
        self.channels = Stages(name, stem=32, res2=64, res3=width3, res4=width4,
                               res5a=width5a, res5=width5)
        self.pyramid = DF_PYRAMID[name]
        if output_stride < 32:
            dilate_stage(nn.Sequential(self.res5a, self.res5), 32 // output_stride)
        if output_stride < 16:
            dilate_stage(self.res4, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stem = self.stem(images)
        res2 = self.res2(stem)
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        if self.training and self.output_stride == 32:
            check_batch(res4[:, 0, ::2, ::2].numel(), self.res5)
        res5a = self.res5a(res4)
        return {"stem": stem, "res2": res2, "res3": res3, "res4": res4, "res5a": res5a,
                "res5": self.res5(res5a)}


ENCODERS = {name: partial(DFEncoder, name) for name in DF}  # for every method


# --- 4. Model ------------------------------------------------------------------------


class SFNet(nn.Module):
    """Fig. 3 (c): encoder without dilation, PPM, pyramid whose levels are aligned."""

    def __init__(self, encoder: nn.Module, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.decoder = decoder
        self.aux_heads = aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, H, W), ...]}."""
        logits, aux = self.decode(images)
        return {"out": self.to_pixels(logits, images.shape[-2:]), "aux": aux}

    def decode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) -> logits (B, K, q, r), auxiliary ones (at H, W).

        They are at the size of the finest level: 1/4 of the image with a ResNet, 1/8
        with ShuffleNetV2 and DF2, 1/16 with DF1. A decoder without a way down, `fcn`,
        leaves them at the context's size.
        """
        H, W = images.shape[-2:]
        features = self.encoder(images)
        context = self.context(features["res5"])  # F_5 of the pyramid
        logits, sums = self.decoder(context, features)
        # segmentation_loss would enlarge them too, but without aligned corners.  [N3]
        aux = [enlarge(widened(head(x)), (H, W))
               for head, x in zip(self.aux_heads, sums) if self.training]
        return logits, aux

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """logits (B, K, q, r), size (H, W) -> (B, K, H, W), or its rows lo..hi-1 alone.

        The last step. There is nothing to learn in it.
        """
        return enlarge(widened(logits), size, rows)


# What makes the context out of res5, called as context(in_channels, channels).
CONTEXTS = {"ppm": PPM, "ppm-relu": partial(PPM, relu=True),  # [N15]
            "none": partial(conv_bn_relu, kernel=1), "conv": conv_bn_relu,
            "aspp": partial(ASPP, separable=False, projection=1),  # [N12]
            "non-local": NonLocal, "psp": partial(PPM, projection=3, relu=True)}


def dilate_second_convolutions(encoder: nn.Module) -> None:
    """The released dilation of res4 and res5, which all the same keep their stride.

    torchvision calls the second convolution of a block conv2: in a ResNet-18 the second
    of its two 3x3, in the deeper ones the only 3x3, which may have stride 2 besides.
    """
    for stage, dilation in ((encoder.res4, 2), (encoder.res5, 4)):
        for name, layer in stage.named_modules():
            if name.endswith("conv2"):
                layer.dilation = (dilation, dilation)
                layer.padding = (dilation, dilation)


def build(num_classes: int, *, backbone="resnet18", weights="none", decoder="fpn",
          context="ppm", channels: int | None = None,
          aligned: tuple[int, ...] | None = None, align="fam", upsampling="bilinear",
          kernel=3, flow_unit="pixels", output_stride=32, ceil_mode=True,
          extra_dilation=False, aux=True) -> SFNet:
    """SFNet or one of its rivals; VARIANTS names the rows of the paper's tables.

    context         'ppm', 'ppm-relu', 'psp' (N15), 'none', 'conv', 'aspp', 'non-local'
    channels        the width D; None: 128 for ResNet-18, ShuffleNetV2 and DF [N18],
                    else 256
    aligned         the levels l whose map F_l is aligned with F_(l-1) (Table 1 b);
                    None: all that the pyramid has
    align           by 'fam', 'correlation' (Table 2 c) or 'dcn' (Table 2 d)
    upsampling      of the coarse map before the flow is predicted (Table 2 a)
    kernel          of the flow convolution (Table 2 b)
    flow_unit       'pixels' of the finer map, as in Eq. (2), or 'released'  [N2]
    ceil_mode       max pooling rounds up  [N5]
    extra_dilation  dilate res4 and res5 in spite of their stride, as released  [N10]
    """
    encoder = make_encoder(backbone, num_classes, weights=weights,
                           output_stride=output_stride, ceil_mode=ceil_mode)
    thin = backbone.startswith(("resnet18", "shufflenet", "df"))
    usual = 128 if thin else 256
    D = usual if channels is None else channels
    fam = partial(FAM, D, kernel=kernel, upsampling=upsampling, flow_unit=flow_unit)
    aligners = {"fam": fam, "correlation": partial(fam, reach=4),
                "dcn": partial(Deformable, D)}
    for name, value, known in (
            ("decoder", decoder, ("fpn", "fcn")), ("context", context, CONTEXTS),
            ("align", align, aligners),
            ("upsampling", upsampling, ("bilinear", "nearest", "deconv")),
            ("flow_unit", flow_unit, ("pixels", "released"))):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if extra_dilation:
        if output_stride != 32 or not backbone.startswith("resn"):
            raise UserError("extra_dilation is for a ResNet of output stride 32")
        dilate_second_convolutions(encoder)
    context_module = CONTEXTS[context](encoder.channels["res5"], D)
    if decoder == "fcn":
        return SFNet(encoder, context_module, FCNDecoder(D, num_classes),
                     fcn_heads(encoder, num_classes, aux))
    pyramid = getattr(encoder, "pyramid", {4: "res4", 3: "res3", 2: "res2"})  # [N18]
    if backbone.startswith("shufflenet"):
        # It has no stage at 1/4, only its pooled stem: classify at 1/8.
        pyramid = {4: "res4", 3: "res3"}
    levels = [level + 1 for level in pyramid]
    if aligned is not None and not set(aligned) <= set(levels):
        raise UserError(f"aligned={aligned!r}: with {backbone} the levels are {levels}")
    if upsampling == "deconv" and backbone == "df1":
        raise UserError("upsampling='deconv' doubles a map: F_5 and F_4 of df1 are "
                        "equally large")
    stages = {stage: encoder.channels[stage] for stage in pyramid.values()}
    # Two names for one module. The paper calls a FAM after the coarse map F_l that it
    # moves; the pyramid, which goes from stage to stage, keeps it at the fine stage
    # l - 1 that receives the result. So the FAM "at F_5" is align["res4"].
    align_modules = {}
    for level, stage in pyramid.items():
        has_flow = aligned is None or level + 1 in aligned
        align_modules[stage] = aligners[align]() if has_flow else ZeroFlow()
    heads = [supervision_head(D, num_classes) for _ in stages if aux]
    return SFNet(encoder, context_module,
                 AlignedFPN(stages, D, num_classes, align_modules),
                 nn.ModuleList(heads))


def official_names() -> dict[str, str]:
    """{beginning of a name in our state_dict: of the same layer's in SFSegNets'}.

    Its lists over levels begin with the finest, at res2, our auxiliary heads with the
    coarsest, at res4.
    """
    names = {"encoder.stem.": "layer0.", "encoder.res5.": "layer4.",
             "context.branches.": "head.ppm.stages.",
             "context.project.": "head.ppm.bottleneck.",
             "decoder.fuse.3.": "head.conv_last.1.",
             "decoder.fuse.": "head.conv_last.0."}
    for i, stage in enumerate(("res2", "res3", "res4")):
        fam = f"head.fpn_out_align.{i}"
        names |= {f"encoder.{stage}.": f"layer{i + 1}.",
                  f"decoder.laterals.{stage}.": f"head.fpn_in.{i}.",
                  f"decoder.smooth.{stage}.": f"head.fpn_out.{i}.0.",
                  f"decoder.align.{stage}.reduce_coarse.": f"{fam}.down_h.",
                  f"decoder.align.{stage}.reduce_fine.": f"{fam}.down_l.",
                  f"decoder.align.{stage}.flow.": f"{fam}.flow_make.",
                  f"aux_heads.{2 - i}.": f"head.dsn.{i}."}
    return names


def convert(state: dict, model: SFNet) -> dict[str, Tensor]:
    """A checkpoint of SFSegNets (AlignNetResNet, head v1) as a state_dict of `model`.

    The model that computes the same is the variant `released` on resnet18s, resnet50s
    or resnet101s, with aux=False if the checkpoint was trained without auxiliary heads.
    Whether res4 and res5 were dilated, the code's default, no checkpoint says.  [N10]
    Nothing is left out on either side, but for tensors of a loss (criterion) and of
    ImageNet's classifier (fc): what does not fit is an error that names it.
    """
    for module in model.modules():
        if isinstance(module, FAM) and module.flow_unit != "released":
            raise UserError("the checkpoint's flow is in the released unit, the "
                            "model's is not: build sfnet:released (note N2)")
    if any(getattr(layer, "ceil_mode", False) for layer in model.encoder.modules()):
        raise UserError("the checkpoint's pooling rounds down, the model's up: build "
                        "sfnet:released, or pass ceil_mode=False (note N5)")
    state = {name.removeprefix("module."): value
             for name, value in state.get("state_dict", state).items()}
    converted = {}
    wrong = []
    for name, own in model.state_dict().items():
        official = next((theirs + name.removeprefix(ours) for ours, theirs
                         in official_names().items() if name.startswith(ours)), name)
        value = state.pop(official, None)
        if value is None and name.endswith("num_batches_tracked"):
            value = own  # older files have no such counters, and nothing reads them
        if value is None or value.shape != own.shape:
            wrong.append(official)
        elif name == "decoder.fuse.0.weight":
            # The channels of n levels side by side: finest first there, last here. [N6]
            levels = value.unflatten(1, (1 + len(model.decoder.stages), -1))
            converted[name] = levels.flip(1).flatten(1, 2)
        else:
            converted[name] = value
    wrong += [name for name in state if not name.startswith(("criterion.", "fc."))]
    if wrong:
        raise UserError(f"{len(wrong)} tensors of the checkpoint and the model do not "
                        f"fit ({', '.join(wrong[:3])}{' ..' if wrong[3:] else ''}): "
                        f"another backbone, variant or number of classes, or aux")
    return converted


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: SFNet, image: Tensor, *, palette=None, classes=None):
    """Figs. 2 and 5 from the model's own tensors: what the flow is and what it does.

    image (1, 3, H, W), normalised -> matplotlib Figure of three rows: the flow of the
    finest FAM as arrows and in colours; one channel of the coarse map before and after
    alignment; the labels with the flow and with zeros in its place. Every position and
    length is in pixels of the image. `classes` are the names in the legend.
    """
    from matplotlib.figure import Figure
    modules = getattr(model.decoder, "align", {})  # an FCNDecoder aligns nothing
    fams = {stage: m for stage, m in modules.items() if isinstance(m, FAM)}
    if not fams:
        raise UserError("nothing to explain: this variant predicts no flow")
    _, _, H, W = image.shape
    logits, seen = watch(model, fams, image)
    plain_logits, _ = watch(model, fams, image, strength=0)
    labels = logits[0].argmax(0)  # (H, W)
    plain_labels = plain_logits[0].argmax(0)  # (H, W)

    stage = list(fams)[-1]  # the finest level that has a flow
    coarse, flow, aligned = seen[stage]
    B, D, h, w = coarse.shape
    q, r = flow.shape[-2:]
    plain = enlarge(coarse, (q, r))  # (B, D, q, r)
    flow = in_image(flow, (H, W))[0]  # (2, q, r)
    window = busiest(labels != plain_labels, flow.norm(dim=0))
    channel = most_moved(plain[0], aligned[0], window, (H, W))
    maps = [x[0, channel] for x in (coarse, plain, aligned)]

    height = min(WIDE * H / W, WIDE)  # of a panel, in inches
    figure = Figure(figsize=(14, 3 * (height + AROUND)))
    rows = [partial(placed_panel, figure, top=i * (height + AROUND) + 0.45,
                    height=height, width=WIDE, weight="bold") for i in range(3)]
    draw_flow(rows[0], viewable(image[0]), flow, window)
    draw_maps(rows[1], maps, window, labels, channel)
    draw_labels(rows[2], plain_labels, labels, window,
                label_colours(palette, logits.shape[1]), classes)
    return figure


# Tensors first.


def watch(model: SFNet, fams: dict[str, FAM], image: Tensor, *, strength=1.0):
    """Logits (B, K, H, W), and per stage what its FAM got, predicted and gave.

    That is the coarse map (B, D, h, w), the flow (B, 2, q, r) in pixels of the finer
    map and the aligned map (B, D, q, r). Each predicted flow is multiplied by
    `strength` before it is used: 0 turns every FAM into plain enlargement.
    """
    flows = {}
    seen = {}

    def scale(stage, layer, inputs, flow):
        flows[stage] = strength * flow
        return flows[stage]  # what a hook returns takes the place of the output

    def keep(stage, fam, inputs, aligned):
        seen[stage] = inputs[0], in_pixels(flows[stage], fam.flow_unit), aligned

    hooks = []
    for stage, fam in fams.items():
        hooks.append(fam.flow.register_forward_hook(partial(scale, stage)))
        hooks.append(fam.register_forward_hook(partial(keep, stage)))
    with torch.no_grad():
        logits = model(image)["out"]
    for hook in hooks:
        hook.remove()
    return logits, seen


def in_image(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """A flow (B, 2, q, r) from pixels of its own map to pixels of the image.

    The corners of map and image lie on each other [N3], so r - 1 steps from column to
    column are the image's W - 1.
    """
    H, W = size
    q, r = flow.shape[-2:]
    step = torch.tensor([(W - 1) / max(r - 1, 1), (H - 1) / max(q - 1, 1)])
    return flow * step[:, None, None].to(flow)


def busiest(changed: Tensor, length: Tensor) -> tuple[int, int, int, int]:
    """The window, a third of the image on each side, where most labels changed.

    changed (H, W), length (q, r) of the flow -> (top, left, height, width). Where no
    label changed, the longest flow decides.
    """
    H, W = changed.shape
    long = enlarge(length[None, None], (H, W))[0, 0]  # (H, W)
    amount = changed + 1e-3 * long / long.max().clamp(min=1e-6)
    steps = max(H // 24, 1), max(W // 24, 1)  # every pixel would take long
    sums = F.avg_pool2d(amount[None, None], (H // 3, W // 3), steps)[0, 0]
    row, column = divmod(sums.argmax().item(), sums.shape[1])
    return row * steps[0], column * steps[1], H // 3, W // 3


def most_moved(plain: Tensor, aligned: Tensor, window, size: tuple[int, int]) -> int:
    """The channel of (D, q, r) that the flow changes most inside the window.

    The change is measured in the channel's own standard deviation, or a channel of
    large values would always win.
    """
    top, left, height, width = window
    q, r = plain.shape[1:]
    inside = (slice(top * q // size[0], (top + height) * q // size[0] + 1),
              slice(left * r // size[1], (left + width) * r // size[1] + 1))
    change = (aligned - plain)[:, *inside].abs().mean(dim=(1, 2))
    return (change / plain.std(dim=(1, 2)).clamp(min=1e-6)).argmax().item()


def flow_colours(flow: Tensor, longest: float) -> Tensor:
    """(2, q, r) -> RGB (q, r, 3). White is no flow, full colour `longest` and more.

    Right is red, and the hue turns with the clock: down, left, up.
    """
    from matplotlib.colors import hsv_to_rgb
    hue = torch.atan2(flow[1], flow[0]) / (2 * torch.pi) % 1
    strength = (flow.norm(dim=0) / longest).clamp(max=1)
    hsv = torch.stack([hue, strength, torch.ones_like(hue)], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy()))


# Then the drawing. Lengths are in inches: 14 of them are the width of a web page, on
# which 12 points become 8.

WIDE = 3.7  # a panel
AROUND = 1.7  # title, caption and space of a row of panels
COLUMNS = (0.15, 4.25, 8.35, 12.3)  # left sides; the last is for the colours' legends


def on_image(axis, x: Tensor, size: tuple[int, int], **options):
    """A map (q, r) or (q, r, 3), cell by cell, in coordinates of the image's pixels.

    Its first and last positions are centred on the image's first and last pixels.
    """
    H, W = size
    q, r = x.shape[:2]
    dx = (W - 1) / max(r - 1, 1) / 2
    dy = (H - 1) / max(q - 1, 1) / 2
    drawn = axis.imshow(x.numpy(), extent=(-dx, W - 1 + dx, H - 1 + dy, -dy),
                        interpolation="nearest", **options)
    axis.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5), xticks=[], yticks=[])
    return drawn


def zoom(axis, window) -> None:
    top, left, height, width = window
    axis.set_xlim(left - 0.5, left + width - 0.5)
    axis.set_ylim(top + height - 0.5, top - 0.5)


def frame(axis, window) -> None:
    """The window as a frame, black on white, in a picture of the whole image."""
    from matplotlib.patches import Rectangle
    top, left, height, width = window
    for colour, thick in (("white", 4.5), ("black", 1.8)):
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False,
                                 edgecolor=colour, linewidth=thick))


def draw_flow(row, picture: Tensor, flow: Tensor, window) -> None:
    """Row 1: the image, the flow inside the window as arrows, all of it in colours."""
    size = picture.shape[:2]
    cell = round(size[1] / flow.shape[2])
    longest = max(flow.norm(dim=0).quantile(0.99).item(), 1e-6)
    axis = row(left=COLUMNS[0], title="The image", caption=(
        "The frame marks the part that most of the other pictures enlarge."))
    on_image(axis, picture, size)
    frame(axis, window)
    axis = row(left=COLUMNS[1], title="The flow as arrows", caption=(
        f"Each cell of the fine map, {cell} x {cell} pixels, fetches its coarse "
        "feature not from where it is but from the tip of its arrow."))
    on_image(axis, 0.6 + 0.4 * picture, size)  # pale, so that the arrows stand out
    draw_arrows(axis, flow, size, window)
    zoom(axis, window)
    axis = row(left=COLUMNS[2], title="The flow in colours", caption=(
        "The hue is the direction in which a cell looks, its strength how far: see how "
        "it changes from one side of a border to the other."))
    on_image(axis, flow_colours(flow, longest), size)
    frame(axis, window)
    draw_wheel(row(left=COLUMNS[3] + 0.3, width=0.9), longest)


def draw_arrows(axis, flow: Tensor, size: tuple[int, int], window) -> None:
    """flow (2, q, r), in pixels of the image, as arrows of true length.

    Not more than 24 arrows fit side by side into the window.
    """
    H, W = size
    q, r = flow.shape[1:]
    step = math.ceil(r * window[3] / W / 24)
    x = torch.linspace(0, W - 1, r)[::step]
    y = torch.linspace(0, H - 1, q)[::step]
    # angles="xy": y grows downwards in an image, and a positive flow must point down.
    axis.quiver(x, y, *flow[:, ::step, ::step], angles="xy", scale_units="xy", scale=1,
                width=0.006, headwidth=3.5, headlength=3.5, headaxislength=3)


def draw_wheel(axis, longest: float) -> None:
    """The legend of `flow_colours`: a disc of all flows up to the longest."""
    ramp = torch.linspace(-longest, longest, 201)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    colours = flow_colours(torch.stack([x, y]), longest)
    colours[x.hypot(y) > longest] = 1
    axis.imshow(colours.numpy(), extent=(-1, 1, 1, -1))
    axis.axis("off")
    for text, x, y in (("right", 1.1, 0), ("left", -1.1, 0), ("up", 0, -1.2),
                       ("down", 0, 1.2)):
        side = {"right": "left", "left": "right"}.get(text, "center")
        axis.text(x, y, text, fontsize=12, ha=side, va="center")
    axis.text(0, 1.75, f"rim: {longest:.2g} pixels\nof the image", fontsize=12,
              ha="center", va="top")


def draw_maps(row, maps: list[Tensor], window, labels: Tensor, channel: int) -> None:
    """Row 2: a channel of the coarse map, enlarged, and aligned, inside the window."""
    panels = (
        ("Coarse map", f"Channel {channel} of the coarser level knows what is there, "
         "but not where: the borders of the labels (white) cut through its cells."),
        ("Enlarged without flow", "In an ordinary feature pyramid each cell fetches "
         "from where it is: neighbours blur into each other."),
        ("Fetched along the flow", "Here it fetches the same numbers from the tip of "
         "its arrow, and the result is added to the fine map."))
    top, left, height, width = window
    low = min(x.min().item() for x in maps)
    high = max(x.max().item() for x in maps)
    for place, x, (title, caption) in zip(COLUMNS, maps, panels):
        axis = row(left=place, title=title, caption=caption)
        drawn = on_image(axis, x, labels.shape, vmin=low, vmax=high, cmap="cividis")
        for c in labels.unique().tolist()[1:]:  # the first has borders with these
            axis.contour((labels == c).numpy(), [0.5], colors="white", linewidths=0.9)
        zoom(axis, window)
    bar = row(left=COLUMNS[3], width=0.22)
    axis.figure.colorbar(drawn, cax=bar)
    bar.tick_params(labelsize=12)
    bar.set_ylabel(f"value of channel {channel}", fontsize=12)


def draw_labels(row, plain: Tensor, labels: Tensor, window, colours: Tensor,
                classes) -> None:
    """Row 3: the labels of the window without flow, with it, and where they differ."""
    top, left, height, width = window
    changed = plain != labels
    moved = colours[labels].clone()
    moved[~changed] = 235
    share = 100 * changed.float().mean().item()
    for place, x, title, caption in (
            (COLUMNS[0], colours[plain], "Labels without flow",
             "The same weights, but with the flows of all levels set to zero: every "
             "level is only enlarged."),
            (COLUMNS[1], colours[labels], "Labels with flow",
             "The network as it is: every level is aligned before it is added to the "
             "next finer one."),
            (COLUMNS[2], moved, "What the flow has changed",
             f"In colours the labels that the flow has put there: {share:.1f} % of the "
             "image's pixels, and the grey ones keep theirs.")):
        axis = row(left=place, title=title, caption=caption)
        on_image(axis, x, labels.shape)
        zoom(axis, window)
    occurring = torch.stack([plain, labels])[
        :, top:top + height, left:left + width]
    legend = row(left=COLUMNS[3] - 0.15, width=1.5)
    legend.axis("off")
    legend.legend(handles=class_patches(occurring, colours, classes),
                  fontsize=12, loc="upper left", frameon=False, borderaxespad=0,
                  handlelength=1, handleheight=1, labelspacing=0.25)


# --- 6. Demo -------------------------------------------------------------------------


def demo(file: str = "") -> None:
    """The way of one small image through SFNet; with a file, its picture as well.

    The weights are random, so the picture shows what is drawn, and no lesson.
    """
    torch.manual_seed(0)
    model = build(5, backbone="resnet18").eval()
    image = synthetic_scene(96, 160)
    features = model.encoder(image)
    context = model.context(features["res5"])
    logits, (s4, s3, s2) = model.decoder(context, features)
    more = {"context": context, "sum 4": s4, "sum 3": s3, "sum 2": s2,
            "logits": logits, "out": model.to_pixels(logits, image.shape[-2:])}
    for name, x in ({"image": image} | features | more).items():
        print(f"{name:<8} {tuple(x.shape)}")
    if file:
        explain(model, image).savefig(file, dpi=100)
        print(f"picture: {file}")
    print("costs: python evaluate.py cost sfnet")


if __name__ == "__main__":
    with show_errors():
        demo(*sys.argv[1:2])
