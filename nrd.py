"""NRD: every stride-32 location writes a tiny network that draws its own 32x32 patch.

Bowen Zhang, Yifan Liu, Zhi Tian, Chunhua Shen. "Dynamic Neural Representational
Decoders for High-Resolution Semantic Segmentation." NeurIPS 2021. arXiv:2107.14428

The idea
    A label map is redundant: most 32x32 patches of it are one or two smooth regions.
    So do not predict the patch pixel by pixel. Predict, from the feature vector of the
    location, the 899 weights theta of a three-layer network g_theta, and let g_theta
    draw the patch: it is asked at 8x8 points (x, y), and is shown a guidance map m of
    the low-level image structure at that point. A final x4 bilinear step gives pixels.

Dimension key
    B batch   K classes (the paper's C)   D channels of the encoder's output
    H, W image size   h, w = ceil(H/32), ceil(W/32): the grid of cells   N = B*h*w cells
    s points per side of a cell (8)   I inputs of g (2 coordinates + Cm guidance)
    P parameters of one g_theta (899)   R, M hidden and guidance channels (Cr, Cm; 16)

Paper -> code
    | Sec. 2.1      | NRD.forward           | encoder, context, decoder, x4 |
    | Fig. 3 (a)    | NRDDecoder.forward    | controller, inputs, g |
    | Fig. 3 (b)    | represent             | g_theta of all cells at once |
    | Sec. 2.2, Q   | coordinate_map        | [0 : 1/s : 1] x [0 : 1/s : 1] |
    | Sec. 2.2, 899 | theta_length          | weights and biases of g |
    | Sec. 2.2, m   | GuidanceMap           | two convolutions on the 1/4 features |
    | "Controller"  | Controller            | 3x3 with 512 channels, then 1x1 to P |
    | Table 1       | BilinearDecoder       | the rival without low-level features |
    | Table 3       | DUCDecoder            | dense upsampling convolution |
    | Table 3       | CARAFEDecoder         | content-aware reassembly of features |

Notes (paper says / official code does / we do / effect)
    N1  Inputs of g: raw coordinates and guidance / batch norm with affine over their
        concatenation, none on coordinates alone / as the code, and coordinates are
        standardised once, which changes nothing before a batch norm / without guidance
        g's kinks start inside the patch; on streets within the noise of a seed.
    N2  Initialisation of the controller's last layer: silent / xavier divided by P,
        bias 0: all three layers of g start near zero / theirs with the paper's recipes;
        FROM_SCRATCH has init="mlp": an ordinary MLP as bias, weights of std 0.3
        (tried: 0.1, slower), features divided by sqrt(512), else a step of SGD moves
        theta hundreds of times as far as its gradient says and kills g's ReLUs (all 16
        of layer 2 in 75 steps on CamVid) / streets, seed 0: 0.556, official 0.298.
    N3  Range of Q: "from 0 to 1 with step 1/s", s values / {0, 1/8, .., 7/8}, not
        centred, order (x, y) / as the code / none: the batch norm of N1 absorbs it.
    N4  Order of theta: silent / w0 b0 w1 b1 w2 b2, weights as [out][in] / as the code /
        none, but checkpoints depend on it.
    N5  Cost without guidance, 2.6 / 216.8 GMACs (and Table 3's 203.2): the text's g and
        controller (643, 512) cost 5.6 / 219.3. / The first author's development branch
        has 8 hidden and 256 controller channels, which give the printed numbers /
        `no-guidance` is the text, `no-guidance-published` the numbers / unknown.
    N6  Bilinear row: 1x1, then upsampling / the printed 1.3 GMACs need the 1x1 at 1/4 /
        as the number says / none: a 1x1 and a bilinear resize commute.
    N7  ASPP: "optional modules such as ASPP" / rates 3, 6, 9, separable, 512 channels,
        projection 3x3 / as the code / the 3x3 costs 24 GMACs of the encoder's 214.
    N8  Auxiliary FCN head on res4, weight 0.4, no dropout in the main head: "default
        settings" of mmsegmentation / as the code / part of Params, not of GFLOPs.
    N9  Image sizes: silent / multiples of 32 only, else guidance and cells disagree /
        we repeat the guidance map's last row and column up to the grid of cells and
        cut the result / at multiples of 32 none.
    N10 DUC, CARAFE: no dimensions / - / those that cost what Table 3 says / its Params
        of DUC include an unused 9.4 M; CARAFE's reassembly, 1.7 GMACs, it did not see.

Run
    python nrd.py                              shapes and costs, seconds on a CPU
    python train.py                            NRD on procedural streets, minutes
    python train.py --method nrd --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, UserError, conv_bn_relu, fcn_heads, full_precision,
                    label_colours, make_encoder, published, repeat_border, show,
                    upsample, viewable)
from deeplabv3plus import DeepLabv3PlusDecoder

# --- 1. Config -----------------------------------------------------------------------

VARIANTS = {
    "default": {},
    # Table 1: four decoders on one encoder
    "deeplabv3plus": {"decoder": "deeplabv3plus"},
    "bilinear": {"decoder": "bilinear"},
    "no-guidance": {"guidance": False},
    "no-guidance-published": {"guidance": False, "hidden_channels": 8,
                              "controller_channels": 256},  # [N5]
    # Table 2: Cr and Cm
    "cr8": {"hidden_channels": 8}, "cr32": {"hidden_channels": 32},
    "cm8": {"guidance_channels": 8}, "cm32": {"guidance_channels": 32},
    # Table 3: up-sampling methods straight on res5, no ASPP
    "no-aspp": {"context": "conv", "guidance": False, "hidden_channels": 8,
                "controller_channels": 256},  # [N5]
    "duc": {"decoder": "duc", "context": "none"},
    "carafe": {"decoder": "carafe", "context": "conv"},
    # Table 4: inputs of g. Its first row is `no-guidance`, its last `default`
    "guidance-only": {"coordinates": False},
}

FROM_SCRATCH = {"init": "mlp"}  # options of `build` in train.py's own recipes  [N2]
PAPER = "paper, Sec. 3"
MMSEG = "mmsegmentation's default, which Sec. 3 inherits"
SCHEDULE = {"lr": (0.01, PAPER), "weight_decay": (5e-4, PAPER),
            "backbone": ("resnet50", PAPER), "weights": ("imagenet", PAPER),
            "batch": (16, MMSEG), "momentum": (0.9, MMSEG), "power": (0.9, MMSEG),
            "min_lr": (1e-4, "official code"), "warmup": (4000, "Table 3"),
            "scale": ((0.5, 2.0), MMSEG), "aux_weight": (0.4, MMSEG)}
RECIPES = {
    "cityscapes": SCHEDULE | {
        "crop": ((512, 1024), PAPER), "iterations": (84_000, "Table 1; 80k in Sec. 3")},
    "ade20k": SCHEDULE | {
        "crop": ((512, 512), PAPER), "iterations": (164_000, "official code")},
    "context60": SCHEDULE | {
        "lr": (0.004, PAPER), "weight_decay": (1e-4, PAPER),
        "crop": ((480, 480), PAPER), "iterations": (84_000, "official code")},
}

CITY, R50, R101, X101 = (1024, 2048), "resnet50c", "resnet101c", "resnext101_64x4d"
row = partial(published, rule="mmcv-sync")  # see RULES in evaluate.py
PUBLISHED = [
    row("1", "deeplabv3plus", R50, CITY, 19, 290.6, decoder=76.4, miou=78.9,
        trimap=49.8),
    row("1", "default", R50, CITY, 19, 234.6, decoder=20.4, miou=79.8, trimap=51.6),
    row("1", "bilinear", R50, CITY, 19, 215.5, decoder=1.3, miou=74.7, trimap=41.2),
    row("1", "no-guidance-published", R50, CITY, 19, 216.8, decoder=2.6, miou=78.2,
        trimap=46.6),
    row("1", "no-guidance", R50, CITY, 19, 216.8, decoder=2.6, miou=78.2, trimap=46.6,
        why="N5: the text's g is larger than the one counted"),
    row("2", "cr8", R50, CITY, 19, None, miou=79.4),
    row("2", "cr32", R50, CITY, 19, None, miou=79.6),
    row("2", "cm8", R50, CITY, 19, None, miou=79.5),
    row("2", "cm32", R50, CITY, 19, None, miou=79.0),
    row("3", "carafe", R50, CITY, 19, 203.0, params=36.3, miou=72.1),
    row("3", "duc", R50, CITY, 19, 336.1, params=110.8, unused=9.448, miou=74.7),
    row("3", "no-aspp", R50, CITY, 19, 203.2, params=36.6, miou=75.0),
    row("4", "guidance-only", R50, CITY, 19, None, miou=78.3, trimap=50.5),
    row("5", "default", R101, (512, 512), 150, 49.0, miou=44.01, miou_ms=45.62),
    row("5", "default", X101, (512, 512), 150, 87.9, miou=44.34, miou_ms=46.09),
    row("6", "default", R101, (480, 480), 60, 42.9, miou_ms=49.0),
    row("7", "default", R50, CITY, 19, 234.6, miou=78.9, miou_ms=80.0),
    row("7", "default", R101, CITY, 19, 390.0, miou=79.3, miou_ms=80.5),
]

# --- 2. Equations --------------------------------------------------------------------


def coordinate_map(s: int) -> Tensor:
    """Q of Sec. 2.2: x and y of the s x s points of a cell, (2, s, s).  [N3]"""
    steps = torch.arange(s) / s  # 0, 1/s, .., (s-1)/s
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y])


def standardise(q: Tensor) -> Tensor:
    """Zero mean and unit variance over the points of a cell; a single point stays."""
    return (q - q.mean()) / q.std(correction=0).clamp(min=1e-6)


def theta_length(widths: tuple[int, ...]) -> int:
    """P: weights and biases of a chain of 1x1 convolutions with these widths.

    Sec. 2.2: (18, 16, 16, 19) -> 899, and without guidance (2, 16, 16, 19) -> 643.
    """
    return sum(i * o + o for i, o in zip(widths, widths[1:]))


def split_theta(theta: Tensor, widths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """theta (N, P) -> per layer a weight (N, out, in), a bias (N, out, 1).  [N4]"""
    layers = []
    for i, o in zip(widths, widths[1:]):
        weight, bias, theta = theta.split([i * o, o, theta.shape[1] - i * o - o], dim=1)
        layers.append((weight.unflatten(1, (o, i)), bias.unsqueeze(2)))
    return layers


def to_cells(x: Tensor, s: int) -> Tensor:
    """Cut a map into its cells: (B, I, s*h, s*w) -> (N, I, s*s)."""
    B, I, H, W = x.shape
    h, w = H // s, W // s
    x = x.reshape(B, I, h, s, w, s)  # (B, I, h, s, w, s)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, I, s, s)
    return x.reshape(B * h * w, I, s * s)


def from_cells(x: Tensor, batch: int, h: int, w: int) -> Tensor:
    """Put cells back side by side, the inverse of to_cells: -> (B, K, s*h, s*w)."""
    N, K, points = x.shape
    s = int(points**0.5)
    x = x.reshape(batch, h, w, K, s, s)  # (batch, h, w, K, s, s)
    x = x.permute(0, 3, 1, 4, 2, 5)  # (batch, K, h, s, w, s)
    return x.reshape(batch, K, h * s, w * s)


def represent(theta: Tensor, inputs: Tensor, *, widths: tuple[int, ...]) -> Tensor:
    """g_theta of every cell on that cell's own points, Fig. 3 (b).

    theta (B, P, h, w), inputs (B, I, s*h, s*w) -> logits (B, K, s*h, s*w).

    All N = B*h*w small networks run in one batched product per layer: cell n
    multiplies its own weight matrix with its own s*s points. The literal reading, a
    loop over cells and pixels, is `represent_slowly` in tests/test_nrd.py. The
    official code instead enlarges theta to 1/4 resolution, s*s times the memory.
    """
    B, P, h, w = theta.shape
    s = inputs.shape[-1] // w
    theta = theta.permute(0, 2, 3, 1).reshape(B * h * w, P)  # (B*h*w, P)
    x = to_cells(inputs, s)  # (B*h*w, I, s*s)
    layers = split_theta(theta, widths)
    for depth, (weight, bias) in enumerate(layers):
        # (N, out, in) x (N, in, s*s) -> (N, out, s*s)
        x = torch.baddbmm(bias, weight, x)
        if depth < len(layers) - 1:
            x = x.relu()
    return from_cells(x, B, h, w)


# --- 3. Layers -----------------------------------------------------------------------


class Controller(nn.Module):
    """Writes theta: 3x3 convolution with 512 channels, then 1x1 to P (Sec. 2.2).

    D channels at every cell -> the P parameters of that cell's network.
    """

    def __init__(self, in_channels: int, channels: int, widths: tuple[int, ...], *,
                 init: str):
        super().__init__()
        if init not in ("mlp", "official"):
            raise UserError(f"init={init!r}: must be 'mlp' or 'official'")
        self.features = conv_bn_relu(in_channels, channels)
        self.theta = nn.Conv2d(channels, theta_length(widths), 1)
        # The bias decides whether g can pass a gradient on at first, the scale how far
        # a step of SGD moves theta: |scale * features|^2 times its gradient.  [N2]
        self.scale = channels**-0.5 if init == "mlp" else 1.0
        with torch.no_grad():
            if init == "mlp":
                self.theta.weight.normal_(std=0.3)
                self.theta.bias.copy_(ordinary_mlp(widths))
            else:
                nn.init.xavier_normal_(self.theta.weight).div_(theta_length(widths))
                self.theta.bias.zero_()

    def forward(self, context: Tensor) -> Tensor:
        return self.theta(self.scale * self.features(context))


def ordinary_mlp(widths: tuple[int, ...]) -> Tensor:
    """theta (P,) of a chain of nn.Linear layers as torch initialises them.  [N2]"""
    chain = [nn.Linear(i, o) for i, o in zip(widths, widths[1:])]
    return torch.cat([p.flatten() for l in chain for p in (l.weight, l.bias)])


class GuidanceMap(nn.Module):
    """m of Sec. 2.2: two convolutions that reduce the 1/4 features to Cm channels.

    The hidden width 48 is DeepLabv3+'s; the output has neither norm nor ReLU, since
    the batch norm over all inputs of g follows  [N1].
    """

    def __init__(self, in_channels: int, guidance_channels: int, *, hidden=48):
        super().__init__()
        self.layers = nn.Sequential(*conv_bn_relu(in_channels, hidden),
                                    nn.Conv2d(hidden, guidance_channels, 1))

    def forward(self, res2: Tensor) -> Tensor:
        return self.layers(res2)


class NRDDecoder(nn.Module):
    """Fig. 3 (a): context and low-level features to logits at 1/4 resolution."""

    def __init__(self, in_channels: int, low_channels: int, num_classes: int, *,
                 controller_channels: int, hidden_channels: int, guidance_channels: int,
                 guidance: bool, coordinates: bool, patch: int, init: str):
        super().__init__()
        if not (guidance or coordinates):
            raise UserError("guidance=False coordinates=False: g needs an input")
        if patch not in (1, 2, 4, 8, 16, 32):
            raise UserError(f"patch={patch}: must divide 32, a cell's side in pixels")
        inputs = 2 * coordinates + guidance_channels * guidance
        self.patch, self.stride = patch, 32 // patch
        self.widths = (inputs, hidden_channels, hidden_channels, num_classes)
        self.controller = Controller(in_channels, controller_channels, self.widths,
                                     init=init)
        self.guidance = None
        if guidance:
            self.guidance = GuidanceMap(low_channels, guidance_channels)
        # Same values in every cell, so they are no parameter and in no checkpoint.
        q = standardise(coordinate_map(patch)) if coordinates else None  # [N1]
        self.register_buffer("coordinates", q, persistent=False)
        self.norm = nn.BatchNorm2d(inputs) if guidance else nn.Identity()  # [N1]

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        theta = self.controller(context)  # (B, P, h, w)
        inputs = self.inputs(features.get("res2"), theta)
        # Three chained products of predicted numbers: float32 even under autocast.
        with full_precision(theta):
            return represent(theta.float(), inputs.float(), widths=self.widths)

    def inputs(self, res2: Tensor, theta: Tensor) -> Tensor:
        """Normalised inputs of g on the grid of all cells' points, (B, I, s*h, s*w)."""
        B, P, h, w = theta.shape
        s, maps = self.patch, []
        if self.coordinates is not None:
            maps.append(self.coordinates.repeat(B, 1, h, w))
        if self.guidance is not None:
            maps.append(self.fit(self.guidance(res2), h, w))
        x = torch.cat(maps, dim=1)  # (B, I, s*h, s*w)
        return self.norm(x)

    def fit(self, m: Tensor, h: int, w: int) -> Tensor:
        """Line the 1/4 guidance map up with the cells: (B, M, s*h, s*w).  [N9]

        A cell is 8 x 8 positions of the 1/4 map, whatever the image size, so position
        (0, 0) stays where it is and only the far border grows. Resizing the map to
        (8h, 8w) instead would slide it against the cells by up to 7 positions.
        """
        B, M, rows, columns = m.shape
        m = repeat_border(m, 8 * h - rows, 8 * w - columns)
        if self.patch != 8:
            m = F.interpolate(m, scale_factor=self.patch / 8, mode="bilinear")
        return m


