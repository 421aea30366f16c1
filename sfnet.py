"""SFNet: let each fine position say where in the coarse map its meaning lies.

Xiangtai Li, Ansheng You, Zhen Zhu, Houlong Zhao, Maoke Yang, Kuiyuan Yang, Yunhai
Tong. "Semantic Flow for Fast and Accurate Scene Parsing." ECCV 2020. arXiv:2002.10120

The idea
    A feature pyramid adds the enlarged coarse map to the finer one, position by
    position. But strides and pooling have moved things: what the coarse map knows
    about a pole is not exactly above the pole. Treat the maps like two video frames:
    predict the flow between them, and fetch each fine position's coarse feature from
    where the flow points. Zero flow is the ordinary pyramid.

Dimension key
    B batch   K classes (the paper's C)   C channels of a stage   D pyramid width (d)
    H, W image size   h, w the finer map of a pair   q, r the coarser one   l level
    n maps in the final concatenation (4)   R reach of the correlation (4)

Paper -> code
    | Fig. 3 (c)         | SFNet.forward      | encoder, context, decoder, enlarge |
    | Fig. 3 (a)         | FAM.forward        | flow from both maps, then warp |
    | Fig. 3 (b)         | warp               | Eq. (2), then Eq. (3) |
    | Sec. 3.2, Eq. (1)  | predict_flow       | conv_l(cat(F_l, F_(l-1))) |
    | Sec. 3.2, Eq. (2)  | source_points      | p_l = (p_(l-1) + flow) / 2 |
    | Sec. 3.2, Eq. (3)  | sample             | weighted sum of 4 neighbours of p_l |
    | Sec. 3.3, decoder  | AlignedFPN.forward | top-down sums, fusion at 1/4 |
    | Sec. 3.3, cascaded | supervision_head   | one more classifier on every sum |
    | Table 2 (c)        | correlation        | FlowNet-C's matching, rival of cat |
    | Table 2 (d)        | Deformable         | deformable convolution, rival of FAM |

Notes (paper says / official code does / we do / effect)
    N1  FAM: "two convolutional layers", then "only one 3x3" / a 1x1 to D/2 on either
        map, one 3x3 to 2, no biases / as the code / exactly the paper's 12.87 M.
    N2  Unit of the flow: pixels of the finer map / flow / (W, H) on a grid from -1 to
        1, about half a pixel / as the text / the flow's weights learn half as much.
    N3  align_corners: silent / mixed, True since 2022 / True: stride 2 puts position i
        at 2i / only so is zero flow bilinear; the logits' far border moves <= 3 pixels.
    N4  Outside the map: Eq. (3) has no such neighbours / zeros / zeros / a flow that
        leaves the picture fetches nothing.
    N5  Max pooling: silent / rounds up (2019), down (later) / up: 1024 gives 257, 129,
        65, 33, which Eq. (2) halves exactly / 123.5 GFLOPs need it, down gives 121.9.
    N6  Final fusion: FAM, yet "only in the adjacent" / bilinear / bilinear / unknown.
    N7  3x3 on the sums: silent / for the concatenation only / as the code / unknown.
    N8  Deep supervision: "10 % hardest pixels" / each sum has a head, weight 1, pixels
        with p < 0.7 and at least 100,000 / as the code / absent from Params.
    N9  Biases before a batch norm: silent / in laterals and heads / there / none.
    N10 Stem: "ResNet-18" / 3x3 to 64, 64, 128; by default res4 and res5 are dilated and
        keep their stride / `resnet18s` has that stem, no dilation / costs are equal.
    N11 Sweep of k, Table 2 (b): 120.4 .. 140.5 GFLOPs / none released / k is the flow
        convolution's, 122.8 .. 123.9 / the printed four follow no a + b k^2.
    N12 Rivals: no dimensions / not released / as usual: FCN 3x3; ASPP rates 3, 6, 9;
        correlation within 4 positions; non-local without its zero start, which stops
        the gradient; DCN offsets start at 0 / GFLOPs of Table 1 (c) are not met.
    N13 Table 1 gives FAM 77.2 and 78.7 with PPM in (a), 76.4 and 78.3 in (c). The ticks
        of 77.8 in (b) are damaged in our copy: `fam-f4-f5` is a guess.
    N14 Schedule: 50k steps, power 0.9, decay 5e-4, scale from 0.75 / 300 epochs, power
        1, 1e-4, 0.5 / the text on Cityscapes, scripts where it is silent / unknown.

Run
    python sfnet.py                            shapes and costs, seconds on a CPU
    python train.py --method sfnet             on procedural streets, minutes
    python train.py --method sfnet --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from common import (ASPP, Encoder, UserError, conv_bn_relu, fcn_heads, full_precision,
                    label_colours, published, show, viewable)

# --- 1. Config -----------------------------------------------------------------------

VARIANTS = {
    "default": {},
    # Table 1 (a): from FCN to FAM + PPM
    "fcn": {"decoder": "fcn", "context": "conv"},  # [N12]
    "dilated-fcn": {"decoder": "fcn", "context": "conv", "output_stride": 8},
    "fpn-no-ppm": {"context": "none", "aligned": ()},
    "no-ppm": {"context": "none"}, "fpn": {"aligned": ()},
    # Table 1 (b): which levels are aligned with the next finer one
    "fam-f3": {"aligned": (3,)}, "fam-f4": {"aligned": (4,)},  # [N13]
    "fam-f5": {"aligned": (5,)}, "fam-f4-f5": {"aligned": (4, 5)},
    # Table 1 (c): context modules  [N12]
    "aspp": {"context": "aspp"}, "non-local": {"context": "non-local"},
    # Table 2: inside FAM
    "fam-deconv": {"upsampling": "deconv"}, "fam-nearest": {"upsampling": "nearest"},
    "k1": {"kernel": 1}, "k5": {"kernel": 5}, "k7": {"kernel": 7},
    "correlation": {"align": "correlation", "aligned": (5,)},  # [N12]
    "dcn-f5": {"align": "dcn", "aligned": (5,)}, "dcn": {"align": "dcn"},
    # the network that both SFNet and NRD compare with
    "pspnet": {"decoder": "fcn", "context": "psp", "output_stride": 8, "channels": 512},
}

FROM_SCRATCH = {}  # options of `build` in train.py's own recipes
PAPER, SCRIPT = "paper, Sec. 4.1", "official script"
DEEP = ("the paper's has the deep stem, {0}s, for which torchvision has no weights: "
        "--backbone {0}s --weights FILE")  # [N10]
SHARED = {"weights": ("imagenet", "paper, Sec. 3.3"), "batch": (16, PAPER),
          "momentum": (0.9, PAPER), "min_lr": (0.0, "paper: poly ends at 0"),
          "warmup": (0, "none stated"), "photometric": (False, PAPER),
          "ohem": (True, "paper, Sec. 3.3"), "aux_weight": (1.0, "official code")}  # N8
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

R18, R50, R101, SHUFFLE = "resnet18s", "resnet50s", "resnet101s", "shufflenet_v2_x1_5"
CITY, SQUARE, HALF = (1024, 2048), (1024, 1024), (512, 512)
FREE, DF = "N12: no configuration was published", "DF networks: not in torchvision"
SWEEP = "N11: the released FAM does not give the paper's sweep"
row = partial(published, rule="mmcv", aux=False)  # batch norm counted, [N8] not
floor = partial(row, options={"ceil_mode": False})  # as NRD counted  [N5]
psp = partial(floor, rule="mmcv-sync")
PUBLISHED = [
    *(row(*key.split(), R18, SQUARE, 19, None, miou=miou) for key, miou in {
        "1a fcn": 71.5, "1a dilated-fcn": 72.6, "1a fpn-no-ppm": 74.8,
        "1a no-ppm": 77.2, "1a fpn": 76.6, "1a default": 78.7, "1b fpn": 76.6,
        "1b fam-f3": 76.9, "1b fam-f4": 77.0, "1b fam-f5": 77.5, "1b fam-f4-f5": 77.8,
        "1b default": 78.3, "1c no-ppm": 76.4, "2a default": 78.3, "2c fpn": 76.6,
        "2a fam-deconv": 77.9, "2a fam-nearest": 78.2, "2c correlation": 77.2,
        "2c fam-f5": 77.5, "2d fpn": 76.6, "2d dcn-f5": 76.9, "2d fam-f5": 77.5,
        "2d dcn": 77.2, "2d default": 78.3}.items()),
    *(row(table, variant, backbone, SQUARE, 19, gmacs, miou=v)
      for table, variant, backbone, gmacs, v in [
        ("1c", "default", R18, 123.5, 78.3), ("2b", "default", R18, 123.5, 78.3),
        ("1d", "fpn", R50, 332.6, 76.8), ("1d", "default", R50, 337.1, 79.2),
        ("1d", "fpn", R101, 412.7, 77.6), ("1d", "default", R101, 417.5, 79.8),
        ("1d", "fpn", SHUFFLE, 17.8, 69.8), ("1d", "default", SHUFFLE, 18.1, 72.1)]),
    *(row(table, variant, R18, SQUARE, 19, gmacs, miou=v, why=why)
      for table, variant, gmacs, v, why in [
        ("1c", "non-local", 148.0, 76.8, FREE), ("1c", "aspp", 138.6, 77.6, FREE),
        ("2b", "k1", 120.4, 77.8, SWEEP), ("2b", "k5", 131.6, 78.1, SWEEP),
        ("2b", "k7", 140.5, 78.0, SWEEP)]),
    row("1c", None, R18, SQUARE, 19, 141.5, miou=77.5, name="DenseASPP", why=FREE),
    *(row("1d", None, name[:3], SQUARE, 19, gmacs, miou=v, name=name, why=DF)
      for name, gmacs, v in [("DF1", 18.6, 72.1), ("DF1 w/ FAM", 18.7, 74.3),
                             ("DF2", 48.2, 73.2), ("DF2 w/ FAM", 48.5, 75.8)]),
    *(row("3", None, name, CITY, 19, None, params=p, miou=v, name=name, why=DF)
      for name, p, v in [("DF1", 9.03, 74.5), ("DF2", 10.53, 77.8)]),
    row("3", "default", R18, CITY, 19, None, params=12.87, miou=78.9),
    row("4", "pspnet", R101, SQUARE, 19, 1065.4, params=65.7, miou_ms=78.4),
    row("4", "default", R18, SQUARE, 19, 123.5, params=12.87, miou_ms=79.5),
    row("4", "default", R101, SQUARE, 19, 417.5, params=50.32, miou_ms=81.8),
    *(row(table, variant, backbone, (480, 480), {"5a": 60, "5b": 150}[table], gmacs,
          miou_ms=v) for table, variant, backbone, gmacs, v in [
        ("5a", "fpn", R50, 74.5, 49.0), ("5a", "default", R50, 75.4, 50.7),
        ("5a", "fpn", R101, 92.7, 51.1), ("5a", "default", R101, 93.6, 53.8),
        ("5b", "fpn", R50, 74.8, 41.12), ("5b", "default", R50, 75.7, 42.81),
        ("5b", "fpn", R101, 93.1, 43.08), ("5b", "default", R101, 94.0, 44.67)]),
    # NRD's Table 5 shows mIoU on the 150 classes of ADE20K, but counted SFNet with 19.
    floor("NRD 5", "default", R50, HALF, 19, 83.2, miou_ms=42.81),
    floor("NRD 5", "default", R101, HALF, 19, 102.7, miou_ms=44.67),
    floor("NRD 7", "default", R18, CITY, 19, 243.9, miou=78.9, miou_ms=79.5),
    floor("NRD 7", "default", R101, CITY, 19, 821.2, miou_ms=81.8),
    psp("NRD 5", "pspnet", "resnet50c", HALF, 150, 178.8, miou=41.68, miou_ms=42.78),
    psp("NRD 5", "pspnet", "resnet101c", HALF, 150, 256.4, miou=41.96, miou_ms=43.29),
    psp("NRD 7", "pspnet", "resnet101c", CITY, 19, 2049.0, miou_ms=78.4),
]

# --- 2. Equations --------------------------------------------------------------------


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear enlargement that keeps the corners: position i goes to 2i.  [N3]"""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def predict_flow(coarse: Tensor, fine: Tensor, convolution) -> Tensor:
    """Eq. (1): flow = conv_l(cat(F_l, F_(l-1))), F_l already enlarged.

    (B, C, h, w) twice -> (B, 2, h, w): channel 0 along x, channel 1 along y.
    """
    return convolution(torch.cat([coarse, fine], dim=1))


