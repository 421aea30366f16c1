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
    | Fig. 3 (c), end    | SFNet.to_pixels    | from 1/4 to the image's size |
    | Fig. 3 (a)         | FAM.forward        | flow from both maps, then warp |
    | Fig. 3 (b)         | warp               | Eq. (2), then Eq. (3) |
    | Sec. 3.2, Eq. (1)  | predict_flow       | conv_l(cat(F_l, F_(l-1))) |
    | Sec. 3.2, Eq. (2)  | source_points      | p_l = (p_(l-1) + flow) / 2 |
    | Sec. 3.2, Eq. (3)  | sample             | weighted sum of 4 neighbours of p_l |
    | Sec. 3.1, FPN      | ZeroFlow           | bilinear enlargement, FAM's rival |
    | Sec. 3.3, decoder  | AlignedFPN.forward | top-down sums, fusion at 1/4 |
    | Sec. 3.3, cascaded | supervision_head   | one more classifier on every sum |
    | Table 2 (c)        | correlation        | FlowNet-C's matching, rival of cat |
    | Table 2 (d)        | Deformable         | deformable convolution, rival of FAM |
    | Fig. 5             | explain            | the flows in colours and as arrows |

Notes: what the paper says, what the official code does, what is done here, and what
it changes. "Code" is SFSegNets, the repository that the paper names. The authors'
older code, TorchCV, is mentioned where the two differ.
    N1  Layers of FAM.
        Paper: Sec. 3.2 first says that "two convolutional layers with the kernel size
               of 3x3" predict the flow, and later that FAM "only contains one 3x3
               convolution layer".
        Code:  Each of the two maps goes through its own 1x1 convolution to half of its
               channels. One 3x3 convolution turns both results into the flow. None of
               the three has a bias.
        Here:  As the code.
        Effect: The network then has 12,869,715 parameters on ResNet-18 without
               auxiliary heads, the 12.87 M of the paper's Tables 3 and 4.
    N2  Unit of the flow.
        Paper: In Eq. (2) a flow of 1 is one pixel of the finer map.
        Code:  The flow is divided by the width and the height of the finer map and is
               added to a grid that runs from -1 to 1. This grid is 2 long, so a flow
               of 1 is about half a pixel.
        Here:  As the paper. To load released weights, multiply those of the flow
               convolution by (r - 1) / (2 r) for x and by (q - 1) / (2 q) for y.
        Effect: For the same function, our flow weights get 2.05 times the gradient of
               the official ones, and one step of SGD at the same learning rate moves
               the sampling points 4.22 times as far (measured, weights converted). From
               the same initial weights our flow is twice as long. The learning rate
               0.01 of the recipe was chosen for the official unit. On scores: not
               measured.
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
        Here:  Bilinear as well, but the coarsest level is first. To load released
               weights, permute the input channels of `fuse`.
        Effect: The order does not matter to a network that is trained here. FAM in the
               fusion: not measured.
    N7  A 3x3 convolution on the sums.
        Paper: Names none. In Sec. 3.3 maps are "fused into their bottom levels via
               element-wise addition", then "up-sampled to the same resolution" and
               "concatenated together for prediction".
        Code:  Every sum goes through a 3x3 convolution with batch norm and ReLU on its
               way to the concatenation. The next finer level gets the sum without it.
        Here:  As the code.
        Effect: Not measured.
    N8  Deep supervision and hard pixels.
        Paper: Sec. 3.3 supervises "intermediate outputs of the decoder" and trains
               "only on the 10% hardest pixels sorted by cross-entropy loss".
        Code:  Each sum has a head whose loss has weight 1. Every loss keeps the pixels
               whose true class has a probability below 0.7, and at least 100,000
               pixels among the 2 images of one process.
        Here:  As the code, but the 100,000 pixels are the minimum of one call of the
               loss, that is, of all images on one device. There is no option for the
               paper's 10 %.
        Effect: The paper's Params do not include the heads. With 16 crops of 1024x1024
               on one device at least 0.6 % of the pixels are kept instead of 4.8 %. For
               synthetic logits, like those of a well-trained network, the loss was
               0.871 instead of 0.217. On scores: not measured.
    N9  Biases of convolutions before a batch norm.
        Paper: Silent.
        Code:  The laterals and the auxiliary heads have them, other layers do not.
        Here:  As the code.
        Effect: None but on the number of parameters: the batch norm subtracts what the
               bias has added.
    N10 Stem and dilation of the ResNets.
        Paper: "ResNet series"; Sec. 3.3 gives every stage a convolution of stride 2.
        Code:  The stem is three 3x3 convolutions with 64, 64 and 128 channels. By
               default the 3x3 of res4 and res5 are also dilated, although they keep
               their stride. TorchCV has no dilation.
        Here:  `--backbone resnet18s` has that stem. There is no dilation.
        Effect: Costs are equal. With the same weights the logits differ by up to 0.11
               where the largest is 0.17, so the released weights would not give their
               scores here. On the scores of a network trained here: not measured.
    N11 Costs of the kernel sizes, Table 2 (b).
        Paper: 120.4, 123.5, 131.6 and 140.5 GFLOPs for k = 1, 3, 5, 7.
        Code:  Has k = 3 only.
        Here:  `kernel` is the k of the flow convolution, N1's 3x3. Plain multiply-adds
               go from 122.83 for k = 1 to 123.89 for k = 7 (`python sfnet.py`).
        Effect: A kernel of side k adds a cost proportional to k^2. The four printed
               numbers do not grow like that, so more than k was changed between them.
               Do not compare these costs.
    N12 Rivals of PPM and FAM in Tables 1 and 2.
        Paper: Names them without their dimensions.
        Code:  Not released.
        Here:  As usual in the field. FCN: one 3x3 convolution. ASPP: rates 3, 6 and 9.
               Correlation: offsets of up to 4 positions. Non-local: its last batch norm
               usually starts at 0; ours starts at 1, or no gradient would reach theta,
               phi and g in the first step. Deformable convolution: offsets start at 0.
        Effect: Table 1 (c) prints 148.0 GFLOPs with the non-local module and 138.6 with
               ASPP; ours cost 124.11 and 124.95 (`python sfnet.py`). On scores: not
               measured.
    N13 Scores in the paper that disagree with each other.
        Paper: FAM without PPM has 77.2 in Table 1 (a) and 76.4 in (c). FAM with PPM has
               78.7 in (a) and 78.3 in (b) and (c). k = 5 has 78.1 in Table 2 (b) and
               78.2 in the text. In our copy of Table 1 (b) the row of 77.8 has the same
               three ticks as the row of 78.3.
        Here:  `fam-f4-f5` is our guess for the row of 77.8.
        Effect: Compare a score with rows of its own table only.
    N14 Schedule of training.
        Paper: Sec. 4.1, Cityscapes: 50,000 steps, power 0.9 of the "poly" decay, weight
               decay 5e-4, images scaled by 0.75 to 2; "all networks are trained with
               the same setting". Sec. 8, ADE20K and Context: 120 epochs, batch 16, crop
               512, learning rate 1e-2 for ADE20K and 1e-3 for Context.
        Code:  Scripts for Cityscapes: 300 epochs, power 1, weight decay 1e-4, scale 0.5
               to 2. TorchCV: nearly the paper, with scale 0.7 to 2.1 and batch 8. There
               is no script for ADE20K or Context.
        Here:  Cityscapes as the paper. ADE20K and Context as Sec. 8, with power, weight
               decay and scale of the Cityscapes scripts, on which Sec. 8 is silent.
               RECIPES also names "official script" as the source of learning rate, crop
               and epochs, which Sec. 8 gives.
        Effect: Not measured.

