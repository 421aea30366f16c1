"""EfficientFCN: describe the image by n codewords, and mix them at every 1/8 location.

Jianbo Liu, Junjun He, Jiawei Zhang, Jimmy S. Ren, Hongsheng Li. "EfficientFCN:
Holistically-guided Decoding for Semantic Segmentation." ECCV 2020. arXiv:2008.10487

The idea
    Enlarging the 1/32 map step by step looks at neighbours only, and dilation costs
    five times the arithmetic. So do not enlarge. Sum the 1/32 map up in n codewords,
    each a weighted mean over the *whole* image, with no place of its own. The 1/8 map
    still knows where things are: at each of its locations it says how much of every
    codeword belongs there, and that mixture is the upsampled feature.

Dimension key
    B batch   K classes   H, W image size   n codewords (256)
    D channels of a codeword, and of the maps base and guidance (1024)
    M, L channels of the fused maps m32 and m8 (1536 each)
    h, w = ceil(H/32), ceil(W/32): the coarse grid   q, r = ceil(H/8), ceil(W/8)
    The paper's B, the base map, is `base` here; its C, all codewords, is `codewords`;
    its A~, the weighting maps, is `maps`; its W, the assembly weights, is `weights`.

Paper -> code
    | Fig. 2          | HolisticallyGuidedDecoder.steps   | its tensors by their names |
    | Sec. 3.2, m     | fuse                              | m32, m8 at one size |
    | Eq. (1)         | spatial_softmax                   | A~ from A |
    | Eq. (2)         | codebook                          | c_i = sum A~_i B |
    | Eq. (3)         | assemble                          | f~8 = C W |
    | Sec. 3.2, f^8   | HolisticallyGuidedDecoder.forward | [f~8; G], classifier |
    | Sec. 3.1        | EfficientFCN.decode               | encoder, then decoder |
    | Sec. 3.2, mask  | EfficientFCN.to_pixels            | logits at 1/8, times 8 |
    | Fig. 3          | explain                           | where codewords come from |
    | official code   | convert                           | its checkpoint, renamed |
    | Table 1, FCN-*  | FCNDecoder                        | no way up at all |
    | Table 1, UNet-* | UNetDecoder                       | bilinear or deconvolution |

Notes: what the paper says, what the official code does, what is done here, and what
it changes. "Code" is jianbo909/efficientFCN, the repository of the first author.
GMACs and parameters are those of ResNet-101 with 60 classes at 512x512 pixels.
    N1  Cost in Table 1.
        Paper: 69.6 GMACs and 55.8 M parameters. How they were counted is not said. Its
               rows come out with a counter that adds 2 per element of a batch norm and
               sees none of the matrix products of Eqs. (2) and (3), and with the
               ImageNet classifier of the encoder, 2.049 M parameters that are not used.
        Code:  Has 60.2 GMACs and 52.2 M by that counter.
        Here:  `default` is the text, with 52.6 GMACs and 50.3 M by that counter. The
               variant `published-cost` has widths that give all costs which Tables 1
               and 4 print for EfficientFCN. They were found by a search, and they
               contradict the text's codewords of 1024 numbers: a guess that fits, not a
               fact.
        Effect: Only the cost of `published-cost` can be compared with the paper's. On
               scores: not measured.
    N2  Depth of the branches.
        Paper: One 1x1 each gives A and W, and a 1x1 on f^8 gives the logits.
        Code:  Two 1x1 each for A and W, and one more in front of the classifier, from
               2 D to 1024 channels.
        Here:  As the paper. `double` and `conv_up` are the code's layers. The variant
               `official` is the code's whole decoder: it has both, and N3's res3 and
               N7's resizing.
        Effect: The code's layers add 2.2 M parameters and 8.6 GMACs. On scores: not
               measured.
    N3  The map at stride 8.
        Paper: A 1x1 compresses it to 512 channels, as those at 16 and 32.
        Code:  res3 enters as it is.
        Here:  As the paper. `compress_e8=False`, also in `official`, is the code.
        Effect: The code saves 0.3 M parameters and 1.1 GMACs. The fused maps are
               equally wide, since res3 of ResNet-50 and ResNet-101 has 512 channels
               anyway. On scores: not measured.
    N4  Batch norm and ReLU.
        Paper: Silent.
        Code:  Both follow every 1x1, with two exceptions: the last one of A has a batch
               norm only, and the classifier has neither.
        Here:  As the code.
        Effect: The assembly weights W are never negative, so codewords are added and
               never cancel each other. On scores: not measured.
    N5  Scale of the assembled feature.
        Paper: Silent; Eq. (3) has no factor.
        Code:  f~8 is multiplied by n^-0.5.
        Here:  As the code.
        Effect: Without it, n terms, none of them with a negative weight (N4), would add
               up, and f~8 would outweigh G, which stands beside it in f^8. On scores:
               not measured.
    N6  What is concatenated to f~8.
        Paper: "the guidance feature map G" (Sec. 3.2).
        Code:  G, before the mean of the base map is added.
        Here:  As both.
        Effect: With G-bar, one and the same vector would be repeated at every
               location, which tells no two places apart. On scores: not measured.
    N7  Resizing inside the decoder.
        Paper: "bilinear downsampling", and upsampling "in a similar manner".
        Code:  align_corners=True: corners are laid on corners, whatever the sizes.
        Here:  `grid="exact"`: every map stays on the grid that the encoder's strides
               make, at any image size, and position i at 1/32 is position 4 i at 1/8.
               `grid="corners"` is the code's, and the variant `official` has it. The
               last step, from 1/8 to pixels, is the code's for both, at image sides
               that 8 divides; the code meets no others.
        Effect: Both are the same at image sides of 32 k + 1. At 512 the last row at
               1/32 is centred on pixel 480, but "corners" lays it on the row at 1/8
               that is centred on pixel 504. With the same random weights, `official`
               and the code's decoder give equal outputs and gradients at both sizes. In
               place of "corners", "exact" changes the outputs at 512 by up to 0.071,
               where the largest is 0.65, and 85 % of the positions keep their class
               (measured). So released weights need "corners". On scores: not measured.
    N8  Bias of A's last batch norm.
        Paper: Silent.
        Code:  There.
        Here:  There, so that the parameters are the code's.
        Effect: None. Eq. (1) cancels what is constant over space, and the gradient of
               this bias is nothing but rounding.
    N9  Dropout in front of the classifier.
        Paper: Silent.
        Code:  Whole channels, each with probability 0.1.
        Here:  As the code, and in the U-Nets too.
        Effect: Not measured.
    N10 Auxiliary losses, and the U-Nets of Table 1.
        Paper: No auxiliary loss is mentioned, and the U-Nets' widths are not given.
        Code:  EfficientFCN has no auxiliary loss.
        Here:  EfficientFCN has none. The U-Nets have one 1x1 head at 1/32 and one at
               1/16, because Table 1 seems to count them (0.06 M parameters and 0.04
               GMACs, which our GMACs are without). Their widths were found by a search,
               too. `aux=False` leaves the heads out.
        Effect: The U-Nets' costs are met and prove nothing. On streets
               `unet-bilinear` has an mIoU of 0.5472 with the heads, in bf16, and of
               0.5488 without them, in float32 (results/README.md).
    N11 Stem and shortcuts of the encoder.
        Paper: "the original ResNet" (Sec. 4.1).
        Code:  Three 3x3 convolutions (32, 32, 64) as stem, and shortcuts that average
               2x2 positions before their 1x1, where torchvision's read one of the four.
        Here:  The backbone's suffix names the stem. Shortcuts are torchvision's, with
               its ImageNet weights; `pooled_shortcuts` makes them the code's, for a
               checkpoint of the code (`convert`).
        Effect: Both shortcuts have the same parameters and multiply-adds; weights that
               were trained with one do not fit the other. The costs of Table 1 need the
               stem (32, 32, 64), `resnet101c`. Only the 223.6 GMACs of dilatedFCN-8s
               need (64, 64, 128), `resnet101s`; with the other they would be 217.8. On
               scores: not measured.
    N12 Training.
        Paper: 120 epochs on ADE20K, no batch size, one learning rate for all layers.
               Images are scaled by 0.5 to 2. PASCAL Context is counted with 60
               classes. 85.4 of Table 6 is trained on VOC's augmented set, and 87.6 on
               COCO before that, without a schedule for COCO.
        Code:  80 epochs on ADE20K with a batch of 32; no script for VOC. The decoder
               learns at 10 times the rate of the encoder. The scale is that of the
               image's own long side, and a crop that is larger than the image is
               filled with black. Context has 59 classes; background is ignored. The
               training script reads `--num-center`, the number of codewords, but builds
               the network without it: 256, on ADE20K too, where the test script has
               600.
        Here:  The recipes are the paper's, with the code's batch sizes and its 10
               times. Crops are filled with the mean colour (data.py). `context59` are
               the code's classes, `context60` the paper's.
               ADE20K's 600 codewords are the variant `n600`. COCO (`coco-voc`) has the
               schedule of VOC, which then goes on from it with `--finetune-from`.
        Effect: Not measured.
    N13 Testing.
        Paper: The mean of predictions at scales "sampled uniformly from [0.5, 2.0]",
               mirrored at random (Sec. 4.1).
        Code:  Fixed scales, 0.75 to 2 on Context and 0.5 to 2 on ADE20K in steps of
               0.25, each also mirrored. exp(logits) are summed. A scale is that of the
               image's long side, and on ADE20K that of a long side of 608 pixels,
               whatever the image has; both sides are rounded to multiples of 32.
        Here:  `evaluate.py score` has the code's scales, its sum and its base size as
               options (`--scales`, `--fuse exp`, `--base-size 608 608`). Sides are not
               rounded.
        Effect: Not measured.
    N14 Without the transfer (Sec. 4.2).
        Paper: The assembly weights are predicted by "two 1x1 convolutions with the same
               output channels on" m8, 54.2 mIoU. Whether the two have 1024 and n
               channels, as G and W have, or n and n is left open. So is what then
               stands beside f~8.
        Code:  Has no such option.
        Here:  `no-transfer` reads it as the 1x1 to G and the 1x1 to W of `default`,
               with nothing added between them, and G beside f~8. This is a guess.
        Effect: On `streets` none that images or two seeds tell apart; results/README.md
               has a likely reason. In the paper 1.1 points.
    N15 How many codewords count.
        Paper: Table 4 goes from 32 codewords to 1024 with crops of 512x512 (512 are the
               best), ADE20K has 600 with crops of 576x576.
        Code:  256 on Context, 600 in ADE20K's test script (N12).
        Here:  As the paper.
        Effect: Codewords are means over the places of m32, 16x16 of the smaller crop
               and 18x18 of the larger, so no more than 256 and 324 of them are linearly
               independent. On `streets`, where m32 has 32 places, two trained networks
               keep their score to 0.1 points when an image's codewords are all made
               multiples of one vector (results/README.md).

Run
    python efficientfcn.py [FILE.png]          shapes, and a picture, seconds on a CPU
    python train.py --method efficientfcn      on procedural streets, minutes
    python train.py --method efficientfcn --dataset camvid --data-root DIR
"""
from __future__ import annotations

