"""DUpsampling: learn from the labels alone how to draw a patch of labels.

Zhi Tian, Tong He, Chunhua Shen, Youliang Yan. "Decoders Matter for Semantic
Segmentation: Data-Dependent Decoding Enables Flexible Feature Aggregation." CVPR 2019.
arXiv:1903.02120

The idea
    A 16x16 window of labels has 16*16*K one-hot numbers but few shapes: one class, an
    edge, a pole. PCA over all windows of the training labels finds 64 directions that
    rebuild nearly every window. Keep them as the last layer, a 1x1 convolution W that
    is never trained: the network only has to say 64 numbers per window. Since W brings
    the resolution back, low-level features may be shrunk to the coarse map for fusion.

Dimension key
    B batch   K classes (the paper's C)   D channels of context and decoder (256)
    H, W image size   r ratio, pixels per side of a window (16 or 32)
    h, w = ceil(H/r), ceil(W/r): the grid of windows   E components (the paper's C~; 64)
    N = K*r*r numbers of a window   M windows   L channels of reduced features (48)

Paper -> code
    | Fig. 2             | DUpsampling.forward      | encoder, fusion, DUpsampling |
    | Sec. 3.1, v        | windows                  | labels cut into r x r windows |
    | Eq. (2), x = P v   | compress                 | labels to E numbers per window |
    | Eq. (2), v~ = W x  | decompress               | 1x1 convolution, then shuffled |
    | Eq. (3), PCA       | principal_components     | W and the mean, from labels |
    | Eq. (4)            | pretrain_loss            | regression of compressed labels |
    | Eq. (5), F         | DUpsamplingDecoder       | E numbers per window, drawn |
    | Eq. (6)            | Temperature              | logits divided by a learned T |
    | Eq. (1)            | BilinearDecoder          | the rival of Table 1 |
    | Eq. (7), Fig. 1    | VanillaDecoder           | fusion at the fine resolution |
    | Eq. (8)            | Fuse                     | fusion at the coarse resolution |
    | Table 1, mIoU*     | build                    | --backbone labels |

Notes (paper says / official code does / we do / effect). No official code exists.
    N1  Is W trained? "pre-computed" / - / frozen, `learn_upsampling` trains it / users
        who train it elsewhere report ragged, nearest-neighbour-like borders.
    N2  Mean of PCA: W x has none / - / taken off to find W, then dropped; `mean` adds
        it to the logits / the mean is a class prior, between 0 and 1 before T.
    N3  Ignored pixels: silent / - / all zero in v, as padding is; no window is left
        out / windows with void are rebuilt darker, not as another class.
    N4  Order of v: silent / - / (class, row, column), that of nn.PixelShuffle, shared
        by PCA and depth-to-space / none, but a checkpoint depends on it.
    N5  PCA of N = 4,864 to 38,400 numbers: "closed form" / - / randomised subspace
        iteration over a stream of labels, never an N x N matrix / 4 passes lose 0.01 %
        more variance of CamVid's labels than the exact eigenvectors.
    N6  Fusion: a CNN f / - / per feature 1x1 to 48 and two separable 3x3 of 256, two
        features one after the other / reproduces all FLOPs of Tables 2-4 but one.
    N7  Encoder: "as in [5]" / - / ResNet with ASPP of 256 channels, rates 96 divided by
        the output stride / not counted in the paper's FLOPs.
    N8  New layers start Gaussian with variance 0.01 / - / the same with the paper's
        recipes; FROM_SCRATCH has torch's start / up to four times as long as torch's,
        weights before a batch norm turn that much slower: for long schedules only.
    N9  "FLOPS": no definition / - / two per multiply-add of the decoder, at 513x513,
        and one more product per logit, for T / all but one number round exactly.
    N10 Xception-65 has E = 128, and by its FLOPs 256 on Cityscapes / - / `components` /
        Xception is not in torchvision: `XceptionShapes` serves to count its decoders.
    N11 T: "learned" from 1 / - / its logarithm is / the gradient of T itself grows with
        1/T^2: on streets, at lr 0.05, T jumped below 0 and the loss stayed at ln K.

Run
    python dupsampling.py                      shapes and costs, seconds on a CPU
    python train.py --method dupsampling       on procedural streets, minutes
    python train.py --method dupsampling --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, UserError, conv_bn_relu, downsample, fcn_heads,
                    full_precision, label_colours, make_encoder, one_hot, published,
                    separable_conv, show, upsample, viewable)

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
# --- 1. Config -----------------------------------------------------------------------

STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16}
VARIANTS = {
    "default": {},
    # Table 1: the upsampling alone
    "no-fusion": {"fuse": ()}, "no-fusion-os32": {"fuse": (), "output_stride": 32},
    "bilinear": {"decoder": "bilinear"},
    "bilinear-os32": {"decoder": "bilinear", "output_stride": 32},
    # Table 2: which low-level features; `default` has the stem and res4
    "fuse-stem": {"fuse": ("stem",)}, "fuse-res2": {"fuse": ("res2",)},
    "fuse-res4": {"fuse": ("res4",)}, "fuse-res2-res4": {"fuse": ("res2", "res4")},
    # Table 3: the decoder of Fig. 1
    "vanilla": {"decoder": "vanilla", "fuse": ("res2",)},
    "vanilla-stem-res4": {"decoder": "vanilla", "fuse": ("stem", "res4")},
    "vanilla-res4": {"decoder": "vanilla", "fuse": ("res4",)},
    # Sec. 4.1.4 and notes, each beside `no-fusion`  [N1] [N2]
    "no-temperature": {"fuse": (), "temperature": False},
    "learn-upsampling": {"fuse": (), "learn_upsampling": True},
    "mean": {"fuse": (), "mean": True},
}

FROM_SCRATCH = {"init": "torch"}  # options of `build` in train.py's own recipes  [N8]
PAPER, OPEN = "paper, Sec. 4", "not stated; DeepLabv3+'s"
SCHEDULE = {"lr": (0.007, PAPER), "weight_decay": (1e-4, PAPER),
            "backbone": ("resnet50", PAPER), "weights": ("imagenet", PAPER),
            "batch": (48, PAPER + "; batch norm over 12 of them there"),
            "momentum": (0.9, OPEN), "power": (0.9, OPEN), "min_lr": (0.0, OPEN),
            "warmup": (0, OPEN), "scale": ((0.5, 2.0), PAPER),
            "photometric": (False, PAPER), "aux_weight": (0.0, "no auxiliary loss"),
            "crop": ((513, 513), "not stated; the FLOPs fit it"),
            "iterations": (30_000, PAPER + ", for VOC")}
RECIPES = {"voc": SCHEDULE, "context60": SCHEDULE, "cityscapes": SCHEDULE | {
    "lr": (0.01, "paper, Sec. 4.1.3"), "iterations": (90_000, "paper, Sec. 4.1.3"),
    "crop": ((769, 769), OPEN)}}

VOC, CITY, R50, X65 = (513, 513), (1025, 2049), "resnet50c", "xception65"
E128, E256 = {"components": 128}, {"components": 256}  # [N10]
row = partial(published, rule="2x")  # FLOPs of the decoder, two per product  [N9]
PUBLISHED = [
    *(row("1", variant, R50, VOC, 21, None, miou=miou, upper_bound=bound)
      for variant, miou, bound in [
        ("bilinear-os32", 70.77, 94.80), ("no-fusion-os32", 72.09, 99.90),
        ("bilinear", 72.15, 98.40), ("no-fusion", 73.15, 99.95)]),
    *(row(table, variant, R50, VOC, 21, None, decoder=billions, miou=miou)
      for table, variant, billions, miou in [
        ("2", "no-fusion", 0.80, 73.15), ("2", "fuse-stem", 1.13, 72.70),
        ("2", "fuse-res2", 1.15, 74.03), ("2", "fuse-res4", 1.23, 73.43),
        ("2", "fuse-res2-res4", 1.58, 73.82), ("2", "default", 1.56, 74.20),
        ("3", "vanilla", 5.53, 73.26), ("3", "fuse-res2", 1.15, 74.03),
        ("3", "default", 1.56, 74.20)]),
    row("3", "vanilla-stem-res4", R50, VOC, 21, None, decoder=22.34,
        why="the number fits a 512x512 image, all others fit 513x513"),
    *(row(table, variant, X65, size, K, None, decoder=billions, miou=miou, options=more)
      for table, variant, size, K, billions, miou, more in [
        ("3", "vanilla", VOC, 21, 5.53, 78.70, {}),
        ("3", "fuse-res2", VOC, 21, 1.93, 79.09, E128),
        ("3", "vanilla-res4", VOC, 21, 0.41, 78.74, {}),
        ("3", "fuse-res4", VOC, 21, 1.98, 79.67, E128),
        ("4", "vanilla", CITY, 19, 43.65, 79.36, {}),
        ("4", "fuse-res4", CITY, 19, 25.14, 79.06, E256)]),
    row("4.1.4", "no-temperature", R50, VOC, 21, None, miou=69.81),
    row("4.2", None, X65, VOC, 21, 897.94, name="whole network", rule="plain",
        why="N10: needs Xception-65 and test scales that are not stated"),
]

# --- 2. Equations --------------------------------------------------------------------


def windows(labels: Tensor, r: int) -> Tensor:
    """Cut labels (H, W) into r x r windows, (M, r*r); the border is padded with 255."""
    H, W = labels.shape
    h, w = -(-H // r), -(-W // r)
    padded = F.pad(labels, (0, w * r - W, 0, h * r - H), value=255).reshape(h, r, w, r)
    return padded.permute(0, 2, 1, 3).reshape(h * w, r * r)  # (h*w, r*r)


def one_hot_rows(patches: Tensor, num_classes: int) -> Tensor:
    """Windows (M, r*r) to their vectors v, (M, N), sparse: r*r ones in each row.

    Pixel p of class k stands at k*r*r + p  [N4]; ignored pixels are zero  [N3].
    """
    M, points = patches.shape
    columns = patches.long().clamp(max=num_classes - 1) * points + torch.arange(points)
    return torch.sparse_csr_tensor(
        torch.arange(M + 1) * points, columns.flatten(),
        (patches < num_classes).float().flatten(),  # [N3]
        (M, num_classes * points), check_invariants=False)


def principal_components(label_maps, num_classes: int, *, ratio: int, components: int,
                         passes=4, progress=lambda *_: None):
    """W (N, E) and the mean (N,) of Eq. (3), and the share of variance that is lost.

    `label_maps` has a length and is iterated over `passes` times: (H, W) uint8 each,
    255 ignored. Every pass multiplies a block of 2*E vectors Q with the covariance C
    without forming it: C Q = sum over windows of v (v^T Q) / M - mean (mean^T Q). That
    turns Q towards the leading eigenvectors (subspace iteration, Halko et al. 2011,
    Sec. 4.5)  [N5]. The literal reading, an SVD of all windows, is in
    tests/test_dupsampling.py.
    """
    N = num_classes * ratio**2
    if components > N:
        raise UserError(f"components={components}: a window of {ratio}x{ratio} with "
                        f"{num_classes} classes has {N} numbers only")
    # With as many spare vectors, errors shrink by eigenvalue 2*E over E in each pass.
    seed = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(N, min(2 * components, N), generator=seed)).Q
    for step in range(passes):
        product, total, count = torch.zeros_like(Q), torch.zeros(N), 0
        for done, v, weight in vectors(label_maps, ratio, num_classes):
            columns = v.t().to_sparse_csr()  # v^T, laid out for a product from the left
            product += columns @ (weight[:, None] * (v @ Q))
            total += columns @ weight
            count += int(weight.sum())
            progress(step, passes, done)
        mean = total / count
        product = product / count - torch.outer(mean, mean @ Q)  # C Q
        # The trace of C: v is zeros and ones, so its squares sum up to what it does.
        variance = (mean.sum() - mean.square().sum()).item()
        values, turn = torch.linalg.eigh(Q.T @ product)  # ascending
        W = Q @ turn.flip(1)[:, :components]
        lost = 1 - values.flip(0)[:components].sum().item() / variance
        Q = torch.linalg.qr(product).Q  # one turn further, orthonormal again
    return W, mean, lost


def vectors(label_maps, ratio: int, num_classes: int, *, chunk=4096):
    """Yields (label maps read, v (M, N), weight (M,)), some `chunk` windows at a time.

    Two thirds of CamVid's windows hold a single class and so are all the same vector:
    those are counted (weight), not repeated.
    """
    waiting = []
    for done, labels in enumerate(label_maps, start=1):
        waiting.append(windows(labels, ratio))
        if done < len(label_maps) and sum(map(len, waiting)) < chunk:
            continue
        patches, waiting = torch.cat(waiting), []
        pure = (patches == patches[:, :1]).all(1)
        ids, counts = patches[pure, 0].unique(return_counts=True)
        alike = ids[:, None].expand(-1, ratio**2)
        weight = torch.cat([torch.ones(int((~pure).sum())), counts.float()])
        v = one_hot_rows(torch.cat([patches[~pure], alike]), num_classes)
        yield done, v, weight


def compress(labels: Tensor, W: Tensor, mean: Tensor, *, num_classes: int,
             ratio: int) -> Tensor:
    """Eq. (2): x = P v, labels (B, H, W) -> Y~ (B, E, h, w). P is W^T.

    Eq. (3) asks for the best P as well, and with orthonormal columns that is it.
    """
    (B, H, W_), (N, E) = labels.shape, W.shape
    h, w = -(-H // ratio), -(-W_ // ratio)
    padded = F.pad(labels, (0, w * ratio - W_, 0, h * ratio - H), value=255)
    v = F.pixel_unshuffle(one_hot(padded, num_classes), ratio)  # (B, N, h, w)
    return F.conv2d(v - mean[:, None, None], W.T[:, :, None, None])  # (B, E, h, w)


def decompress(x: Tensor, W: Tensor, *, ratio: int) -> Tensor:
    """Eq. (2): v~ = W x at every location, windows side by side: a 1x1 convolution.

    x (B, E, h, w), W (N, E) -> (B, K, h*r, w*r), on maps of any shape.
    """
    (B, E, h, w), N = x.shape, len(W)
    v = F.conv2d(x, W[:, :, None, None])  # (B, N, h, w)
    return F.pixel_shuffle(v, ratio)  # (B, N/ratio/ratio, h*ratio, w*ratio)


# --- 3. Layers -----------------------------------------------------------------------


class Temperature(nn.Module):
    """Eq. (6): softmax(z / T); T is one number, learned from 1.

    W rebuilds ones and zeros, logits one apart: far too even for a softmax. The network
    could only answer with a large F; T lets a single number do it (Fig. 5).  [N11]
    """

    def __init__(self):
        super().__init__()
        self.log_T = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return z / self.log_T.exp()


class DUpsample(nn.Module):
    """Fig. 3: every location's E numbers to its r x r window of logits.

    W is in every checkpoint, but not trained unless `learn` says so: the encoder learns
    a code that exists, not the code and its meaning at once  [N1]. Until `prepare` has
    seen the labels W is random, and training warns of it.
    """

    def __init__(self, components: int, num_classes: int, ratio: int, *, learn: bool,
                 mean: bool, temperature: bool):
        super().__init__()
        N = num_classes * ratio**2
        self.num_classes, self.ratio, self.use_mean = num_classes, ratio, mean
        W = torch.linalg.qr(torch.randn(N, components)).Q
        self.W = nn.Parameter(W, requires_grad=learn)
        self.register_buffer("mean", torch.zeros(N))  # [N2]
        self.register_buffer("fitted", torch.tensor(False))  # to the labels, by prepare
        self.temperature = Temperature() if temperature else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):  # logits that differ by 0.02 would not survive bfloat16
            z = decompress(x.float(), self.W, ratio=self.ratio)
            if self.use_mean:
                z = z + self.mean.reshape(-1, self.ratio, self.ratio).tile(x.shape[-2:])
            return self.temperature(z)


class Fuse(nn.Module):
    """Eq. (8): f(concat(downsample(F_i), F_last)), all on the coarse map.  [N6]"""

    def __init__(self, low_channels: int, channels: int, *, factor: int, reduced=48):
        super().__init__()
        self.factor = factor
        self.reduce = conv_bn_relu(low_channels, reduced, 1)
        self.f = nn.Sequential(*separable_conv(channels + reduced, channels),
                               *separable_conv(channels, channels))

    def forward(self, last: Tensor, low: Tensor) -> Tensor:
        B, D, h, w = last.shape
        # Shrinking first changes nothing (both are linear) and costs up to 64x less.
        low = self.reduce(downsample(low, self.factor, (h, w)))  # (B, L, h, w)
        both = torch.cat([last, low], dim=1)  # (B, D+L, h, w)
        return self.f(both)


class DUpsamplingDecoder(nn.Module):
    """Fig. 2: fuse on the coarse map, say E numbers per location, let W draw."""

    def __init__(self, encoder: nn.Module, channels: int, components: int,
                 num_classes: int, *, fuse, output_stride: int, **options):
        super().__init__()
        self.fuse, self.stride = fuse, 1
        self.fusions = nn.ModuleList(
            Fuse(encoder.channels[n], channels, factor=output_stride // STRIDES[n])
            for n in fuse)
        self.project = nn.Conv2d(channels, components, 1, bias=False)  # D to E
        self.dupsample = DUpsample(components, num_classes, output_stride, **options)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        if self.training and not self.dupsample.fitted:
            warnings.warn("W is random: call dupsampling.prepare(model, label_maps)")
        return self.dupsample(self.compressed(context, features))

    def compressed(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        """F of Eq. (4) and Eq. (5): what is said of each window, (B, E, h, w)."""
        for name, fusion in zip(self.fuse, self.fusions):  # one after the other  [N6]
            context = fusion(context, features[name])
        return self.project(context)


class VanillaDecoder(nn.Module):
    """Eq. (7), Fig. 1: bring everything to the finest fused map, convolve there.

    The convolutions of Fuse, on a map of up to 64 times as many positions.
    """

    def __init__(self, encoder: nn.Module, channels: int, num_classes: int, *, fuse,
                 output_stride: int, reduced=48):
        super().__init__()
        self.fuse, self.from_stride = fuse, output_stride
        self.stride = min(STRIDES[name] for name in fuse)
        self.reduce = nn.ModuleList(conv_bn_relu(encoder.channels[name], reduced, 1)
                                    for name in fuse)
        self.f = nn.Sequential(
            *separable_conv(channels + reduced * len(fuse), channels),
            *separable_conv(channels, channels))
        self.classify = nn.Conv2d(channels, num_classes, 1, bias=False)  # as counted

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        finest = min(self.fuse, key=STRIDES.get)
        size = features[finest].shape[-2:]
        maps = [upsample(context, self.from_stride // self.stride, size)]
        maps += [upsample(reduce(features[name]), STRIDES[name] // self.stride, size)
                 for name, reduce in zip(self.fuse, self.reduce)]
        return self.classify(self.f(torch.cat(maps, dim=1)))


class BilinearDecoder(nn.Module):
    """Eq. (1): classify the coarse map; its logits are enlarged by `output_stride`."""

    def __init__(self, channels: int, num_classes: int, *, output_stride: int):
        super().__init__()
        self.classify, self.stride = nn.Conv2d(channels, num_classes, 1), output_stride

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(context)


class XceptionShapes(nn.Module):
    """Widths of Xception-65: entry flow at 1/4, middle flow at 1/16.  [N10]"""

    channels = {"res2": 256, "res4": 728, "res5": 2048}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not images.is_meta:
            raise UserError("xception65 is known by its shapes only: for cost")
        (B, _, H, W), strides = images.shape, (4, 16, 16)
        return {name: images.new_empty(B, channels, -(-H // s), -(-W // s))
                for (name, channels), s in zip(self.channels.items(), strides)}


# --- 4. Model ------------------------------------------------------------------------


class DUpsampling(nn.Module):
    """Fig. 2: (dilated) encoder, ASPP, and one of the decoders."""

    def __init__(self, encoder: nn.Module, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder, self.context = encoder, context
        self.decoder, self.aux_heads = decoder, aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, H/16, W/16)]}."""
        B, _, H, W = images.shape
        features = self.encoder(images)
        context = self.context(features["res5"])  # (B, D, h, w)
        logits = self.decoder(context, features)
        out = upsample(logits, self.decoder.stride, (H, W))  # (B, K, H, W)
        aux = [head(features["res4"]) for head in self.aux_heads if self.training]
        return {"out": out, "aux": aux}