Run
    python sfnet.py                            shapes and costs, seconds on a CPU
    python train.py --method sfnet             on procedural streets, minutes
    python train.py --method sfnet --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from common import (ASPP, Encoder, UserError, conv_bn_relu, fcn_heads, full_precision,
                    label_colours, print_costs, rows_at, show, viewable)

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
    # Table 1 (c): context modules  [N12]
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
    # the network that both SFNet and NRD compare with
    "pspnet": {"decoder": "fcn", "context": "psp", "output_stride": 8, "channels": 512},
}

FROM_SCRATCH = {}  # options of `build` in train.py's own recipes
PAPER = "paper, Sec. 4.1"
SCRIPT = "official script"  # for Cityscapes, since there is no other  [N14]
DEEP = ("the paper's has the deep stem, {0}s, for which torchvision has no weights: "
        "--backbone {0}s --weights FILE")  # [N10]
SHARED = {"weights": ("imagenet", "paper, Sec. 3.3"), "batch": (16, PAPER),
          "momentum": (0.9, PAPER), "min_lr": (0.0, "paper: poly ends at 0"),
          "warmup": (0, "none stated"), "photometric": (False, PAPER),
          "ohem": (True, "paper, Sec. 3.3"),
          "aux_weight": (1.0, "official code")}  # [N8]