import math
import sys
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (FCNHead, UserError, class_patches, conv_bn_relu, full_precision,
                    label_colours, make_encoder, one_hot, placed_panel, repeat_border,
                    show_errors, synthetic_scene, upsample, viewable, widened)

# --- 1. Config -----------------------------------------------------------------------

STRIDES = {"res3": 8, "res4": 16, "res5": 32}
SCALES = tuple(STRIDES)  # in the order of m8 and m32
CODE = {"double": True, "conv_up": True}  # the layers that only the code has  [N2]
VARIANTS = {
    "default": {},
    "official": CODE | {"compress_e8": False, "grid": "corners"},  # [N3] [N7]
    "published-cost": CODE | {  # [N1]
        "codeword_channels": 1536, "weighting_hidden": 512},
    # Table 1: the classical ways up
    "fcn32s": {"decoder": "fcn"},
    "dilated-fcn8s": {"decoder": "fcn", "output_stride": 8},
    "unet-bilinear": {"decoder": "unet-bilinear"},
    "unet-deconv": {"decoder": "unet-deconv"},
    # Table 2: scales in m32, Table 3: scales in m8; all three are `default`
    "codebook-32": {"codebook_scales": ("res5",)},
    "codebook-16-32": {"codebook_scales": ("res4", "res5")},
    "guidance-8": {"guidance_scales": ("res3",)},
    "guidance-8-16": {"guidance_scales": ("res3", "res4")},
    # Table 4: codewords. 256 is `default`; 600 is for ADE20K  [N15]
    "n32": {"codewords": 32},
    "n64": {"codewords": 64},
    "n128": {"codewords": 128},
    "n512": {"codewords": 512},
    "n1024": {"codewords": 1024},
    "n600": {"codewords": 600},
    # Sec. 4.2: the assembly weights are predicted without knowing the codewords  [N14]
    "no-transfer": {"transfer": False},
}