# The rivals of Tables 1 and 3: same arguments, same result, their own way up.


class BilinearDecoder(nn.Module):
    """Table 1: no learned decoder, the classifier on enlarged features.  [N6]"""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.classify, self.stride = nn.Conv2d(in_channels, num_classes, 1), 4

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(upsample(context, 8, (None, None)))


class DUCDecoder(nn.Module):
    """Table 3: dense upsampling convolution, 64 values per location to an 8x8 patch.

    Like NRD it lets a location draw its patch, but point by point from a linear map
    of its own: 4096 channels where NRD needs 899.  [N10]
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels=64, patch=8):
        super().__init__()
        self.expand = conv_bn_relu(in_channels, channels * patch * patch)
        self.shuffle, self.stride = nn.PixelShuffle(patch), 32 // patch
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(self.shuffle(self.expand(context)))


class CARAFEDecoder(nn.Module):
    """Table 3: content-aware reassembly (Wang et al., ICCV 2019), x8 at once.  [N10]

    Every output point is a weighted mean of the 5x5 features around its source, with
    weights predicted from the content: smooth like bilinear, but it can follow edges.
    """

    def __init__(self, in_channels: int, num_classes: int, *, factor=8, kernel=5,
                 compressed=64):
        super().__init__()
        self.factor, self.kernel, self.stride = factor, kernel, 32 // factor
        self.compress = nn.Conv2d(in_channels, compressed, 1)
        self.predict = nn.Conv2d(compressed, kernel**2 * factor**2, 3, padding=1)
        self.classify = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        B, D, h, w = context.shape
        k, f = self.kernel**2, self.factor
        weights = self.predict(self.compress(context))  # (B, k*f*f, h, w)
        weights = weights.reshape(B, k, f * f, h * w)  # (B, k, f*f, h*w)
        weights = weights.softmax(dim=1).permute(0, 3, 1, 2)  # (B, h*w, k, f*f)
        x = F.unfold(context, self.kernel, padding=self.kernel // 2)  # (B, D*k, h*w)
        around = x.reshape(B, D, k, h * w).permute(0, 3, 1, 2)  # (B, h*w, D, k)
        # (B, h*w, D, k) x (B, h*w, k, f*f) -> (B, h*w, D, f*f)
        x = around @ weights  # (B, h*w, D, f*f)
        return self.classify(from_cells(x.flatten(0, 1), B, h, w))


# --- 4. Model ------------------------------------------------------------------------


class NRD(nn.Module):
    """Encoder without dilation, ASPP, and one of the decoders (Sec. 2.1)."""

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


def build(num_classes: int, *, backbone="resnet50", weights="none", decoder="nrd",
          context="aspp", channels=512, controller_channels=512, hidden_channels=16,
          guidance_channels=16, guidance=True, coordinates=True, patch=8,
          init="official", aux=True) -> NRD:
    """NRD or one of its rivals; VARIANTS names the rows of the paper's tables.

    channels             width D of the context features (512, mmsegmentation)
    controller_channels  width of the controller's 3x3 (512, Sec. 2.2)
    hidden_channels      Cr, width of g (16, Table 2)
    guidance_channels    Cm, width of the guidance map (16, Table 2)
    guidance, coordinates  which inputs g gets (Table 4)
    patch                s, points per side of a cell (8, Sec. 2.2)
    init                 'official', or 'mlp' for short runs and from scratch  [N2]
    """
    encoder = make_encoder(backbone, num_classes, weights=weights)
    res5 = encoder.channels["res5"]
    contexts = {"aspp": lambda: ASPP(res5, channels, rates=(3, 6, 9)),  # [N7]
                "conv": lambda: conv_bn_relu(res5, channels),
                "none": nn.Identity}
    width = res5 if context == "none" else channels
    decoders = {
        "nrd": lambda: NRDDecoder(
            width, encoder.channels["res2"] if guidance else 0, num_classes, init=init,
            controller_channels=controller_channels, hidden_channels=hidden_channels,
            guidance_channels=guidance_channels, guidance=guidance, patch=patch,
            coordinates=coordinates),
        "deeplabv3plus": lambda: DeepLabv3PlusDecoder(
            width, encoder.channels["res2"], num_classes, channels=channels),
        "bilinear": lambda: BilinearDecoder(width, num_classes),
        "duc": lambda: DUCDecoder(width, num_classes),
        "carafe": lambda: CARAFEDecoder(width, num_classes),
    }
    for name, value, known in (("decoder", decoder, decoders),
                               ("context", context, contexts)):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    heads = fcn_heads(encoder, num_classes, aux)  # [N8]
    return NRD(encoder, contexts[context](), decoders[decoder](), heads)


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: NRD, image: Tensor, *, palette=None):
    """Fig. 1 from the model's own tensors: three cells, each drawing its patch.

    image (1, 3, H, W), normalised -> matplotlib Figure. A row shows a cell's 32x32
    pixels, what g is told (x, y, three guidance channels as colour), what g says at its
    s x s points, and that after x4. The cells with most classes are taken.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    decoder = model.decoder
    if not isinstance(decoder, NRDDecoder):
        raise UserError("nothing to explain: this variant has no g")
    with torch.no_grad():
        features = model.encoder(image)
        context = model.context(features["res5"])
        logits = decoder(context, features)
        inputs = decoder.inputs(features["res2"], decoder.controller(context))[0]
        final = upsample(logits, decoder.stride, image.shape[-2:]).argmax(1)[0]
    points, picture = logits.argmax(1)[0], viewable(image[0])
    colours, s = label_colours(palette, logits.shape[1]), decoder.patch
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    whole = left.subplots(2, 1)
    show(whole[0], picture, "image and three of its cells")
    show(whole[1], colours[final], "prediction")
    for row, (r, c) in zip(right.subplots(3, 6), busiest_cells(points, s)):
        for axis in whole:
            axis.add_patch(Rectangle((c * 32 - 0.5, r * 32 - 0.5), 32, 32, fill=False,
                                     edgecolor="white", linewidth=1.5))
        told = inputs[:, r * s:r * s + s, c * s:c * s + s]
        pixels = slice(r * 32, r * 32 + 32), slice(c * 32, c * 32 + 32)
        tiles = [("pixels", picture[pixels])]
        if decoder.coordinates is not None:
            tiles += [("x", told[0]), ("y", told[1])]
        if decoder.guidance is not None:
            tiles.append(("guidance m", viewable(told[-3:])))
        said = points[r * s:r * s + s, c * s:c * s + s]
        tiles += [(f"g at {s}x{s} points", colours[said]),
                  (f"after x{decoder.stride}", colours[final[pixels]])]
        for axis in row[len(tiles):]:
            axis.axis("off")
        for axis, (title, tile) in zip(row, tiles):
            show(axis, tile, title)
    return figure