SCRIPTS = SHARED | {
    "backbone": ("resnet50", DEEP.format("resnet50")), "weight_decay": (1e-4, SCRIPT),
    "power": (1.0, SCRIPT), "scale": ((0.5, 2.0), SCRIPT),
    "crop": ((512, 512), SCRIPT), "epochs": (120, SCRIPT)}
RECIPES = {  # [N14]
    "cityscapes": SHARED | {
        "backbone": ("resnet18", DEEP.format("resnet18")), "lr": (0.01, PAPER),
        "weight_decay": (5e-4, PAPER), "power": (0.9, PAPER),
        "scale": ((0.75, 2.0), PAPER), "crop": ((1024, 1024), PAPER),
        "iterations": (50_000, PAPER)},
    "ade20k": SCRIPTS | {"lr": (0.01, SCRIPT)},
    "context60": SCRIPTS | {"lr": (0.001, SCRIPT)},
}

# --- 2. Equations --------------------------------------------------------------------


def enlarge(x: Tensor, size: tuple[int, int],
            rows: tuple[int, int] | None = None) -> Tensor:
    """Bilinear enlargement that keeps the corners: position i goes to 2i.  [N3]

    x (B, C, h, w), size (q, r) -> (B, C, q, r); with rows (lo, hi) the rows lo..hi-1
    of that alone, (B, C, hi - lo, r), so that a large image can be done in strips.
    """
    q, r = size
    if rows:
        lo, hi = rows
        h = x.shape[-2]
        y = torch.arange(lo, hi, dtype=torch.float64)
        x = rows_at(x, y * (h - 1) / max(q - 1, 1))
        q = hi - lo  # as many rows as x has now: below only the columns get more
    return F.interpolate(x, (q, r), mode="bilinear", align_corners=True)


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