FROM_SCRATCH = {}  # options of `build` in train.py's own recipes
PAPER = "paper, Sec. 4.1"
OFFICIAL = "official code"
SCHEDULE = {"lr": (0.001, PAPER), "head_lr": (10.0, OFFICIAL),
            "weight_decay": (1e-4, PAPER),
            "backbone": ("resnet101", "paper, Sec. 4.2, Table 5"),
            "weights": ("imagenet", PAPER), "batch": (16, OFFICIAL),
            "momentum": (0.9, PAPER), "power": (0.9, PAPER),
            "min_lr": (0.0, "paper, Sec. 4.1: plain poly"),
            "warmup": (0, "paper, Sec. 4.1: none"), "scale": ((0.5, 2.0), PAPER),
            "base_size": ((0, 0), "official code: the image's own size"),  # [N12]
            "photometric": (False, "paper, Sec. 4.1: only flip and scale"),
            "aux_weight": (0.4, "the paper has none; of the U-Nets, ours"),  # [N10]
            "crop": ((512, 512), PAPER), "epochs": (120, PAPER)}
VOC = SCHEDULE | {"lr": (0.002, PAPER), "epochs": (80, PAPER),
                  "batch": (16, "official code, for PASCAL Context")}
UNSTATED = "not stated; the paper's for VOC, Sec. 4.1"
RECIPES = {  # of training [N12]; how the networks are tested is in [N13]
    "context60": SCHEDULE,
    "context59": SCHEDULE,
    "voc": VOC,  # the augmented set, --dataset voc-aug (Sec. 4.3)
    "coco-voc": VOC | {  # before it, the lower part of Table 6
        "lr": (0.002, UNSTATED), "epochs": (80, UNSTATED)},
    "ade20k": SCHEDULE | {  # with 600 codewords, `efficientfcn:n600`
        "lr": (0.002, PAPER), "crop": ((576, 576), PAPER), "batch": (32, OFFICIAL)},
}

# --- 2. Equations --------------------------------------------------------------------
# Each of Eqs. (1) to (3) has a literal twin, a loop over codewords and places, in
# tests/test_efficientfcn.py.


# task: minutes=30 points=8 section='Sec. 3.2'
def to_grid(x: Tensor, factor: float, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing that leaves every position where it is.  [N7]

    x (B, C, h, w), factor 1/4, 1/2, 1, 2 or 4 -> (B, C, q, r), where `size` = (q, r).

    A stride-2 convolution centres position i of its output on position 2 i of its
    input. So position i of the 1/32 map and position 4 i of the 1/8 map are the same
    place of the image.

    Downwards, a coarse position falls on a fine one, and bilinear interpolation reads
    that one alone. Upwards, three new rows follow each row but the last. The last one
    is repeated, as far as the finer map of `size` = (q, r) reaches beyond it.
    """
    if factor <= 1:
        step = round(1 / factor)
        return x[..., ::step, ::step]
    h, w = x.shape[-2:]
    q, r = size
    step = round(factor)
    # h rows have h-1 gaps between them, and a gap becomes `step` steps. Corners are
    # aligned because the first and the last row keep their places. A single row becomes
    # two, which are equal: torch.export cannot divide by the gaps of a single one.
    x = F.interpolate(x, (max(step * (h - 1) + 1, 2), max(step * (w - 1) + 1, 2)),
                      mode="bilinear", align_corners=True)
    x = repeat_border(x, step - 1, step - 1)
    return x[..., :q, :r]


def to_corners(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The code's resizing: the outer rows and columns are laid on each other.  [N7]

    16 rows become 64 with row i on row 63/15 i = 4.2 i. In the image it is at 4 i, so
    what the last row knows is assembled 3 rows, 24 pixels, too far down.
    """
    if x.shape[-2:] == size:
        return x
    q, r = size
    # A single row is the first of two, as in `to_grid`.
    x = F.interpolate(x, (max(q, 2), max(r, 2)), mode="bilinear", align_corners=True)
    return x[..., :q, :r]


def fuse(maps: dict[str, Tensor], stride: int, size: tuple[int, int], *,
         grid="exact") -> Tensor:
    """m32 or m8 of Sec. 3.2: the named stages on one grid, side by side."""
    if grid == "corners":
        resized = [to_corners(x, size) for x in maps.values()]
    else:
        resized = [to_grid(x, STRIDES[stage] / stride, size)
                   for stage, x in maps.items()]
    return torch.cat(resized, dim=1)


# task: minutes=10 points=5
def spatial_softmax(maps: Tensor) -> Tensor:
    """Eq. (1): A~_i(x, y) = exp A_i(x, y) / sum_pq exp A_i(p, q), for (B, n, h, w).

    Every codeword distributes a weight of 1 over the *places*. Over the codewords
    instead, a place would choose its codeword, and an object that fills few places
    would be drowned in the sum of Eq. (2).
    """
    return maps.flatten(2).softmax(dim=2).reshape(maps.shape)


# task: minutes=15 points=6
def codebook(weighting: Tensor, base: Tensor) -> Tensor:
    """Eq. (2): c_i = sum_pq A~_i(p, q) B(p, q), all n codewords in one product.

    weighting (B, n, h, w), base (B, D, h, w) -> codewords (B, D, n), which have no
    spatial order left: shuffling the places of both inputs changes nothing.
    """
    B, n, h, w = weighting.shape
    places = base.flatten(2)  # (B, D, h*w)
    shares = weighting.flatten(2).transpose(1, 2)  # (B, h*w, n)
    # (B, D, h*w) x (B, h*w, n) -> (B, D, n)
    return torch.bmm(places, shares)


# task: minutes=15 points=6 needs=efficientfcn.codebook
def assemble(weights: Tensor, codewords: Tensor) -> Tensor:
    """Eq. (3): f~8 = C W, at each place its own mixture of the same codewords.

    weights (B, n, q, r), codewords (B, D, n) -> (B, D, q, r). The paper prints W^T C;
    by its own sizes C is D x n and W is n x q*r, so C W is meant. The features are as
    fine as W is. But however many places there are, at most n of these features are
    linearly independent, and no more than the coarse map has places, h*w, since each
    codeword is a mean over those: 256 for a crop of 512x512.  [N15]
    """
    B, n, q, r = weights.shape
    # (B, D, n) x (B, n, q*r) -> (B, D, q*r)
    mixtures = torch.bmm(codewords, weights.flatten(2))  # (B, D, q*r)
    return mixtures.unflatten(2, (q, r))


# --- 3. Layers -----------------------------------------------------------------------


def pointwise(*widths: int, last_relu=True) -> nn.Sequential:
    """A chain of 1x1 convolutions, each with batch norm and ReLU.  [N4]

    The first of `widths` goes in, and each further one is the width of a layer.
    `last_relu=False` ends the chain with the batch norm.
    """
    layers = []
    for in_channels, out_channels in zip(widths, widths[1:]):
        layers += conv_bn_relu(in_channels, out_channels, 1)
    if not last_relu:
        layers.pop()
    return nn.Sequential(*layers)


def classifier(in_channels: int, num_classes: int) -> nn.Sequential:
    """Dropout of whole channels, then 1x1 to the logits.  [N9]"""
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(in_channels, num_classes, 1))


