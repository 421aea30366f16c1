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
    B batch (the paper's base map B is `base`)   K classes   n codewords (256)
    D channels of a codeword (1024; the paper's C holds all n, here `codewords`)
    M, L channels of the fused maps m32, m8 (1536)   H, W image size
    h, w = ceil(H/32), ceil(W/32)   q, r = ceil(H/8), ceil(W/8)

Paper -> code
    | Fig. 2          | HolisticallyGuidedDecoder.steps   | every tensor by its name |
    | Sec. 3.2, m     | fuse                              | m32, m8 at one size |
    | Eq. (1)         | spatial_softmax                   | A~ from A |
    | Eq. (2)         | codebook                          | c_i = sum A~_i B |
    | Eq. (3)         | assemble                          | f~8 = W^T C |
    | Sec. 3.2, f^8   | HolisticallyGuidedDecoder.forward | [f~8; G], classifier |
    | Sec. 3.1        | EfficientFCN.forward              | encoder, decoder, x8 |
    | Fig. 3          | explain                           | where codewords come from |
    | Table 1, FCN-*  | FCNDecoder                        | no way up at all |
    | Table 1, UNet-* | UNetDecoder                       | bilinear or deconvolution |

Notes (paper says / official code does / we do / effect)
    N1  Cost of Table 1: 69.6 GMACs, 55.8 M / the text has 52.6 and 50.3 by the paper's
        counter, the code 60.2 and 52.2 / `published-cost` has widths that give the
        numbers of Tables 1 and 4. They were found by search and contradict the 1024
        of the text: a guess that fits, not a fact / scores of these widths unknown.
        That counter adds 2 per element of a batch norm, sees no matrix product, and
        its Params include the encoder's unused ImageNet classifier (2.049 M).
    N2  Depth: A and W each by one 1x1, classifier on f^8 / two 1x1 each, and one from
        2D to 1024 channels before the classifier / text; `official` is the code /
        +2.2 M, +8.6 GMACs; on scores unknown.
    N3  Stride 8: res3 compressed to 512 / res3 as it is / text; `official` is the code
        / -0.3 M, -1.1 GMACs; res3 of ResNet-50 and -101 has 512 channels anyway.
    N4  Batch norm and ReLU: silent / after every 1x1 but the last of A (batch norm
        only) and the classifier / as the code / W >= 0: codewords add, never cancel.
    N5  f~8 is scaled by n^-0.5: silent / yes / as the code / else n terms, none of
        them with W < 0, add up and outweigh G, which stands beside f~8 in f^8.
    N6  Concatenated to f~8: "the guidance feature map G" / G without the mean of the
        base map / G / with G-bar one vector would be repeated at every location.
    N7  Resizing: "bilinear" / align_corners=True, which is exact at 32k + 1 pixels; at
        512 it lays the last 1/32 row, centred on pixel 480, on the 1/8 row at 504 /
        the exact positions at any size / none at 32k + 1; on streets none to see.
    N8  Bias of A's last batch norm: silent / there / there, so that sizes agree /
        none: Eq. (1) cancels what is constant over space, its gradient is rounding.
    N9  Dropout before the classifier: silent / 0.1, whole channels / as the code, in
        the U-Nets too / unknown.
    N10 Auxiliary losses: none / none / none; the U-Nets have two 1x1 heads, which
        Table 1 seems to count (0.06 M, 0.04 GMACs; our GMACs are without) / unknown.
        The U-Nets' widths are not given: ours were searched to fit the table.
    N11 Stem: "the original ResNet" / three 3x3 and average-pooled shortcuts / the
        backbone's suffix says; shortcuts are torchvision's / the published costs need
        (32, 32, 64), but dilated-fcn8s's 223.6 GMACs (64, 64, 128), 217.8 otherwise.
    N12 Training: ADE20K 120 epochs / 80, batch 32; decoder at 10x the learning rate of
        the encoder, not in the text; PASCAL Context with 59 classes, background
        ignored, where the paper counts 60 / text plus the code's 10x and batch sizes;
        `context59` is the code's, `context60` the text's / unknown.

Run
    python efficientfcn.py                     shapes and costs, seconds on a CPU
    python train.py --method efficientfcn      on procedural streets, minutes
    python train.py --method efficientfcn --dataset camvid --data-root DIR
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Encoder, FCNHead, UserError, conv_bn_relu, full_precision,
                    label_colours, published, repeat_border, show, upsample, viewable)

# --- 1. Config -----------------------------------------------------------------------

STRIDES = {"res3": 8, "res4": 16, "res5": 32}
SCALES = tuple(STRIDES)  # in the order of m8 and m32
CODE = {"double": True, "conv_up": True}  # [N2]
VARIANTS = {
    "default": {},
    "official": CODE | {"compress_e8": False},  # [N3]
    "published-cost": CODE | {"codeword_channels": 1536, "weighting_hidden": 512},
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
    # Table 4: codewords. 256 is `default`; 600 is for ADE20K
    "n32": {"codewords": 32},
    "n64": {"codewords": 64},
    "n128": {"codewords": 128},
    "n512": {"codewords": 512},
    "n1024": {"codewords": 1024},
    "n600": {"codewords": 600},
    # Sec. 4.2: the assembly weights are predicted without knowing the codewords
    "no-transfer": {"transfer": False},
}

FROM_SCRATCH = {}  # options of `build` in train.py's own recipes
PAPER, OFFICIAL = "paper, Sec. 4.1", "official code"
SCHEDULE = {"lr": (0.001, PAPER), "head_lr": (10.0, OFFICIAL),
            "weight_decay": (1e-4, PAPER), "backbone": ("resnet101", PAPER),
            "weights": ("imagenet", PAPER), "batch": (16, OFFICIAL),
            "momentum": (0.9, PAPER), "power": (0.9, PAPER),
            "min_lr": (0.0, "paper, Sec. 4.1: plain poly"),
            "warmup": (0, "paper, Sec. 4.1: none"), "scale": ((0.5, 2.0), PAPER),
            "photometric": (False, "paper, Sec. 4.1: only flip and scale"),
            "aux_weight": (0.4, "ours, used by the U-Nets only"),  # [N10]
            "crop": ((512, 512), PAPER), "epochs": (120, PAPER)}
RECIPES = {
    "context60": SCHEDULE,
    "context59": SCHEDULE,  # [N12]
    "voc": SCHEDULE | {
        "lr": (0.002, PAPER), "epochs": (80, PAPER),
        "batch": (16, "official code, for PASCAL Context")},
    "ade20k": SCHEDULE | {  # with 600 codewords, `efficientfcn:n600`
        "lr": (0.002, PAPER), "crop": ((576, 576), PAPER), "batch": (32, OFFICIAL)},
}


def measured(table, variant, gmacs, *, backbone="resnet101c", classes=60, **more):
    """A row of the paper: 512x512, its own counter, scores over several scales [N1]."""
    if gmacs is not None:
        more = {"rule": "thop", "unused": 2.049} | more
    return published(table, variant, backbone, (512, 512), classes, gmacs, **more)


PUBLISHED = [
    measured("1", "fcn32s", 44.6, params=54.0, miou_ms=43.3),
    measured("1", "dilated-fcn8s", 223.6, backbone="resnet101s", params=54.0,
             miou_ms=47.2),  # [N11]
    measured("1", "unet-bilinear", 87.9, params=60.7, miou_ms=49.3),
    measured("1", "unet-deconv", 93.2, params=62.8, miou_ms=49.1),
    measured("1", "published-cost", 69.6, params=55.8, miou_ms=55.3),
    measured("1", "official", 69.6, params=55.8, miou_ms=55.3,
             why="N1: the released code is smaller than the network counted"),
    measured("1", "default", 69.6, params=55.8, miou_ms=55.3,
             why="N1: the text's network is smaller than the one counted"),
    measured("2", "codebook-32", None, miou_ms=54.8),
    measured("2", "codebook-16-32", None, miou_ms=55.1),
    measured("2", "default", None, miou_ms=55.3),
    measured("3", "guidance-8", None, miou_ms=47.9),
    measured("3", "guidance-8-16", None, miou_ms=52.1),
    measured("3", "default", None, miou_ms=55.3),
    *(measured("4", "published-cost", gmacs, miou_ms=miou, options={"codewords": n})
      for n, gmacs, miou in ((32, 67.9, 54.5), (64, 68.1, 54.9), (128, 68.6, 55.0),
                             (256, 69.6, 55.3), (512, 72.1, 55.5), (1024, 78.9, 55.1))),
    measured("4.2", "no-transfer", None, miou_ms=54.2),
    measured("5", "published-cost", 70, miou_ms=55.3),
    measured("5", "n600", None, classes=150, miou_ms=45.28),
    measured("6", "default", None, classes=21, miou_ms=85.4),
]

# --- 2. Equations --------------------------------------------------------------------
# Each has a literal twin, a loop over codewords and places, in
# tests/test_efficientfcn.py.


def to_grid(x: Tensor, factor: float, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing by 1/4 .. 4 that leaves every position where it is.  [N7]

    A stride-2 convolution centres position i of its output on position 2i of its input.
    So 4 x 1/32 is: three new rows after each row but the last, which is repeated.
    """
    if factor <= 1:
        step = round(1 / factor)
        return x[..., ::step, ::step]
    (h, w), (q, r), f = x.shape[-2:], size, round(factor)
    x = F.interpolate(x, (f * (h - 1) + 1, f * (w - 1) + 1), mode="bilinear",
                      align_corners=True)
    x = repeat_border(x, max(q - x.shape[-2], 0), max(r - x.shape[-1], 0))
    return x[..., :q, :r]


def fuse(maps: dict[str, Tensor], stride: int, size: tuple[int, int]) -> Tensor:
    """m32 or m8 of Sec. 3.2: the named stages on one grid, side by side."""
    resized = [to_grid(x, STRIDES[stage] / stride, size) for stage, x in maps.items()]
    return torch.cat(resized, dim=1)


def spatial_softmax(maps: Tensor) -> Tensor:
    """Eq. (1): A~_i(x, y) = exp A_i(x, y) / sum_pq exp A_i(p, q), for (B, n, h, w).

    Every codeword distributes a weight of 1 over the *places*. Over the codewords
    instead, a place would choose its codeword, and an object that fills few places
    would be drowned in the sum of Eq. (2).
    """
    return maps.flatten(2).softmax(dim=2).reshape(maps.shape)


def codebook(weighting: Tensor, base: Tensor) -> Tensor:
    """Eq. (2): c_i = sum_pq A~_i(p, q) B(p, q), all n codewords in one product.

    weighting (B, n, h, w), base (B, D, h, w) -> codewords (B, D, n), which have no
    spatial order left: shuffling the places of both inputs changes nothing.
    """
    # (B, D, h*w) x (B, h*w, n) -> (B, D, n)
    return base.flatten(2) @ weighting.flatten(2).transpose(1, 2)


def assemble(weights: Tensor, codewords: Tensor) -> Tensor:
    """Eq. (3): f~8 = W^T C, at each place its own mixture of the same codewords.

    weights (B, n, q, r), codewords (B, D, n) -> (B, D, q, r). The features are as fine
    as W is, and at most n of them are independent, however many places there are.
    """
    B, n, q, r = weights.shape
    # (B, D, n) x (B, n, q*r) -> (B, D, q*r)
    return (codewords @ weights.flatten(2)).unflatten(2, (q, r))


# --- 3. Layers -----------------------------------------------------------------------


def pointwise(*widths: int, last_relu=True) -> nn.Sequential:
    """A chain of 1x1 convolutions, each with batch norm and ReLU.  [N4]"""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in
              conv_bn_relu(i, o, 1)]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def classifier(in_channels: int, num_classes: int) -> nn.Sequential:
    """Dropout of whole channels, then 1x1 to the logits.  [N9]"""
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(in_channels, num_classes, 1))


class HolisticallyGuidedDecoder(nn.Module):
    """Fig. 2: fusion, holistic codebook, assembly; logits at 1/8.

    `compress` reduces the stages that some scale needs, `base` and `weighting` read
    m32, `guidance` reads m8, `assembly` reads G-bar.
    """

    stride = 8

    def __init__(self, stages: dict[str, int], num_classes: int, *, channels: int,
                 codewords: int, codeword_channels: int, codebook_scales: tuple,
                 guidance_scales: tuple, transfer: bool, compress_e8: bool,
                 double: bool, weighting_hidden: int, conv_up: bool):
        super().__init__()
        check_scales(codebook_scales=codebook_scales, guidance_scales=guidance_scales)
        self.codebook_scales, self.guidance_scales = codebook_scales, guidance_scales
        self.transfer, n, D = transfer, codewords, codeword_channels
        compressed = SCALES if compress_e8 else ("res4", "res5")  # [N3]
        self.compress = nn.ModuleDict(
            {s: pointwise(stages[s], channels) for s in compressed
             if s in (*codebook_scales, *guidance_scales)})
        width = stages | {s: channels for s in compressed}
        M = sum(width[s] for s in codebook_scales)
        L = sum(width[s] for s in guidance_scales)
        hidden = [weighting_hidden] if weighting_hidden else []
        again = [n] if double else []
        self.base = pointwise(M, D)
        self.weighting = pointwise(M, *hidden, n, *again, last_relu=False)  # [N8]
        self.guidance = pointwise(L, D)
        self.assembly = pointwise(D, n, *again)  # [N2]
        self.conv_up = pointwise(2 * D, 2 * channels) if conv_up else nn.Identity()
        self.classify = classifier(2 * channels if conv_up else 2 * D, num_classes)

    def steps(self, context: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the encoder's maps to f~8: every tensor that Sec. 3.2 names."""
        B, _, h, w = context.shape
        q, r = features["res3"].shape[-2:]
        e = features | {"res5": context}
        e |= {stage: layer(e[stage]) for stage, layer in self.compress.items()}
        m32 = fuse({s: e[s] for s in self.codebook_scales}, 32, (h, w))  # (B, M, h, w)
        m8 = fuse({s: e[s] for s in self.guidance_scales}, 8, (q, r))  # (B, L, q, r)
        base = self.base(m32)  # (B, D, h, w)
        G = self.guidance(m8)  # (B, D, q, r)
        # m8 has never seen the codewords. Their mean tells it which ones there are.
        mean = base.mean(dim=(2, 3), keepdim=True)  # (B, D, 1, 1)
        weights = self.assembly(G + mean if self.transfer else G)  # (B, n, q, r)
        maps = self.weighting(m32)  # (B, n, h, w)
        # A softmax and two sums over hundreds of terms: float32 even under autocast.
        with full_precision(maps):
            maps = spatial_softmax(maps.float())  # (B, n, h, w)
            codewords = codebook(maps, base.float())  # (B, D, n)
            mixture = assemble(weights.float(), codewords)  # (B, D, q, r)
        assembled = mixture * maps.shape[1]**-0.5  # (B, D, q, r)  [N5]
        return {"m32": m32, "m8": m8, "base": base, "maps": maps, "guidance": G,
                "weights": weights, "codewords": codewords, "assembled": assembled}

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        """-> logits (B, K, q, r), and no maps for auxiliary heads."""
        step = self.steps(context, features)
        f8 = torch.cat([step["assembled"], step["guidance"]], dim=1)  # [N6]
        return self.classify(self.conv_up(f8)), []


def check_scales(**scales: tuple[str, ...]) -> None:
    for option, names in scales.items():
        if not names or not set(names) <= set(SCALES) or isinstance(names, str):
            raise UserError(f"{option}={names!r}: must be a tuple of some of {SCALES}, "
                            f"for instance ('res5',)")


# The rivals of Table 1: same arguments, same result, their own way up.


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

    A step up sees a 2x2 (deconvolution) or 3x3 (bilinear) neighbourhood: what is
    elsewhere in the image cannot help it. This is what the codewords are held against.
    """

    stride = 8

    def __init__(self, stages: dict[str, int], num_classes: int, *, channels: int,
                 deconv: bool):
        super().__init__()
        enlarge = lambda: nn.ConvTranspose2d(channels, channels, 2, stride=2,
                                             bias=False) if deconv else nn.Identity()
        self.factor = 1 if deconv else 2  # what is left for bilinear upsampling to do
        self.laterals = nn.ModuleDict({s: pointwise(stages[s], channels)
                                       for s in SCALES})
        self.up16, self.up8 = enlarge(), enlarge()
        self.merge16 = conv_bn_relu(2 * channels, channels)
        self.merge8 = conv_bn_relu(2 * channels, 2 * channels)
        self.classify = classifier(2 * channels, num_classes)

    def forward(self, context: Tensor, features: dict[str, Tensor]):
        """-> logits (B, K, q, r), and [1/32, 1/16] maps for the auxiliary heads."""
        stages = features | {"res5": context}
        e8, e16, f32 = (self.laterals[s](stages[s]) for s in SCALES)
        f16 = self.merge16(self.beside(self.up16(f32), e16))
        f8 = self.merge8(self.beside(self.up8(f16), e8))
        return self.classify(f8), [f32, f16]

    def beside(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Twice ceil(H/32) rows may be one more than ceil(H/16): the last is cut."""
        return torch.cat([upsample(coarse, self.factor, fine.shape[-2:]), fine], dim=1)


# --- 4. Model ------------------------------------------------------------------------


class EfficientFCN(nn.Module):
    """Encoder without dilation and one of the decoders (Sec. 3.1).

    There is no context module: the codewords are the context. The part is kept, empty,
    because cost and learning rates are told by part.
    """

    def __init__(self, encoder: Encoder, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder, self.context = encoder, context
        self.decoder, self.aux_heads = decoder, aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, ., .), ..]}."""
        B, _, H, W = images.shape
        features = self.encoder(images)
        context = self.context(features["res5"])
        logits, coarser = self.decoder(context, features)
        out = upsample(logits, self.decoder.stride, (H, W))  # (B, K, H, W)
        aux = [head(x) for head, x in zip(self.aux_heads, coarser) if self.training]
        return {"out": out, "aux": aux}


def build(num_classes: int, *, backbone="resnet50", weights="none", decoder="hgd",
          channels=512, codewords=256, codeword_channels=None, codebook_scales=SCALES,
          guidance_scales=SCALES, transfer=True, compress_e8=True, double=False,
          weighting_hidden=0, conv_up=False, output_stride=32,
          aux=True) -> EfficientFCN:
    """EfficientFCN or one of its rivals; VARIANTS names the rows of the tables.

    decoder           'hgd', 'fcn', 'unet-bilinear' or 'unet-deconv' (Table 1)
    channels          width of e8, e16, e32 (512, Sec. 3.2), and of the rivals
    codewords         n (256, Table 4)
    codeword_channels width D of a codeword; None: twice `channels` (1024, Sec. 3.2)
    codebook_scales, guidance_scales  stages in m32 and in m8 (Tables 2 and 3)
    transfer          add the mean of the base map to G (Sec. 4.2)
    compress_e8       1x1 on res3 as on the other two  [N3]
    double, conv_up   second 1x1 for A and W, 1x1 before the classifier  [N2]
    weighting_hidden  width of one more 1x1 in A, 0: none  [N1]
    output_stride     32; 8 dilates the encoder of 'fcn'
    aux               heads of the U-Nets at 1/32 and 1/16  [N10]
    """
    if decoder != "fcn" and output_stride != 32:
        raise UserError(f"output_stride={output_stride}: only decoder='fcn' is dilated")
    encoder = Encoder(backbone, weights=weights, output_stride=output_stride)
    stages = encoder.channels
    decoders = {
        "hgd": lambda: HolisticallyGuidedDecoder(
            stages, num_classes, channels=channels, codewords=codewords,
            codeword_channels=codeword_channels or 2 * channels,
            codebook_scales=codebook_scales, guidance_scales=guidance_scales,
            transfer=transfer, compress_e8=compress_e8, double=double,
            weighting_hidden=weighting_hidden, conv_up=conv_up),
        "fcn": lambda: FCNDecoder(
            stages, num_classes, channels=channels, stride=output_stride),
        "unet-bilinear": lambda: UNetDecoder(
            stages, num_classes, channels=channels, deconv=False),
        "unet-deconv": lambda: UNetDecoder(
            stages, num_classes, channels=channels, deconv=True),
    }
    if decoder not in decoders:
        raise UserError(f"decoder={decoder!r}: must be one of {', '.join(decoders)}")
    heads = [nn.Conv2d(channels, num_classes, 1) for _ in range(2)
             if aux and decoder.startswith("unet")]
    return EfficientFCN(encoder, nn.Identity(), decoders[decoder](),
                        nn.ModuleList(heads))


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: EfficientFCN, image: Tensor, *, palette=None):
    """Fig. 3 from the model's own tensors: where codewords come from and go to.

    image (1, 3, H, W), normalised -> matplotlib Figure. Upper row: the image and the
    weighting maps A~_i of four codewords at 1/32, the places that each one averages.
    Lower row: the prediction and the assembly weights W_i of the same codewords at 1/8,
    the places that each one is given to. Only the half of the codewords that the image
    uses most is considered: W_i of a random one is often 0 everywhere.
    """
    from matplotlib.figure import Figure
    decoder = model.decoder
    if not isinstance(decoder, HolisticallyGuidedDecoder):
        raise UserError("nothing to explain: this variant has no codewords")
    with torch.no_grad():
        features = model.encoder(image)
        step = decoder.steps(model.context(features["res5"]), features)
        labels = model(image)["out"][0].argmax(0)
    colours = label_colours(palette, decoder.classify[1].out_channels)
    maps, weights = step["maps"][0], step["weights"][0]
    used = weights.mean(dim=(1, 2)).argsort(descending=True)[:-(-len(weights) // 2)]
    chosen = used[unlike(maps[used], 4)].tolist()
    figure = Figure(figsize=(11, 3), layout="constrained")
    upper, lower = figure.subplots(2, 1 + len(chosen))
    show(upper[0], viewable(image[0]), "image")
    show(lower[0], colours[labels], "prediction")
    for above, below, i in zip(upper[1:], lower[1:], chosen):
        show(above, maps[i], f"codeword {i}: averaged from")
        show(below, weights[i], f"codeword {i}: given to")
    return figure


def unlike(maps: Tensor, count: int) -> list[int]:
    """The map (n, h, w) of lowest entropy, then each time the least like the chosen.

    Many codewords look at the same places; a random choice would show one map often.
    """
    flat = maps.flatten(1)
    entropy = -(flat * flat.clamp(min=1e-12).log()).sum(1)
    chosen = [entropy.argmin().item()]
    while len(chosen) < min(count, len(flat)):
        distance = torch.cdist(flat, flat[chosen], p=1).amin(1)
        distance[chosen] = -1
        chosen.append(distance.argmax().item())
    return chosen


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through EfficientFCN, and what each variant costs."""
    from evaluate import print_costs
    model = build(60, backbone="resnet18").eval()
    image = torch.randn(1, 3, 96, 160)
    features = model.encoder(image)
    context = model.context(features["res5"])
    logits, _ = model.decoder(context, features)
    steps = model.decoder.steps(context, features)
    for name, x in {"image": image, **features, **steps, "logits": logits,
                    "out": model(image)["out"]}.items():
        print(f"{name:<9} {tuple(x.shape)}")
    print_costs("efficientfcn", (512, 512), backbone="resnet101c")


if __name__ == "__main__":
    demo()