def source_points(flow: Tensor, coarse_size: tuple[int, int]) -> Tensor:
    """Eq. (2): p_l = (p_(l-1) + flow(p_(l-1))) / 2, for every fine position.

    flow (B, 2, q, r) in pixels of the finer map [N2], coarse_size (h, w) -> p_l, the
    same shape, in pixels of the coarser one, x before y.

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


def warp(coarse: Tensor, flow: Tensor) -> Tensor:
    """Fig. 3 (b): coarse (B, D, h, w), flow (B, 2, q, r) -> coarse at p + flow(p).

    Zero flow is `enlarge`; a flow of (1, 0) everywhere fetches each feature one fine
    pixel further right, so the picture moves to the *left*.
    """
    return sample(coarse, source_points(flow, coarse.shape[-2:]))


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
                 reach: int | None = None):
        super().__init__()
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

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        B, D, q, r = fine.shape
        fine_code = self.reduce_fine(fine)  # (B, D/2, q, r)
        coarse_code = self.up(self.reduce_coarse(coarse), (q, r))  # (B, D/2, q, r)
        flow = predict_flow(coarse_code, fine_code, self.flow,
                            match=self.match)  # (B, 2, q, r)
        # Half precision knows positions beyond 256 to a quarter pixel at best, so the
        # sampling points are computed in float32 even where autocast is on.
        with full_precision(flow):
            return warp(coarse.float(), flow.float())


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
        with full_precision(both):
            return self.convolution(both.float(), offsets.float())


def conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution without bias and batch norm, with no ReLU behind them."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False),
                         nn.BatchNorm2d(out_channels))


def conv_bias_bn_relu(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """common.conv_bn_relu with the released code's needless bias.  [N9]"""
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2),
                         nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class PPM(nn.Module):
    """Pyramid pooling (PSPNet): the map beside its averages over 1, 4, 9 and 36 cells.

    An average over a whole cell tells each position what else is in the scene. As in
    the official code there is no ReLU behind the pooled 1x1 convolutions.
    mmsegmentation's PSPNet, whose scores NRD's tables print, has one.
    """

    def __init__(self, in_channels: int, channels: int, *, bins=(1, 2, 3, 6),
                 projection=1):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *conv_bn(in_channels, channels))
            for side in bins)
        self.project = nn.Sequential(
            *conv_bn_relu(in_channels + len(bins) * channels, channels, projection),
            nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
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
        attention = (theta.mT @ phi).softmax(dim=2)  # (B, h*w, h*w)
        # (B, C/2, h*w) x (B, h*w, h*w) -> (B, C/2, h*w)
        y = (g @ attention.mT).reshape(B, C // 2, h, w)  # (B, C/2, h, w)
        return self.project(x + self.back(y))


def supervision_head(channels: int, num_classes: int) -> nn.Sequential:
    """The auxiliary classifier of one sum, which helps it learn; gone in eval.  [N8]"""
    return nn.Sequential(*conv_bias_bn_relu(channels, channels, 3), nn.Dropout2d(0.1),
                         nn.Conv2d(channels, num_classes, 1))


class AlignedFPN(nn.Module):
    """Sec. 3.3: from coarse to fine, align and add; then classify all levels at 1/4.

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

    def top_down(self, context: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
        """One sum per stage, coarse first. The next finer one builds on it as it is.

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


# --- 4. Model ------------------------------------------------------------------------


class SFNet(nn.Module):
    """Fig. 3 (c): encoder without dilation, PPM, pyramid whose levels are aligned."""

    def __init__(self, encoder: Encoder, context: nn.Module, decoder: nn.Module,
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
        """images (B, 3, H, W) -> logits (B, K, q, r) at 1/4, auxiliary ones (at H, W).

        A decoder without a way down, `fcn`, leaves its logits at the context's size.
        """
        H, W = images.shape[-2:]
        features = self.encoder(images)
        context = self.context(features["res5"])  # F_5 of the pyramid
        logits, sums = self.decoder(context, features)
        # segmentation_loss would enlarge them too, but without aligned corners.  [N3]
        aux = [enlarge(head(x), (H, W)) for head, x in zip(self.aux_heads, sums)
               if self.training]
        return logits, aux

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """logits (B, K, q, r), size (H, W) -> (B, K, H, W), or its rows lo..hi-1 alone.

        The last step, by about 4 on each side. There is nothing to learn in it.
        """
        return enlarge(logits, size, rows)


# What makes the context out of res5, called as context(in_channels, channels).
CONTEXTS = {"ppm": PPM, "none": partial(conv_bn_relu, kernel=1), "conv": conv_bn_relu,
            "aspp": partial(ASPP, separable=False, projection=1),  # [N12]
            "non-local": NonLocal, "psp": partial(PPM, projection=3)}


def build(num_classes: int, *, backbone="resnet18", weights="none", decoder="fpn",
          context="ppm", channels: int | None = None, aligned=(3, 4, 5), align="fam",
          upsampling="bilinear", kernel=3, output_stride=32, ceil_mode=True,
          aux=True) -> SFNet:
    """SFNet or one of its rivals; VARIANTS names the rows of the paper's tables.

    channels        the width D; None: 128 for ResNet-18 and ShuffleNetV2, else 256
    aligned         the levels l whose map F_l is aligned with F_(l-1) (Table 1 b)
    align           by 'fam', 'correlation' (Table 2 c) or 'dcn' (Table 2 d)
    upsampling      of the coarse map before the flow is predicted (Table 2 a)
    kernel          of the flow convolution (Table 2 b)
    ceil_mode       max pooling rounds up  [N5]
    """
    encoder = Encoder(backbone, weights=weights, output_stride=output_stride,
                      ceil_mode=ceil_mode)
    D = channels or (128 if backbone.startswith(("resnet18", "shufflenet")) else 256)
    fam = partial(FAM, D, kernel=kernel, upsampling=upsampling)
    aligners = {"fam": fam, "correlation": partial(fam, reach=4),
                "dcn": partial(Deformable, D)}
    for name, value, known in (
            ("decoder", decoder, ("fpn", "fcn")), ("context", context, CONTEXTS),
            ("align", align, aligners),
            ("upsampling", upsampling, ("bilinear", "nearest", "deconv"))):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    context_module = CONTEXTS[context](encoder.channels["res5"], D)
    if decoder == "fcn":
        return SFNet(encoder, context_module, FCNDecoder(D, num_classes),
                     fcn_heads(encoder, num_classes, aux))
    # A ShuffleNetV2 has no stage at 1/4, only its pooled stem: classify at 1/8.
    levels = (4, 3) if backbone.startswith("shufflenet") else (4, 3, 2)
    stages = {f"res{level}": encoder.channels[f"res{level}"] for level in levels}
    # Two names for one module. The paper calls a FAM after the coarse map F_l that it
    # moves; the pyramid, which goes from stage to stage, keeps it at the fine stage
    # l - 1 that receives the result. So the FAM "at F_5" is align["res4"].
    align_modules = {}
    for level in levels:
        has_flow = level + 1 in aligned
        align_modules[f"res{level}"] = aligners[align]() if has_flow else ZeroFlow()
    heads = [supervision_head(D, num_classes) for _ in stages if aux]
    return SFNet(encoder, context_module,
                 AlignedFPN(stages, D, num_classes, align_modules),
                 nn.ModuleList(heads))


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: SFNet, image: Tensor, *, palette=None):
    """Fig. 5 from the model's own tensors: where each level fetches its features.

    image (1, 3, H, W), normalised -> matplotlib Figure: the image, the flow of every
    FAM, the last one as arrows too, and the prediction.
    """
    from matplotlib.figure import Figure
    modules = getattr(model.decoder, "align", {})  # an FCNDecoder aligns nothing
    fams = {stage: m for stage, m in modules.items() if isinstance(m, FAM)}
    if not fams:
        raise UserError("nothing to explain: this variant predicts no flow")
    flows = []
    hooks = [fam.flow.register_forward_hook(lambda _, __, flow: flows.append(flow[0]))
             for fam in fams.values()]
    with torch.no_grad():
        logits = model(image)["out"][0]
    for hook in hooks:
        hook.remove()
    picture = viewable(image[0])
    colours = label_colours(palette, len(logits))
    tiles = [("image", picture),
             *((f"flow to {stage}, up to {flow.norm(dim=0).max():.2g} px",
                flow_colours(flow)) for stage, flow in zip(fams, flows)),
             ("as arrows", picture), ("prediction", colours[logits.argmax(0)])]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    half = math.ceil(len(tiles) / 2)  # tiles of one of the two rows
    axes = [figure.add_subplot(2, half, i + 1) for i in range(len(tiles))]
    for axis, (title, tile) in zip(axes, tiles):
        show(axis, tile, title)
    draw_arrows(axes[-2], flows[-1], image.shape[-2:])
    return figure


def draw_arrows(axis, flow: Tensor, size: tuple[int, int]) -> None:
    """flow (2, q, r) as white arrows over an image of `size` (H, W), 16 or more a row.

    An arrow starts at a position and points to where its feature is from. The lengths
    are rescaled: the longest arrow is as long as its neighbour is far away.
    """
    H, W = size
    q, r = flow.shape[-2:]
    step = max(r // 16, 1)
    longest = flow.norm(dim=0).max().clamp(min=1e-6).item()
    x = torch.linspace(0, W - 1, r)[::step]
    y = torch.linspace(0, H - 1, q)[::step]
    # angles="xy": y grows downwards in an image, and a positive flow must point down.
    axis.quiver(x, y, *flow[:, ::step, ::step], angles="xy", width=0.004,
                scale_units="xy", scale=longest * r / (step * W), color="white")


def flow_colours(flow: Tensor) -> Tensor:
    """(2, q, r) -> RGB (q, r, 3). White is no flow, full colour the longest.

    Right is red, and the hue turns with the clock: down, left, up.
    """
    from matplotlib.colors import hsv_to_rgb
    hue = torch.atan2(flow[1], flow[0]) / (2 * torch.pi) % 1
    length = flow.norm(dim=0)
    strength = length / length.max().clamp(min=1e-6)
    hsv = torch.stack([hue, strength, torch.ones_like(hue)], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy()))


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through SFNet, and what each variant costs."""
    model = build(19, backbone="resnet18").eval()
    image = torch.randn(1, 3, 96, 160)
    features = model.encoder(image)
    context = model.context(features["res5"])
    logits, (s4, s3, s2) = model.decoder(context, features)
    more = {"context": context, "sum 4": s4, "sum 3": s3, "sum 2": s2, "out": logits}
    for name, x in ({"image": image} | features | more).items():
        print(f"{name:<8} {tuple(x.shape)}")
    print_costs("sfnet", (1024, 1024), backbone="resnet18s")


if __name__ == "__main__":
    demo()