class HolisticallyGuidedDecoder(nn.Module):
    """Fig. 2: fusion, holistic codebook, assembly; logits at 1/8.

    The layers, in the order of the figure: `compress` reduces the stages that some
    scale needs. `base` (B) and `weighting` (A) read m32. `guidance` (G) reads m8, and
    `assembly` (W) reads G plus the mean of the base map.
    """

    stride = 8

    def __init__(self, stages: dict[str, int], num_classes: int, *, channels: int,
                 codewords: int, codeword_channels: int, codebook_scales: tuple,
                 guidance_scales: tuple, transfer: bool, compress_e8: bool,
                 double: bool, weighting_hidden: int, conv_up: bool, grid="exact"):
        super().__init__()
        self.grid = grid
        check_scales(codebook_scales=codebook_scales, guidance_scales=guidance_scales)
        self.codebook_scales = codebook_scales
        self.guidance_scales = guidance_scales
        self.transfer = transfer
        n = codewords
        D = codeword_channels
        compressed = SCALES if compress_e8 else ("res4", "res5")  # [N3]
        needed = {*codebook_scales, *guidance_scales}
        self.compress = nn.ModuleDict({stage: pointwise(stages[stage], channels)
                                       for stage in compressed if stage in needed})
        width = stages | {stage: channels for stage in compressed}
        M = sum(width[stage] for stage in codebook_scales)
        L = sum(width[stage] for stage in guidance_scales)
        hidden = [weighting_hidden] if weighting_hidden else []  # [N1]
        again = [n] if double else []  # [N2]
        self.base = pointwise(M, D)
        self.weighting = pointwise(M, *hidden, n, *again, last_relu=False)  # [N8]
        self.guidance = pointwise(L, D)
        self.assembly = pointwise(D, n, *again)
        if conv_up:
            self.conv_up = pointwise(2 * D, 2 * channels)
            self.classify = classifier(2 * channels, num_classes)
        else:
            self.conv_up = nn.Identity()
            self.classify = classifier(2 * D, num_classes)

    # task: minutes=45 points=12 needs=efficientfcn.assemble
    def steps(self, context: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the encoder's maps to f~8: the tensors of Sec. 3.2 by name.

        Returns a dict: m32 (B, M, h, w), m8 (B, L, q, r), base (B, D, h, w), maps,
        which are A~ (B, n, h, w), guidance, which is G alone (B, D, q, r), weights
        (B, n, q, r), codewords (B, D, n), assembled (B, D, q, r). The context takes the
        place of res5. m32 reads codebook_scales and m8 reads guidance_scales, in their
        order; a stage without a layer in `compress` comes as it is; without `transfer`
        nothing is added to G. From the softmax to f~8 all is float32, also under
        autocast (full_precision) and in a model in 16 bits (widened).
        """
        B, _, h, w = context.shape
        q, r = features["res3"].shape[-2:]
        e = features | {"res5": context}  # e8, e16, e32, by the name of their stage
        e |= {stage: layer(e[stage]) for stage, layer in self.compress.items()}
        for_m32 = {stage: e[stage] for stage in self.codebook_scales}
        for_m8 = {stage: e[stage] for stage in self.guidance_scales}
        m32 = fuse(for_m32, 32, (h, w), grid=self.grid)  # (B, M, h, w)
        m8 = fuse(for_m8, 8, (q, r), grid=self.grid)  # (B, L, q, r)
        base = self.base(m32)  # (B, D, h, w)
        G = self.guidance(m8)  # (B, D, q, r)
        if self.transfer:
            # m8 has never seen the codewords. The mean of the base map, which they are
            # made of, tells every location what there is in this image.
            mean = base.mean(dim=(2, 3), keepdim=True)  # (B, D, 1, 1)
            G_bar = G + mean  # (B, D, q, r)
        else:
            G_bar = G
        weights = self.assembly(G_bar)  # (B, n, q, r)
        maps = self.weighting(m32)  # (B, n, h, w)
        # A softmax and two sums over hundreds of terms: float32 even under autocast.
        with full_precision(maps):
            maps = spatial_softmax(widened(maps))  # (B, n, h, w)
            codewords = codebook(maps, widened(base))  # (B, D, n)
            mixture = assemble(widened(weights), codewords)  # (B, D, q, r)
        n = maps.shape[1]
        assembled = mixture * n**-0.5  # (B, D, q, r)  [N5]
        return {"m32": m32, "m8": m8, "base": base, "maps": maps, "guidance": G,
                "weights": weights, "codewords": codewords, "assembled": assembled}

    # task: minutes=10 points=4 section='Sec. 3.2'
    def forward(self, context: Tensor, features: dict[str, Tensor]):
        """Logits (B, K, q, r), and no maps for auxiliary heads.

        Beside G, f~8 is given back in the type of the layers' weights.
        """
        step = self.steps(context, features)
        assembled = step["assembled"].to(self.base[0].weight.dtype)
        f8 = torch.cat([assembled, step["guidance"]], dim=1)  # [N6]
        return self.classify(self.conv_up(f8)), []


def check_scales(**scales: tuple[str, ...]) -> None:
    """Each option must name stages; a bare "res5" would be read letter by letter."""
    for option, names in scales.items():
        if not names or not set(names) <= set(SCALES) or isinstance(names, str):
            raise UserError(f"{option}={names!r}: must be a tuple of some of {SCALES}, "
                            f"for instance ('res5',)")


def pool_shortcuts(encoder: nn.Module) -> None:
    """Let the shortcuts that halve the resolution average 2x2 positions first.  [N11]

    torchvision's 1x1 with stride 2 reads one position of four. The parameters keep
    their names and shapes.
    """
    for stage in (encoder.res3, encoder.res4, encoder.res5):
        shortcut = getattr(stage[0], "downsample", None)
        if not isinstance(shortcut, nn.Sequential):
            raise UserError("pooled_shortcuts: only a ResNet has shortcuts to pool")
        conv, norm = shortcut
        if conv.stride == (1, 1):
            continue  # a dilated stage: nothing is halved
        conv.stride = (1, 1)
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        stage[0].downsample = nn.Sequential(
            OrderedDict([("pool", pool), ("0", conv), ("1", norm)]))


# The rivals of Table 1. Their `forward` has the same arguments and gives the same two
# things: logits on the decoder's own grid, and maps for auxiliary heads, if any.


class FCNDecoder(nn.Module):
    """FCN-32s and, on a dilated encoder, dilatedFCN-8s: 3x3, classifier, no way up."""

    def __init__(self, stages: dict[str, int], num_classes: int, *, channels: int,
                 stride: int):
        super().__init__()
        self.stride = stride
        self.head = FCNHead(stages["res5"], num_classes, channels=channels)

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        return self.head(context), []


class UNetDecoder(nn.Module):
    """Fig. 1 (c): twice x2, each time beside the encoder's map of that size.  [N10]

    A step up, with its 3x3 convolution, sees 2x2 (deconvolution) or 3x3 (bilinear)
    positions of the coarser map: what is elsewhere in the image cannot help it. This is
    what the codewords are held against.
    """

    stride = 8

    def __init__(self, stages: dict[str, int], num_classes: int, *, channels: int,
                 deconv: bool):
        super().__init__()
        self.laterals = nn.ModuleDict({stage: pointwise(stages[stage], channels)
                                       for stage in SCALES})
        if deconv:
            self.up16 = nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)
            self.up8 = nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)
            self.factor = 1  # nothing is left for bilinear upsampling to do
        else:
            self.up16 = nn.Identity()
            self.up8 = nn.Identity()
            self.factor = 2
        self.merge16 = conv_bn_relu(2 * channels, channels)
        self.merge8 = conv_bn_relu(2 * channels, 2 * channels)
        self.classify = classifier(2 * channels, num_classes)

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        """Logits (B, K, q, r), and the maps at 1/32 and 1/16 for auxiliary heads."""
        e8 = self.laterals["res3"](features["res3"])
        e16 = self.laterals["res4"](features["res4"])
        f32 = self.laterals["res5"](context)
        f16 = self.merge16(self.beside(self.up16(f32), e16))
        f8 = self.merge8(self.beside(self.up8(f16), e8))
        return self.classify(f8), [f32, f16]

    def beside(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The enlarged coarse map and the fine one, concatenated.

        Twice ceil(H/32) rows may be one more than ceil(H/16): the last one is cut off.
        """
        enlarged = upsample(coarse, self.factor, fine.shape[-2:])
        return torch.cat([enlarged, fine], dim=1)


# --- 4. Model ------------------------------------------------------------------------


class EfficientFCN(nn.Module):
    """Encoder without dilation and one of the decoders (Sec. 3.1).

    There is no context module: the codewords are the context. It is here as a layer
    that does nothing, because cost and learning rates are given for each of the parts.
    """

    def __init__(self, encoder: nn.Module, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.decoder = decoder
        self.aux_heads = aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, ., .), ..]}."""
        logits, aux = self.decode(images)
        return {"out": self.to_pixels(logits, images.shape[-2:]), "aux": aux}

    def decode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) -> logits on the decoder's grid, auxiliary logits.

        The grid is q x r, but for the FCNs, whose logits are as coarse as res5.
        """
        features = self.encoder(images)
        context = self.context(features["res5"])
        logits, coarser = self.decoder(context, features)
        aux = [head(x) for head, x in zip(self.aux_heads, coarser) if self.training]
        return logits, aux

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """The last x8 (FCN-32s: x32): logits of all H x W pixels.

        `rows` = (lo, hi) asks for the rows lo to hi-1 of the image alone.
        """
        return upsample(widened(logits), self.decoder.stride, size, rows)