def build(num_classes: int, *, backbone="resnet50", weights="none",
          decoder="dupsampling", channels=256, components=64, output_stride=16,
          fuse=("stem", "res4"), temperature=True, learn_upsampling=False, mean=False,
          init="official", aux=False) -> DUpsampling:
    """DUpsampling or one of its rivals; VARIANTS names the rows of the paper's tables.

    channels           width D of ASPP and decoder (256)  [N7]
    components         E, numbers per window (64, Sec. 4)  [N10]
    output_stride      the ratio r of the upsampling too (16 or 32)
    fuse               low-level features, fused in this order (Table 2)
    temperature        learn T (Sec. 4.1.4)
    learn_upsampling   train W too  [N1]
    mean               add the mean window to the logits  [N2]
    init               of new layers: 'official' as the paper says, or 'torch'  [N8]
    """
    for name, value, known in (
            ("decoder", decoder, ("dupsampling", "vanilla", "bilinear")),
            ("init", init, ("official", "torch"))):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if not set(fuse) <= set(STRIDES) or (decoder == "vanilla" and not fuse):
        raise UserError(f"fuse={fuse!r}: must name some of {', '.join(STRIDES)}")
    encoder = XceptionShapes() if backbone == X65 else make_encoder(
        backbone, num_classes, weights=weights, output_stride=output_stride)  # [N7]
    context = ASPP(encoder.channels["res5"], channels, projection=1,
                   rates=tuple(r * 32 // output_stride for r in (3, 6, 9)))
    if decoder == "dupsampling":
        head = DUpsamplingDecoder(
            encoder, channels, components, num_classes, fuse=fuse, mean=mean,
            learn=learn_upsampling, temperature=temperature,
            output_stride=output_stride)
    elif decoder == "vanilla":
        head = VanillaDecoder(encoder, channels, num_classes, fuse=fuse,
                              output_stride=output_stride)
    else:
        head = BilinearDecoder(channels, num_classes, output_stride=output_stride)
    for layer in [*context.modules(), *head.modules()]:
        if isinstance(layer, nn.Conv2d) and init == "official":
            nn.init.normal_(layer.weight, std=0.1)  # [N8]
    return DUpsampling(encoder, context, head, fcn_heads(encoder, num_classes, aux))


def prepare(model: DUpsampling, label_maps, **options) -> str:
    """Fit W to the training labels, once, before training; a line for the log."""
    if not isinstance(model.decoder, DUpsamplingDecoder):
        return "this variant has no W to fit"
    last = model.decoder.dupsample
    N, E = last.W.shape
    W, mean, lost = principal_components(label_maps, last.num_classes, components=E,
                                         ratio=last.ratio, **options)
    last.load_state_dict({"W": W, "mean": mean, "fitted": torch.tensor(True)},
                         strict=False)  # all but T
    return f"W: {E} of {N} directions keep {1 - lost:.2%} of the labels' variance"


def pretrain_loss(model: DUpsampling, images: Tensor, labels: Tensor) -> Tensor:
    """Eq. (4): squared distance of F and the compressed labels, a mean per number."""
    if not isinstance(model.decoder, DUpsamplingDecoder):
        raise UserError("--pretrain: this variant has no compressed labels to regress")
    features, last = model.encoder(images), model.decoder.dupsample
    said = model.decoder.compressed(model.context(features["res5"]), features)
    wanted = compress(labels, last.W.detach(), last.mean, ratio=last.ratio,
                      num_classes=last.num_classes)
    return F.mse_loss(said.float(), wanted)


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: DUpsampling, image: Tensor, *, palette=None):
    """What W knows and what the network says: Fig. 3 from the model's own tensors.

    image (1, 3, H, W), normalised -> matplotlib Figure. Above: the image, the first
    three numbers of F as colours, the labels that W draws of them, those labels
    compressed again (Y~). Below: the first eight columns of W as windows of labels,
    each pixel in the colour of the class that it speaks for most, bright if loudly.
    """
    from matplotlib.figure import Figure
    if not isinstance(model.decoder, DUpsamplingDecoder):
        raise UserError("nothing to explain: this variant has no W")
    last = model.decoder.dupsample
    K, r = last.num_classes, last.ratio
    with torch.no_grad():
        features = model.encoder(image)
        said = model.decoder.compressed(model.context(features["res5"]), features)
        labels = model(image)["out"].argmax(1)
        again = compress(labels, last.W, last.mean, num_classes=K, ratio=r)
    colours = label_colours(palette, K)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    pictures = {"image": viewable(image[0]), "F, first three": viewable(said[0, :3]),
                "labels that W draws": colours[labels[0]],
                "Y~ of these labels": viewable(again[0, :3])}
    for axis, title in zip(above.subplots(1, 4), pictures):
        show(axis, pictures[title], title)
    for i, axis in enumerate(below.subplots(1, 8)):
        loud, who = last.W[:, i].detach().reshape(K, r, r).abs().max(0)
        show(axis, (colours[who] * (loud / loud.max())[..., None]).byte(),
             f"column {i} of W")
    return figure


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through DUpsampling, and what each variant costs."""
    from evaluate import print_costs
    model = build(19, backbone="resnet18").eval()
    image = torch.randn(1, 3, 96, 160)
    features = model.encoder(image)
    said = model.decoder.compressed(model.context(features["res5"]), features)
    more = {"F": said, "W": model.decoder.dupsample.W, "out": model(image)["out"]}
    for name, x in ({"image": image} | features | more).items():
        print(f"{name:<8} {tuple(x.shape)}")
    print_costs("dupsampling", VOC, backbone=R50)


if __name__ == "__main__":
    demo()