def busiest_cells(points: Tensor, s: int) -> list[tuple[int, int]]:
    """Row and column of the three cells with most classes among their points (H, W)."""
    H, W = points.shape
    cells = {(r, c): len(points[r * s:r * s + s, c * s:c * s + s].unique())
             for r in range(H // s) for c in range(W // s)}
    return sorted(sorted(cells, key=cells.get)[-3:])


# --- 6. Demo -------------------------------------------------------------------------


def demo() -> None:
    """The way of one small image through NRD, and what each row of the tables costs."""
    from evaluate import print_costs
    model = build(19, backbone="resnet18").eval()
    image = torch.randn(1, 3, 96, 160)
    features = model.encoder(image)
    context = model.context(features["res5"])
    theta = model.decoder.controller(context)
    inputs = model.decoder.inputs(features["res2"], theta)
    logits = represent(theta, inputs, widths=model.decoder.widths)
    for name, x in {"image": image, **features, "context": context, "theta": theta,
                    "inputs": inputs, "logits": logits,
                    "out": model(image)["out"]}.items():
        print(f"{name:<8} {tuple(x.shape)}")
    for weight, bias in split_theta(theta.flatten(2)[0].T, model.decoder.widths):
        print(f"layer of g: weights {tuple(weight.shape)}, biases {tuple(bias.shape)}")
    print_costs("nrd", CITY, backbone=R50)


if __name__ == "__main__":
    demo()