def build(num_classes: int, *, backbone="resnet50", weights="none", decoder="hgd",
          channels=512, codewords=256, codeword_channels=None, codebook_scales=SCALES,
          guidance_scales=SCALES, transfer=True, compress_e8=True, double=False,
          weighting_hidden=0, conv_up=False, grid="exact", pooled_shortcuts=False,
          output_stride=32, aux=True) -> EfficientFCN:
    """EfficientFCN or one of its rivals; VARIANTS names the rows of the tables.

    decoder           'hgd', 'fcn', 'unet-bilinear' or 'unet-deconv' (Table 1)
    channels          width of e8, e16, e32 (512, Sec. 3.2), and of the rivals
    codewords         n (256, Sec. 4.2)
    codeword_channels  width D of a codeword; None: twice `channels` (1024, Sec. 3.2)
    codebook_scales   stages in m32 (Table 2)
    guidance_scales   stages in m8 (Table 3)
    transfer          add the mean of the base map to G (Sec. 4.2)
    compress_e8       1x1 on res3 as on the other two  [N3]
    double            second 1x1 for A and for W  [N2]
    weighting_hidden  width of one more 1x1 in A; 0: none  [N1]
    conv_up           1x1 in front of the classifier  [N2]
    grid              'exact', or 'corners' as in the code  [N7]
    pooled_shortcuts  the code's shortcuts in the encoder  [N11]
    output_stride     32; 8 dilates the encoder of 'fcn'
    aux               heads of the U-Nets at 1/32 and 1/16  [N10]
    """
    for name, value, known in (
            ("decoder", decoder, ("hgd", "fcn", "unet-bilinear", "unet-deconv")),
            ("grid", grid, ("exact", "corners"))):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if decoder != "fcn" and output_stride != 32:
        raise UserError(f"output_stride={output_stride}: only decoder='fcn' is dilated")
    encoder = make_encoder(backbone, num_classes, weights=weights,
                           output_stride=output_stride)  # [N11]
    if pooled_shortcuts:
        pool_shortcuts(encoder)
    stages = encoder.channels
    aux_heads = nn.ModuleList()
    if aux and decoder.startswith("unet"):
        aux_heads.extend(nn.Conv2d(channels, num_classes, 1) for _ in ("1/32", "1/16"))
    if decoder == "hgd":
        decoder_module = HolisticallyGuidedDecoder(
            stages, num_classes, channels=channels, codewords=codewords,
            codeword_channels=codeword_channels or 2 * channels,
            codebook_scales=codebook_scales, guidance_scales=guidance_scales,
            transfer=transfer, compress_e8=compress_e8, double=double,
            weighting_hidden=weighting_hidden, conv_up=conv_up, grid=grid)
    elif decoder == "fcn":
        decoder_module = FCNDecoder(stages, num_classes, channels=channels,
                                    stride=output_stride)
    else:
        decoder_module = UNetDecoder(stages, num_classes, channels=channels,
                                     deconv=decoder == "unet-deconv")
    return EfficientFCN(encoder, nn.Identity(), decoder_module, aux_heads)