def source_points(flow: Tensor, coarse_size: tuple[int, int]) -> Tensor:
    """Eq. (2): p_l = (p_(l-1) + flow(p_(l-1))) / 2, for every fine position.

    flow (B, 2, h, w) in pixels of the finer map [N2], coarse_size (q, r) -> p_l, the
    same shape, in pixels of the coarser one. The half is (q - 1)/(h - 1): exactly 1/2
    where h = 2q - 1 [N5]; elsewhere a plain half would part the maps' corners.
    """
    B, _, h, w = flow.shape
    q, r = coarse_size
    x = torch.arange(w, device=flow.device, dtype=flow.dtype) + flow[:, 0]  # (B, h, w)
    y = torch.arange(h, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    return torch.stack([x * (r - 1) / max(w - 1, 1), y * (q - 1) / max(h - 1, 1)], 1)


def sample(coarse: Tensor, points: Tensor) -> Tensor:
    """Eq. (3): a weighted sum of the four neighbours of each p_l, the near weigh more.

    coarse (B, D, q, r), points (B, 2, h, w) -> (B, D, h, w); neighbours outside the
    map count as zero [N4]. grid_sample wants -1 and 1 for the centres of the outer
    pixels. The loop over the four neighbours is in tests/test_sfnet.py.
    """
    q, r = coarse.shape[-2:]
    x, y = points.unbind(dim=1)
    grid = torch.stack([2 * x / max(r - 1, 1) - 1, 2 * y / max(q - 1, 1) - 1], dim=-1)
    return F.grid_sample(coarse, grid, padding_mode="zeros", align_corners=True)


def warp(coarse: Tensor, flow: Tensor) -> Tensor:
    """Fig. 3 (b): coarse (B, D, q, r), flow (B, 2, h, w) -> coarse at p + flow(p).

    Zero flow is `enlarge`; a flow of (1, 0) everywhere fetches each feature one fine
    pixel further right, so the picture moves to the *left*.
    """
    return sample(coarse, source_points(flow, coarse.shape[-2:]))


def correlation(coarse: Tensor, fine: Tensor, *, reach: int) -> Tensor:
    """FlowNet-C: how well coarse(p + o) fits fine(p), for every offset o in reach.

    (B, C, h, w) twice -> (B, (2R+1)^2, h, w), the mean over channels of the product;
    offsets row by row, zero outside the map. Sec. 3.2 doubts that maps which differ so
    much in meaning can be matched.
    """
    B, C, h, w = fine.shape
    side, padded = 2 * reach + 1, F.pad(coarse, (reach,) * 4)
    scores = [(padded[..., y:y + h, x:x + w] * fine).mean(dim=1)
              for y in range(side) for x in range(side)]
    return torch.stack(scores, dim=1)


# --- 3. Layers -----------------------------------------------------------------------


class FAM(nn.Module):
    """Flow alignment module, Fig. 3 (a): bring the coarse map onto the fine one's grid.

    coarse (B, D, q, r), fine (B, D, h, w) -> aligned coarse (B, D, h, w). The flow is
    predicted from reduced copies; what is warped is the coarse map itself.
    """

    def __init__(self, channels: int, *, kernel=3, upsampling="bilinear",
                 reach: int | None = None):
        super().__init__()
        half = channels // 2
        self.reduce_coarse = nn.Conv2d(channels, half, 1, bias=False)  # [N1]
        self.reduce_fine = nn.Conv2d(channels, half, 1, bias=False)
        # All are called as up(x, size); F.interpolate's default is nearest, and kernel
        # 3 with stride 2 centres output position 2i on input position i, too.
        self.up = {"bilinear": enlarge, "nearest": F.interpolate}.get(
            upsampling) or nn.ConvTranspose2d(half, half, 3, 2, padding=1, bias=False)
        self.reach = reach
        inputs = 2 * half if reach is None else (2 * reach + 1)**2
        self.flow = nn.Conv2d(inputs, 2, kernel, padding=kernel // 2, bias=False)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        B, D, h, w = fine.shape
        near = self.reduce_fine(fine)  # (B, D/2, h, w)
        far = self.up(self.reduce_coarse(coarse), (h, w))  # (B, D/2, h, w)
        flow = (predict_flow(far, near, self.flow) if self.reach is None else
                self.flow(correlation(far, near, reach=self.reach)))  # (B, 2, h, w)
        # Half precision knows positions beyond 256 to a quarter pixel at best.
        with full_precision(flow):
            return warp(coarse.float(), flow.float())


class Deformable(nn.Module):
    """Table 2 (d): a deformable 3x3 convolution (Dai et al., 2017) in FAM's place.

    Each tap of the kernel has a flow of its own, and the result is a new feature, not
    the old one from elsewhere. Offsets start at 0, but their gradient does not.  [N12]
    """

    def __init__(self, channels: int):
        super().__init__()
        self.offsets = nn.Conv2d(2 * channels, 2 * 9, 3, padding=1)
        self.convolution = DeformConv2d(2 * channels, channels, 3, padding=1)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        B, D, h, w = fine.shape
        both = torch.cat([enlarge(coarse, (h, w)), fine], dim=1)  # (B, 2*D, h, w)
        offsets = self.offsets(both)  # (B, 18, h, w)
        with full_precision(both):
            return self.convolution(both.float(), offsets.float())


class PPM(nn.Module):
    """Pyramid pooling (PSPNet): averages of 1, 4, 9, 36 cells. No ReLU, as the code."""

    def __init__(self, in_channels: int, channels: int, *, bins=(1, 2, 3, 6),
                 projection=1):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side),
                          *conv_bn_relu(in_channels, channels, 1)[:2]) for side in bins)
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
        self.split = nn.Conv2d(in_channels, in_channels // 2 * 3, 1, bias=False)
        self.back = conv_bn_relu(in_channels // 2, in_channels, 1)[:2]  # no ReLU
        self.project = conv_bn_relu(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        theta, phi, g = self.split(x).flatten(2).chunk(3, dim=1)
        # (B, h*w, C/2) x (B, C/2, h*w) -> (B, h*w, h*w)
        attention = (theta.mT @ phi).softmax(dim=2)  # (B, h*w, h*w)
        y = (g @ attention.mT).reshape(B, C // 2, h, w)  # (B, C/2, h, w)
        return self.project(x + self.back(y))


def biased(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """common.conv_bn_relu with the released code's needless bias.  [N9]"""
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2),
                         nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def supervision_head(channels: int, num_classes: int) -> nn.Sequential:
    """The auxiliary classifier of one sum; gone in eval.  [N8]"""
    return nn.Sequential(*biased(channels, channels, 3), nn.Dropout2d(0.1),
                         nn.Conv2d(channels, num_classes, 1))


class AlignedFPN(nn.Module):
    """Sec. 3.3: from coarse to fine, align and add; then classify all levels at 1/4.

    stages: the width of each, coarse first. align: stage -> what brings the coarser sum
    onto its grid; where there is none, zero flow.
    """

    def __init__(self, stages: dict[str, int], channels: int, num_classes: int,
                 align: dict[str, nn.Module]):
        super().__init__()
        self.stages, self.align = tuple(stages), nn.ModuleDict(align)
        D, n = channels, 1 + len(stages)
        self.laterals = nn.ModuleDict({s: biased(C, D, 1) for s, C in stages.items()})
        self.smooth = nn.ModuleDict({s: conv_bn_relu(D, D) for s in stages})
        self.fuse = nn.Sequential(*conv_bn_relu(n * D, D), nn.Conv2d(D, num_classes, 1))

    def top_down(self, context: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
        """One sum per stage, coarse first. The next level gets it unsmoothed.  [N7]"""
        coarse, sums = context, []
        for stage in self.stages:
            fine = self.laterals[stage](features[stage])
            coarse = fine + (self.align[stage](coarse, fine) if stage in self.align
                             else enlarge(coarse, fine.shape[-2:]))
            sums.append(coarse)
        return sums

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        """-> logits at the finest stage, and the maps that auxiliary heads look at."""
        sums = self.top_down(context, features)
        levels = [context] + [self.smooth[s](x) for s, x in zip(self.stages, sums)]
        (B, D, h, w), n = sums[-1].shape, len(levels)
        x = torch.cat([enlarge(x, (h, w)) for x in levels], dim=1)  # (B, n*D, h, w)
        return self.fuse(x), sums  # [N6]


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
        self.encoder, self.context = encoder, context
        self.decoder, self.aux_heads = decoder, aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, H, W), ...]}."""
        H, W = images.shape[-2:]
        features = self.encoder(images)
        context = self.context(features["res5"])
        logits, sums = self.decoder(context, features)
        # The loss enlarges with align_corners=False, so nothing is left to it.  [N3]
        aux = [enlarge(head(x), (H, W)) for head, x in zip(self.aux_heads, sums)
               if self.training]
        return {"out": enlarge(logits, (H, W)), "aux": aux}


CONTEXTS = {"ppm": PPM, "none": partial(conv_bn_relu, kernel=1), "conv": conv_bn_relu,
            "aspp": partial(ASPP, separable=False, projection=1),  # [N12]
            "non-local": NonLocal, "psp": partial(PPM, projection=3)}


def build(num_classes: int, *, backbone="resnet18", weights="none", decoder="fpn",
          context="ppm", channels: int | None = None, aligned=(3, 4, 5), align="fam",
          upsampling="bilinear", kernel=3, output_stride=32, ceil_mode=True,
          aux=True) -> SFNet:
    """SFNet or one of its rivals; VARIANTS names the rows of the paper's tables.

    channels        width D; None: 128 for ResNet-18 and ShuffleNetV2, else 256
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
    before = CONTEXTS[context](encoder.channels["res5"], D)
    if decoder == "fcn":
        return SFNet(encoder, before, FCNDecoder(D, num_classes),
                     fcn_heads(encoder, num_classes, aux))
    # A ShuffleNetV2 has no stage at 1/4, only its pooled stem: classify at 1/8.
    levels = (4, 3) if backbone.startswith("shufflenet") else (4, 3, 2)
    stages = {f"res{l}": encoder.channels[f"res{l}"] for l in levels}
    modules = {f"res{l}": aligners[align]() for l in levels if l + 1 in aligned}
    heads = [supervision_head(D, num_classes) for _ in stages if aux]
    return SFNet(encoder, before, AlignedFPN(stages, D, num_classes, modules),
                 nn.ModuleList(heads))


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: SFNet, image: Tensor, *, palette=None):
    """Fig. 5 from the model's own tensors: where each level fetches its features.

    image (1, 3, H, W), normalised -> matplotlib Figure: the image, the flow of every
    FAM, the last as arrows (rescaled) to where the feature is from, the prediction.
    """
    from matplotlib.figure import Figure
    fams = {s: m for s, m in getattr(model.decoder, "align", {}).items()
            if isinstance(m, FAM)}
    if not fams:
        raise UserError("nothing to explain: this variant predicts no flow")
    flows = []
    hooks = [fam.flow.register_forward_hook(lambda _, __, flow: flows.append(flow[0]))
             for fam in fams.values()]
    with torch.no_grad():
        logits = model(image)["out"][0]
    for hook in hooks:
        hook.remove()
    picture, colours = viewable(image[0]), label_colours(palette, len(logits))
    tiles = [("image", picture),
             *((f"flow to {stage}, up to {flow.norm(dim=0).max():.2g} px",
                flow_colours(flow)) for stage, flow in zip(fams, flows)),
             ("as arrows", picture), ("prediction", colours[logits.argmax(0)])]
    figure, half = Figure(figsize=(11, 4.4), layout="constrained"), -(-len(tiles) // 2)
    axes = [figure.add_subplot(2, half, i + 1) for i in range(len(tiles))]
    for axis, (title, tile) in zip(axes, tiles):
        show(axis, tile, title)
    (H, W), (h, w) = image.shape[-2:], flows[-1].shape[-2:]
    step, longest = max(w // 16, 1), flows[-1].norm(dim=0).max().clamp(min=1e-6).item()
    x, y = torch.linspace(0, W - 1, w)[::step], torch.linspace(0, H - 1, h)[::step]
    # angles="xy": y grows downwards in an image, and a positive flow must point down.
    axes[-2].quiver(x, y, *flows[-1][:, ::step, ::step], angles="xy", width=0.004,
                    scale_units="xy", scale=longest * w / (step * W), color="white")
    return figure


def flow_colours(flow: Tensor) -> Tensor:
    """(2, h, w) -> RGB (h, w, 3). White is no flow, full colour the longest.

    Right is red, and the hue turns with the clock: down, left, up.
    """
    from matplotlib.colors import hsv_to_rgb
    hue, length = torch.atan2(flow[1], flow[0]) / (2 * torch.pi) % 1, flow.norm(dim=0)
    strength = length / length.max().clamp(min=1e-6)
    hsv = torch.stack([hue, strength, torch.ones_like(hue)], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy()))


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through SFNet, and what each variant costs."""
    from evaluate import print_costs
    model = build(19, backbone="resnet18").eval()
    image = torch.randn(1, 3, 96, 160)
    features = model.encoder(image)
    context = model.context(features["res5"])
    logits, (s4, s3, s2) = model.decoder(context, features)
    more = {"context": context, "sum 4": s4, "sum 3": s3, "sum 2": s2, "out": logits}
    for name, x in ({"image": image} | features | more).items():
        print(f"{name:<8} {tuple(x.shape)}")
    print_costs("sfnet", SQUARE, backbone=R18)


if __name__ == "__main__":
    demo()