# The parts of the code's network, and what they are called here. The layers inside a
# part are numbered alike.
OFFICIAL_NAMES = {
    "pretrained.conv1": "encoder.stem.0", "pretrained.bn1": "encoder.stem.1",
    "pretrained.layer1": "encoder.res2", "pretrained.layer2": "encoder.res3",
    "pretrained.layer3": "encoder.res4", "pretrained.layer4": "encoder.res5",
    "head.conv50": "decoder.compress.res5", "head.conv40": "decoder.compress.res4",
    "head.hgdmodule0.conv_cat": "decoder.base",
    "head.hgdmodule0.conv_center": "decoder.weighting",
    "head.hgdmodule0.conv_affinity0": "decoder.guidance",
    "head.hgdmodule0.conv_affinity1": "decoder.assembly",
    "head.hgdmodule0.conv_up": "decoder.conv_up",
    "head.conv_pred3": "decoder.classify",
}
# A shortcut of the code is pool, convolution, norm, also where the pool does nothing.
OFFICIAL_SHORTCUT = {".downsample.1.": ".downsample.0.",
                     ".downsample.2.": ".downsample.1."}


def convert(state: dict[str, Tensor], model: EfficientFCN) -> dict[str, Tensor]:
    """The state dict of the official code's network, in the names of `model`.

    `model` must be that network: `efficientfcn:official` with pooled_shortcuts=True,
    the backbone resnet50c or resnet101c, and the checkpoint's number of classes and
    codewords. The code's ImageNet classifier is left out; it is never used.
    """
    shortcut = getattr(model.encoder.res3[0], "downsample", None)
    if not hasattr(shortcut, "pool") or getattr(model.decoder, "grid", "") != "corners":
        raise UserError("convert: shapes would fit, but this model would compute "
                        "something else; build efficientfcn:official with "
                        "pooled_shortcuts=True")
    own = model.state_dict()
    converted = {}
    strangers = []
    for name, value in state.items():
        translated = own_name(name)
        if translated in own and value.shape == own[translated].shape:
            converted[translated] = value
        elif translated:
            strangers.append(f"{name} {tuple(value.shape)}")
    # Files of old versions of torch lack the batch norms' counters, which train only.
    missing = [name for name in own if name not in converted]
    counters = [name for name in missing if name.endswith("num_batches_tracked")]
    converted |= {name: own[name] for name in counters}
    missing = [name for name in missing if name not in counters]
    if strangers or missing:
        faults = strangers[:3] + [f"no {name}" for name in missing[:3]]
        raise UserError(
            f"convert: {len(strangers)} tensors have no place in this model and "
            f"{len(missing)} of its own stay empty ({', '.join(faults)} ..). Are "
            f"backbone, classes and codewords those of the checkpoint?")
    return converted


def own_name(name: str) -> str:
    """A name of the official code in ours; "" for the classifier that is not used."""
    for wrapper in ("module.", "model."):  # of parallel training, and of its loss
        name = name.removeprefix(wrapper)
    if name.startswith("pretrained.fc."):
        return ""
    for part, ours in OFFICIAL_NAMES.items():
        if name.startswith(part + "."):
            name = ours + name.removeprefix(part)
            break
    for theirs, ours in OFFICIAL_SHORTCUT.items():
        if theirs in name:
            return name.replace(theirs, ours)
    return name


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: EfficientFCN, image: Tensor, *, palette=None, classes=None):
    """Fig. 3 from the model's own tensors: where codewords come from and go to.

    image (1, 3, H, W), normalised -> matplotlib Figure of three rows: the weighting
    maps A~_i of four codewords at 1/32, the places that each one averages; their
    assembly weights W_i at 1/8, the places that each one is given to; the coefficients
    of two places, A and B. `classes` are the names in the legend.
    """
    from matplotlib.figure import Figure
    decoder = model.decoder
    if not isinstance(decoder, HolisticallyGuidedDecoder):
        raise UserError("nothing to explain: this variant has no codewords")
    with torch.no_grad():
        features = model.encoder(image)
        context = model.context(features["res5"])
        step = decoder.steps(context, features)
        logits, _ = decoder(context, features)
        labels = model.to_pixels(logits, image.shape[-2:])[0].argmax(0)
    B, K, q, r = logits.shape
    maps = step["maps"][0]
    weights = step["weights"][0]
    n, h, w = maps.shape
    fine_labels = logits[0].argmax(0)  # (q, r)
    coarse_labels = to_grid(logits, 1 / 4, (h, w))[0].argmax(0)  # (h, w)
    taken = preference(maps, coarse_labels, K)  # (n, K)
    given = preference(weights, fine_labels, K)  # (n, K)
    chosen = unlike(step["codewords"][0], 4, use=weights.mean(dim=(1, 2)))
    places = two_places(fine_labels, K)

    names = classes or [f"class {c}" for c in range(K)]
    colours = label_colours(palette, K)
    H, W = labels.shape
    height = min(WIDE * H / W, WIDE)  # of a panel, in inches
    figure = Figure(figsize=(14, 2 * (height + AROUND) + 3.9))
    tops = [i * (height + AROUND) + 0.82 for i in range(3)]
    rows = [partial(placed_panel, figure, top=top, height=height, width=WIDE)
            for top in tops[:2]]
    draw_image(rows[0], viewable(image[0]), places)
    draw_labels(rows[1], labels, colours)
    draw_legend(figure, tops[2], labels, colours, names)
    draw_codewords(
        rows[0], maps, 32, labels, chosen, best_class(taken, names), colour_map="Blues",
        limit="0 to {:.0%}",
        text="1  Made: each codeword is a mean of the whole image, weighted by a map "
        "(% per cell)",
        caption="Cells of {} weigh most, {:.1f} times the mean of all cells.")
    draw_codewords(
        rows[1], weights, 8, labels, chosen, best_class(given, names),
        colour_map="Oranges", limit="0 to {:.2g}",
        text="2  Used: a finer map of coefficients says which places get it, far or "
        "near",
        caption="Places of {} get most of it, {:.1f} times the mean.")
    there = {name: names[fine_labels[place]] for name, place in zip("AB", places)}
    draw_mixtures(figure, tops[2], weights, places, chosen, best_class(given, names),
                  there)
    return figure


# Tensors first.


def unlike(codewords: Tensor, count: int, *, use: Tensor) -> list[int]:
    """The most used of the codewords (D, n), then those that point elsewhere.

    The next one is always the codeword whose nearest among the chosen is farthest away
    by the angle between them: many codewords are nearly parallel, and a random choice
    would show one thing often. Only the half of the codewords of which the image uses
    most, by `use` (n,), is considered: W_i of a random one is often 0 everywhere.
    """
    n = codewords.shape[1]
    directions = F.normalize(codewords, dim=0)  # (D, n)
    # (n, D) x (D, n) -> (n, n)
    cosines = directions.T @ directions  # (n, n)
    order = use.argsort(descending=True)
    unused = order[math.ceil(n / 2):]
    chosen = [order[0].item()]
    while len(chosen) < min(count, math.ceil(n / 2)):
        nearest = cosines[:, chosen].amax(dim=1)
        nearest[unused] = 2  # no cosine is as large: these are never taken,
        nearest[chosen] = 2  # and none is taken twice
        chosen.append(nearest.argmin().item())
    return chosen


def preference(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of each map of (n, h, w) over each class, by its mean over all: (n, K).

    2 says that places of this class have twice the mean. Classes with a single place of
    `labels` (h, w), or less than 1 % of them, get 0: a mean of few says little.
    """
    h, w = labels.shape
    K = num_classes
    member = one_hot(labels[None], K)[0].flatten(1)  # (K, h*w)
    size = member.mean(dim=1)  # (K,)
    # (n, h*w) x (h*w, K) -> (n, K)
    share = x.flatten(1) @ member.T / x.sum(dim=(1, 2)).clamp(min=1e-12)[:, None]
    return (share / size.clamp(min=1e-12)) * (size >= max(0.01, 1.5 / (h * w)))


def best_class(preferences: Tensor, names) -> list[tuple[str, float]]:
    """Per codeword the class with the largest of its preferences, and how large."""
    most, which = preferences.max(dim=1)
    return [(names[c], times) for c, times in zip(which.tolist(), most.tolist())]


def two_places(labels: Tensor, num_classes: int) -> list[tuple[int, int]]:
    """(row, column) of A and B, amid the largest and the second largest class.

    labels (q, r). Amid: most of the square around the place, a quarter of the map's
    shorter side in each direction, is of that class.
    """
    q, r = labels.shape
    reach = max(min(q, r) // 4, 1)
    member = one_hot(labels[None], num_classes)[0]  # (K, q, r)
    around = F.avg_pool2d(member, 2 * reach + 1, stride=1, padding=reach)  # (K, q, r)
    around = around * member + 1e-3 * member
    by_size = member.sum(dim=(1, 2)).argsort(descending=True).tolist()
    return [divmod(around[c].argmax().item(), r) for c in by_size[:2]]


GREYS = {"A": "white", "B": "0.55"}  # of the two places, in the image and as bars

# Then the drawing. Lengths are in inches: 14 of them are the width of a web page, on
# which 12 points become 8.

WIDE = 2.4  # a panel
AROUND = 1.87  # headline, title, caption and space of a row of panels
COLUMNS = tuple(0.15 + 2.6 * i for i in range(6))  # left sides; the last has the bar


def headline(axis, text: str) -> None:
    """Bold, above the title of a panel; it may run on over the panels beside it."""
    axis.annotate(text, (0, 1), (0, 28), xycoords="axes fraction", fontsize=14,
                  textcoords="offset points", fontweight="bold", annotation_clip=False)


def on_image(axis, x: Tensor, size: tuple[int, int], stride: int, **options):
    """A map of that stride in pixels of the image, without what reaches beyond it."""
    H, W = size
    q, r = x.shape[:2]
    drawn = axis.imshow(x.numpy(), extent=(0, r * stride, q * stride, 0),
                        interpolation="nearest", **options)
    axis.set(xlim=(0, W), ylim=(H, 0), xticks=[], yticks=[])
    return drawn


def draw_image(row, picture: Tensor, places) -> None:
    """The image, and in it the two places at 1/8."""
    axis = row(left=COLUMNS[0], title="The image", caption=(
        "A and B are two places whose mixtures are compared below."))
    on_image(axis, picture, picture.shape[:2], 1)
    for name, (y, x) in zip("AB", places):
        axis.annotate(name, (8 * x + 4, 8 * y + 4), fontsize=12, fontweight="bold",
                      ha="center", va="center",
                      bbox={"boxstyle": "circle,pad=0.15", "facecolor": GREYS[name],
                            "edgecolor": "black"})


def draw_labels(row, labels: Tensor, colours: Tensor) -> None:
    axis = row(left=COLUMNS[0], title="The prediction", caption=(
        "The borders between its classes are the grey lines in all maps."))
    on_image(axis, colours[labels], labels.shape, 1)


def draw_legend(figure, top: float, labels: Tensor, colours: Tensor, names) -> None:
    axis = placed_panel(figure, left=COLUMNS[0], top=top, height=2.2, width=WIDE,
                        title="Classes")
    axis.axis("off")
    patches = class_patches(labels, colours, names)
    axis.legend(handles=patches, fontsize=12, loc="upper left", frameon=False,
                borderaxespad=0, handlelength=1, handleheight=1, labelspacing=0.25,
                ncols=1 + len(patches) // 14)


def draw_codewords(row, x: Tensor, stride: int, labels: Tensor, chosen, best, *,
                   text: str, caption: str, limit: str, colour_map: str) -> None:
    """One of the two maps of each chosen codeword, from 0 to its own largest value."""
    for left, i in zip(COLUMNS[1:], chosen):
        high = max(x[i].max().item(), 1e-6)
        axis = row(left=left, title=f"codeword {i}: {limit.format(high)}",
                   caption=caption.format(*best[i]))
        drawn = on_image(axis, x[i], labels.shape, stride, vmin=0, vmax=high,
                         cmap=colour_map)
        for c in labels.unique().tolist()[1:]:  # the first has borders with these
            axis.contour((labels == c).numpy(), [0.5], colors="0.35", linewidths=0.8)
        if i == chosen[0]:
            headline(axis, text)
    bar = row(left=COLUMNS[5], width=0.18)
    axis.figure.colorbar(drawn, cax=bar, ticks=[0, high])
    bar.set_yticklabels(["0", "its\nlargest"], fontsize=12)


def draw_mixtures(figure, top: float, weights: Tensor, places, chosen, best,
                  classes_there) -> None:
    """A bar chart: the coefficients of A and of B for the codewords that matter."""
    n = len(weights)
    columns = [weights[:, y, x] for y, x in places]
    zeros = (columns[0] == 0).sum().item()
    groups = {"those above": list(chosen)}
    for name, column in zip("AB", columns):
        before = sum(groups.values(), [])
        order = column.argsort(descending=True).tolist()
        groups[f"largest at {name}"] = [i for i in order if i not in before][:2]
    shown = sum(groups.values(), [])
    gaps = [0.5 * k for k, group in enumerate(groups.values()) for _ in group]
    ticks = [k + gap for k, gap in enumerate(gaps)]
    axis = placed_panel(
        figure, left=COLUMNS[1] + 0.6, top=top - 0.15, height=1.65, width=8.8,
        below=0.75,
        caption=f"The new feature of A is the sum of all {n} codewords, each times its "
        f"coefficient at A ({zeros} of these are 0); B mixes the same codewords in "
        "other amounts. Below each number: the class whose places get most.")
    headline(axis, "3  Mixed: how much of some codewords the places A and B take")
    for shift, name, column in zip((-0.2, 0.2), "AB", columns):
        axis.bar([x + shift for x in ticks], column[shown].numpy(), 0.38,
                 color=GREYS[name], edgecolor="black", linewidth=1.2,
                 label=f"at {name} ({classes_there[name]})")
    for text, group in groups.items():
        if not group:
            continue  # all codewords are in the other groups
        middle = ticks[shown.index(group[0])] + (len(group) - 1) / 2
        axis.annotate(text, (middle, 1), (0, 5), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=12, ha="center")
    axis.set_xticks(ticks, [f"{i}\n{best[i][0][:10]}" for i in shown])
    axis.tick_params(labelsize=12)
    axis.set_ylabel("coefficient", fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=12, frameon=False, loc="upper left", bbox_to_anchor=(1, 1),
                borderaxespad=0, handlelength=1, handleheight=1)


# --- 6. Demo -------------------------------------------------------------------------


def demo(file: str = "") -> None:
    """The way of one small image through EfficientFCN; with a file, its picture, too.

    The weights are random, so the picture shows what is drawn, and no lesson.
    """
    torch.manual_seed(0)
    model = build(5, backbone="resnet18").eval()
    image = synthetic_scene(96, 160)
    with torch.no_grad():
        features = model.encoder(image)
        context = model.context(features["res5"])
        steps = model.decoder.steps(context, features)
        logits, _ = model.decode(image)
        out = model.to_pixels(logits, image.shape[-2:])
    for name, x in {"image": image, **features, **steps, "logits": logits,
                    "out": out}.items():
        print(f"{name:<9} {tuple(x.shape)}")
    if file:
        explain(model, image).savefig(file, dpi=100)
        print(f"picture: {file}")
    print("costs: python evaluate.py cost efficientfcn")


if __name__ == "__main__":
    with show_errors():
        demo(*sys.argv[1:2])
