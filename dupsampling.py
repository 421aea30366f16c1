"""DUpsampling: learn from the labels alone how to draw a patch of labels.

Zhi Tian, Tong He, Chunhua Shen, Youliang Yan. "Decoders Matter for Semantic
Segmentation: Data-Dependent Decoding Enables Flexible Feature Aggregation." CVPR 2019.
arXiv:1903.02120

The idea
    A 16x16 window of labels is 16*16*K one-hot numbers, but most windows show one of
    few things: a single class, an edge, a pole. PCA over all windows of the training
    labels finds 64 directions that rebuild nearly every window. Keep them as the last
    layer, a 1x1 convolution W that is not trained: then the network only has to say 64
    numbers per window, and W draws the window from them. Since W brings the resolution
    back, low-level features may be shrunk to the coarse map before they are fused.

Dimension key
    B batch   K classes (the paper's C)   H, W image size
    r ratio: pixels per side of a window, which is also the output stride (16 or 32)
    h, w = ceil(H/r), ceil(W/r): the grid of windows   M windows of a set of labels
    N = K*r*r: one-hot numbers of a window   E numbers it is compressed to (C~; 64)
    D channels of context and decoder (256)   L channels of a reduced feature (48)
    W is the paper's name of the matrix (N, E) of Eq. (2), too. Where a function has
    that matrix, it calls the image's sides height and width. The finer maps, q x r in
    the other modules, have no letters here.

Paper -> code
    | Fig. 2              | DUpsampling.decode           | encoder, context, fusion |
    | Sec. 3.1, S         | windows                      | labels cut into r x r |
    | Sec. 3.1, v         | one_hot_rows                 | a window as one vector |
    | Eq. (2), x = P v    | compress                     | labels to E per window |
    | Eq. (2), v~ = W x   | decompress                   | 1x1 convolution, shuffled |
    | Eq. (3), PCA        | principal_components         | W and the mean of v |
    | Eq. (4)             | pretrain_loss                | regress compressed labels |
    | Eq. (5), F          | DUpsamplingDecoder.forward   | E numbers per window |
    | Eq. (5), DUpsample  | DUpsamplingDecoder.to_pixels | windows drawn and cut |
    | Fig. 3              | DUpsample                    | W x, the layer itself |
    | Eq. (6)             | Temperature                  | logits over a learned T |
    | Eq. (1)             | BilinearDecoder              | the rival of Table 1 |
    | Eq. (7), Fig. 1     | VanillaDecoder               | fusion on the fine map |
    | Eq. (8)             | Fuse                         | fusion on the coarse map |
    | Eq. (8), downsample | downsample                   | bilinear, on the grid |
    | Table 1, mIoU*      | RECIPES                      | "voc:labels" |

Notes: what the paper says, what is done here, and what it changes. The authors have
released no code, so a line on what the official code does is missing everywhere, and
there is no `convert`: no checkpoint exists that it could translate.
    N1  Is W trained?
        Paper: "the upsampling filters in our method are pre-computed" (Sec. 3.1).
               Whether they are fixed while the network is trained is not said.
        Here:  W is fixed. `learn_upsampling` trains it with the rest.
        Effect: Not measured here. One user of an unofficial code (issue 21 of
               LinZhuoChen/DUpsampling) reports that a W that is trained easily
               degenerates into something like nearest-neighbour interpolation, with
               ragged borders.
    N2  The mean of v.
        Paper: "We have omitted the offset term here. In practice prior to the
               compression, v is centered by subtracting its mean" (Sec. 3.1). So the
               offset is missing in the formulas, and not in the method: v~ is W x plus
               the mean. Yet DUpsample(F) is described as W f alone, a 1x1 convolution
               "with convolutional kernels stored in W", and whether that convolution
               has a bias is not said.
        Here:  The mean is subtracted to find W and to compress labels. By default the
               network draws W x without it, as the formulas are printed: this reading
               is ours. `mean` is the other one and adds the mean to every window of
               logits, before they are divided by T.
        Effect: Not measured here. The mean says how often each class stands at each
               pixel of a window: a class prior, numbers between 0 and 1. The same user
               (N1) holds that the last layer needs this offset.
    N3  Ignored pixels.
        Paper: Silent. Sec. 3.1 pads labels whose sides r does not divide, but does not
               say with what.
        Here:  An ignored pixel is zero in all classes of v, and so is the padding. No
               window is left out.
        Effect: W rebuilds such a pixel with small numbers for all classes instead of
               another class. On scores: not measured.
    N4  Order of the numbers in v.
        Paper: A window r x r x C is reshaped "into a vector v", in an order that is not
               given.
        Here:  (class, row, column), because nn.PixelShuffle expects it. PCA, `compress`
               and `decompress` share this order.
        Effect: None on results, since the order only renames the numbers. But W in a
               checkpoint means something in this order alone.
    N5  How the PCA is computed.
        Paper: PCA gives "a closed-form solution" of Eq. (3). Stochastic gradient
               descent is named as another way to it, and a non-linear auto-encoder as
               another upsampling, with an accuracy that is "almost the same" and not
               printed.
        Here:  PCA alone, by randomised subspace iteration over a stream of label maps,
               because the covariance has N x N numbers. At r = 16, N is 2,816 for the
               11 classes of CamVid and 38,400 for the 150 of ADE20K; at r = 32 it is
               four times that.
        Effect: On CamVid's labels at r = 16, W keeps 95.5 % of the variance. What 4
               passes lose is 0.01 % more than what the exact eigenvectors lose
               (measured).
    N6  The convolutions f of Eqs. (7) and (8).
        Paper: "f denotes a CNN". How two features are fused is not said.
        Here:  In `Fuse` a low-level feature is reduced to 48 channels by a 1x1, joined
               with the context, and goes through two separable 3x3 of 256 channels. Two
               features go through two such units, one after the other. The vanilla
               decoder joins both features at once.
        Effect: These layers were chosen because they reproduce the FLOPs of Tables 2 to
               4, all but one (N9). They are a guess that fits. On the
               procedural streets, fusion of stem and res4 scores 0.40 mIoU against
               0.44 without fusion (two seeds each); in the paper it gains 1 point.
               results/README.md looks for the reason.
    N7  Encoder.
        Paper: ResNet and Xception, "both of which are modified as in [5]", that is, as
               in DeepLabv3+. In Table 2, b1u2c3 is the third convolution of the second
               unit of the first block, and b3u6c3 likewise; what conv1_3 is, is not
               said. In the code of [5] it is the third convolution of a deep stem and
               has 128 channels.
        Here:  ResNet and an ASPP of 256 channels with the rates 6, 12, 18 at output
               stride 16 and 3, 6, 9 at 32. `fuse-res2` and `fuse-res4` read the ends of
               these stages. `--backbone resnet50s` has the stem of [5], `resnet50c` one
               with 64 channels; the stem of `resnet50` is one 7x7 convolution, whose
               output takes the place of conv1_3.
        Effect: The tables count the decoder alone, so they cannot confirm the encoder.
               b1u2c3 has as many channels as the end of res2, b3u6c3 as that of res4.
               For conv1_3, 64 channels fit better: the 22.34 of Table 3 is
               22.51 with 64 and 22.91 with 128. On scores: not measured.
    N8  Start of the new layers.
        Paper: "Gaussian distribution of variance 0.01 and mean 0" (Sec. 4).
        Here:  `init="official"` is the same, and the paper's recipes use it. With
               `--backbone labels` the five convolutions of the encoder are new as well,
               and start in the same way. Our own recipes take torch's start,
               `init="torch"`.
        Effect: A convolution that reads n numbers starts 0.1 * sqrt(3 n) times as long
               as with torch's start: about four times for n = 512, the width of
               ResNet-18's res5. In front of a batch norm, a weight k times as long
               gives the same output but is turned by one step of SGD k^2 times less. So
               the paper's start needs a long schedule. On scores: not measured.
    N9  "FLOPS" in Tables 2 to 4.
        Paper: "the amount of computation of the decoder including feature aggregation,
               convolutional decoder and the final upsampling". What counts as one
               operation, and the size of the image, are not said.
        Here:  Two per multiply-add of the decoder, and two more per logit that W
               draws. They may be the division by T, or that and the sum with the mean
               (N2); `evaluate.py cost` books them at the division. The image has
               513x513 pixels, for Cityscapes 1025x2049.
        Effect: With this rule the numbers of 13 of the 14 networks round exactly. The
               last, 22.34 of Table 3, is 22.51, and 22.33 for an image of 512x512.
    N10 Xception.
        Paper: E is 128 on Xception-65 (Sec. 4). Cityscapes (Table 4) has Xception-71,
               without a word on E. So has one row of Table 6.
        Here:  `components` is E. The 25.14 billion FLOPs of Table 4 fit E = 256 on
               Xception-71. `--backbone xception65` is in deeplabv3plus.py. Its res2 is
               the feature that Table 3 calls efb2u1c2 (entry flow, block 2, unit 1,
               convolution 2), so `fuse-res2`. For mfb1u16c3 (middle flow, unit 16)
               `fuse-res4` reads the sum that this unit ends with, not its third
               convolution alone.
        Effect: The decoders' costs are met. Sec. 4.2 has 897.94 billion for the whole
               network: `fuse-res4` with E = 128 takes 897.17 at the six scales of
               DeepLabv3+ and mirrored, which the text does not name (a test adds them
               up). On scores: not measured.
    N11 How T is learned.
        Paper: "T can be learned automatically", from 1.
        Here:  The parameter is log T, so T is positive whatever a step does.
        Effect: The gradient of T itself grows with 1/T^2. On the procedural streets,
               with the learning rate 0.05, T jumped below 0, and the loss stayed at
               ln K. With log T, 0.44 mIoU is reached there, and 0.26 without a
               temperature (two seeds each, no fusion, results/README.md; the paper has
               73.15 and 69.81).
    N12 Training.
        Paper: VOC is the official train set of 1,464 images "since it provides more
               consistent annotations" than SBD (Sec. 4.1), for 30,000 iterations
               with a learning rate of 0.007. Every ResNet has batches of 48 images,
               batch norm over 12 of them, and a decay of 1e-4. Every Xception has 32,
               batch norm over 16, and 4e-5. Cityscapes has Xception-71, 90,000
               iterations and 0.01. Context has no schedule, and no crop is stated.
               Table 5 (VOC test) is trained in three rounds, each from the last one's
               weights: COCO, 500,000 iterations with 0.007; SBD, 30,000 with 0.001;
               VOC's trainval, 30,000 with 0.0001. It is tested at several scales, which
               are not stated, and mirrored. Of Table 6 (Context) it is not said.
        Here:  The recipes are these, and `--dataset voc` is the set of 1,464 images.
               A ResNet on Cityscapes and Context is ours and takes the ResNets' values.
               Batch norm sees what a GPU holds of a batch, not 12 or 16. Table 5's
               rounds are `--dataset coco-voc`, then `voc-aug`, then `voc` with
               `--train-split trainval`; `--finetune-from` the last one chooses the
               recipes "finetuned ..". All weights are taken over, W as well: it stays
               that of COCO's labels.
        Effect: Not measured.
    N13 The network of the upper bound (Table 1, mIoU*).
        Paper: Five convolutions, 3x3 with stride 2, are "fed with ground truth labels
               instead of raw images", and the upsampling "is added on top of that".
               Their widths are not given, and five strides of 2 make an output stride
               of 32, so it is open which of them is 1 for 16. Trained for 100,000
               iterations with a learning rate of 0.07.
        Here:  `--backbone labels`; at output stride 16 the last one has stride 1. The
               context module stands between them and the upsampling, as it does behind
               an image encoder. `aspp=False` leaves it out, as the paper's sentence
               has it. The recipe for `--dataset voc` is the paper's.
        Effect: Not measured for the context module. With it, on CamVid's labels and
               after 1,000 steps, DUpsampling draws 0.81 mIoU at stride 32 and bilinear
               0.68, at stride 16 0.88 and 0.80 (one seed each, results/labels.csv; the
               paper's VOC: 99.90 and 94.80, 99.95 and 98.40).

Run
    python dupsampling.py FILE.png             shapes, and the picture of `explain`
    python train.py --method dupsampling       on procedural streets, minutes
    python train.py --method dupsampling --dataset cityscapes --data-root DIR
    python train.py --method dupsampling:no-fusion --backbone labels    upper bound
"""
from __future__ import annotations

import math
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, LABELS, TEXT, TITLE, WIDTH, UserError, class_legend,
                    conv_bn_relu, describe, farthest_points, fcn_heads, footnote,
                    full_precision, heading, label_colours, make_encoder, mark, one_hot,
                    panel, repeat_border, separable_conv, show_errors,
                    synthetic_scene, upsample, viewable, widened)

# torch says this at every use of the sparse matrices that the PCA is made of.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# --- 1. Config -----------------------------------------------------------------------

STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16}  # what may be fused
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

# What the paper states, and for which backbone  [N12]. A recipe is looked up by data
# and backbone ("voc:labels"), then by data set alone.
PAPER = "paper, Sec. 4"
CARRIED = "ours: the paper's for VOC, Sec. 4"
OPEN = "not stated; DeepLabv3+'s"
SCHEDULE = {"lr": (0.007, PAPER), "iterations": (30_000, PAPER + ", for VOC"),
            "backbone": ("resnet50", PAPER), "weights": ("imagenet", PAPER),
            "batch": (48, PAPER + ", all ResNets; batch norm over 12 of them there"),
            "weight_decay": (1e-4, PAPER + ", all ResNets"),
            "momentum": (0.9, OPEN), "power": (0.9, OPEN), "min_lr": (0.0, OPEN),
            "warmup": (0, OPEN), "scale": ((0.5, 2.0), PAPER),
            "photometric": (False, PAPER + ": scale and flip only"),
            "aux_weight": (0.0, "paper: no auxiliary loss is mentioned"),
            "crop": ((513, 513), "not stated; the FLOPs fit it")}  # [N9]
XCEPTION = {"batch": (32, PAPER + ", all Xceptions; batch norm over 16 of them there"),
            "weight_decay": (4e-5, PAPER + ", all Xceptions")}
XCEPTION_65 = XCEPTION | {"backbone": ("xception65", PAPER)}
XCEPTION_71 = XCEPTION | {"backbone": ("xception71", "paper, Sec. 4.1.3 and Table 6")}
CITYSCAPES = {"lr": (0.01, "paper, Sec. 4.1.3"),
              "iterations": (90_000, "paper, Sec. 4.1.3"), "crop": ((769, 769), OPEN)}
CONTEXT = {"lr": (0.007, CARRIED), "iterations": (30_000, CARRIED)}
ROUNDS = "paper, Sec. 4.2"  # of Table 5, each from the weights of the last
COCO = {"lr": (0.007, ROUNDS), "iterations": (500_000, ROUNDS)}
SBD = {"lr": (0.001, ROUNDS), "iterations": (30_000, ROUNDS)}
TRAINVAL = {"lr": (0.0001, ROUNDS), "iterations": (30_000, ROUNDS)}
ROUNDS_RESNET = {"backbone": ("resnet50", "ours; the paper has Xception-65")}
RECIPES = {
    "voc": SCHEDULE,  # Tables 1 to 3
    "voc:xception65": SCHEDULE | XCEPTION_65,  # Table 3, with components=128  [N10]
    "voc:labels": SCHEDULE | {  # Table 1, mIoU*  [N13]
        "lr": (0.07, "paper, Sec. 4.1.1"), "iterations": (100_000, "paper, Sec. 4.1.1"),
        "backbone": (LABELS, "paper, Sec. 4.1.1"),
        "weights": ("none", "paper, Sec. 4.1.1: a new network")},
    "cityscapes": SCHEDULE | CITYSCAPES | {
        "backbone": ("resnet50", "ours; the paper has Xception-71")},
    "cityscapes:xception71": SCHEDULE | CITYSCAPES | XCEPTION_71,  # Table 4
    "context60": SCHEDULE | CONTEXT | {
        "backbone": ("resnet50", "ours; the paper has Xception-65 and 71")},
    "context60:xception65": SCHEDULE | CONTEXT | XCEPTION_65,  # Table 6
    "context60:xception71": SCHEDULE | CONTEXT | XCEPTION_71,
    "coco-voc": SCHEDULE | COCO | ROUNDS_RESNET,
    "coco-voc:xception65": SCHEDULE | COCO | XCEPTION_65,  # Table 5, three rounds
    "finetuned voc-aug": SCHEDULE | SBD | ROUNDS_RESNET,
    "finetuned voc-aug:xception65": SCHEDULE | SBD | XCEPTION_65,
    "finetuned voc": SCHEDULE | TRAINVAL | ROUNDS_RESNET,
    "finetuned voc:xception65": SCHEDULE | TRAINVAL | XCEPTION_65,
}

# --- 2. Equations --------------------------------------------------------------------


# task: minutes=20 points=6 section='Sec. 3.1'
def windows(labels: Tensor, r: int) -> Tensor:
    """Cut labels (H, W) into r x r windows, (M, r*r); the border is padded with 255."""
    H, W = labels.shape
    h, w = math.ceil(H / r), math.ceil(W / r)
    padded = F.pad(labels, (0, w * r - W, 0, h * r - H), value=255)  # (h*r, w*r)
    # A pixel's row is (row of windows, row inside the window), and so is its column.
    # The swap brings the two numbers that name the window to the front.
    split = padded.reshape(h, r, w, r).permute(0, 2, 1, 3)  # (h, w, r, r)
    return split.reshape(h * w, r * r)


def one_hot_rows(patches: Tensor, num_classes: int) -> Tensor:
    """Windows (M, r*r) to their vectors v, one a row, (M, N), as a sparse matrix.

    Pixel p of class k is the 1 in column k*r*r + p  [N4]. A row has r*r entries, one
    for each pixel, and N - r*r zeros that are not stored. An ignored pixel has an entry
    as well, so that all rows are equally long, but it holds 0  [N3].
    """
    M, points = patches.shape
    classes = patches.long().clamp(max=num_classes - 1)  # (M, points)
    columns = classes * points + torch.arange(points)  # (M, points)
    values = (patches < num_classes).float()  # (M, points)  [N3]
    row_starts = torch.arange(M + 1) * points
    return torch.sparse_csr_tensor(row_starts, columns.flatten(), values.flatten(),
                                   (M, num_classes * points), check_invariants=False)


# task: minutes=60 points=14 needs=dupsampling.windows
def principal_components(label_maps, num_classes: int, *, ratio: int, components: int,
                         passes=4, progress=lambda *_: None):
    """W (N, E) and the mean (N,) of Eq. (3), and the share of variance that is lost.

    `label_maps` has a length and is iterated over `passes` times: (H, W) uint8 each,
    255 ignored. W's columns are the E leading eigenvectors of the covariance C of v,
    which is too large to be written down. But a product with it needs the windows only
    one after the other:

        C Q = sum over windows of v (v^T Q) / M - mean (mean^T Q)

    Multiply random vectors Q by C again and again, make them orthonormal in between,
    and they turn towards the leading eigenvectors (subspace iteration, Halko et al.
    2011, Sec. 4.5)  [N5]. In the end the eigenvectors of the small matrix Q^T C Q
    rotate Q into the leading eigenvectors of C, and the E largest come first. `lost` is
    a float. `vectors`, below, gives the windows chunk by chunk, equal ones with their
    number as weight; after each chunk, progress(pass, passes, label maps read) is
    called. All in float32. The literal reading, an SVD of all windows, is in
    tests/test_dupsampling.py.
    """
    N = num_classes * ratio**2
    if components > N:
        raise UserError(f"components={components}: a window of {ratio}x{ratio} with "
                        f"{num_classes} classes has {N} numbers only")
    # Q has 2*E vectors where E are wanted. A pass shrinks the error of the E-th by the
    # eigenvalue number 2*E+1 over number E. Without the spare vectors that would be
    # number E+1 over number E, which is nearly 1.
    seed = torch.Generator().manual_seed(0)
    product = torch.randn(N, min(2 * components, N), generator=seed)
    for step in range(passes):
        Q = torch.linalg.qr(product).Q  # orthonormal, with the same span
        product = torch.zeros_like(Q)
        total = torch.zeros(N)
        count = 0
        for done, v, weight in vectors(label_maps, num_classes, ratio=ratio):
            columns = v.t().to_sparse_csr()  # v^T, laid out for a product from the left
            product += columns @ (weight[:, None] * (v @ Q))
            total += columns @ weight
            count += int(weight.sum())
            progress(step, passes, done)
        mean = total / count
        product = product / count - torch.outer(mean, mean @ Q)  # C Q
    # `eigh` sorts ascending, hence the flips.
    values, turn = torch.linalg.eigh(Q.T @ product)
    W = Q @ turn.flip(1)[:, :components]
    # All variance is the trace of C. v holds zeros and ones only, so v^2 is v, and the
    # mean of v^2 is the mean.
    variance = (mean.sum() - mean.square().sum()).item()
    lost = 1 - values.flip(0)[:components].sum().item() / variance
    return W, mean, lost


def vectors(label_maps, num_classes: int, *, ratio: int, chunk=4096):
    """Yields (label maps read, v (M, N), weight (M,)), some `chunk` windows at a time.

    Two thirds of CamVid's windows hold a single class, and all windows of one class are
    the same vector. It comes once, and its weight says how many windows it stands for.
    """
    waiting = []
    for done, labels in enumerate(label_maps, start=1):
        waiting.append(windows(labels, ratio))
        if done < len(label_maps) and sum(map(len, waiting)) < chunk:
            continue
        patches = torch.cat(waiting)
        waiting = []
        pure = (patches == patches[:, :1]).all(1)
        mixed = patches[~pure]
        ids, counts = patches[pure, 0].unique(return_counts=True)
        alike = ids[:, None].expand(-1, ratio**2)
        weight = torch.cat([torch.ones(len(mixed)), counts.float()])
        v = one_hot_rows(torch.cat([mixed, alike]), num_classes)
        yield done, v, weight


# task: minutes=30 points=8
def compress(labels: Tensor, W: Tensor, mean: Tensor, *, num_classes: int,
             ratio: int) -> Tensor:
    """Eq. (2): x = P v, labels (B, H, W) -> Y~ (B, E, h, w), with P = W^T.

    An ignored pixel is 0 in v, so it is -mean once v is centred. Eq. (3) asks for the
    best P as well. The columns of W are orthonormal, and then no other P comes closer
    to v than the projection W^T.
    """
    B, height, width = labels.shape
    N, E = W.shape
    h, w = math.ceil(height / ratio), math.ceil(width / ratio)
    padded = F.pad(labels, (0, w * ratio - width, 0, h * ratio - height), value=255)
    pixels = one_hot(padded, num_classes).to(W.dtype)
    v = F.pixel_unshuffle(pixels, ratio)  # (B, N, h, w)  [N4]
    centred = v - mean[:, None, None]  # (B, N, h, w)  [N2]
    x = F.conv2d(centred, W.T[:, :, None, None])  # (B, E, h, w)
    return x


# task: minutes=20 points=6
def decompress(x: Tensor, W: Tensor, *, ratio: int) -> Tensor:
    """Eq. (2): v~ = W x at every location, windows side by side: (B, K, h*r, w*r).

    x (B, E, h, w), W (N, E). The same matrix at every location is a 1x1 convolution;
    the pixel shuffle lays out the N numbers of a location as its r x r window  [N4].
    """
    B, E, h, w = x.shape
    N = len(W)
    v = F.conv2d(x, W[:, :, None, None])  # (B, N, h, w)
    drawn = F.pixel_shuffle(v, ratio)  # (B, K, h*ratio, w*ratio)
    return drawn


# task: minutes=20 points=6
def downsample(x: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Bilinear downsampling by a whole `factor` to `size` = (h, w), for Eq. (8).

    x (B, C, H, W) -> (B, C, h, w). Cell i of the result lies in the middle of the fine
    positions factor*i to factor*i + factor-1. Where the last cell reaches past the map,
    the border is repeated; to squeeze the map into `size` instead would shift what is
    in it. Bilinear means that a cell reads the two middle positions in each direction
    (`factor` is even, or 1) and none of the others.
    """
    rows, columns = x.shape[-2:]
    h, w = size
    x = repeat_border(x, h * factor - rows, w * factor - columns)
    return F.interpolate(x, scale_factor=1 / factor, mode="bilinear",
                         align_corners=False)


# --- 3. Layers -----------------------------------------------------------------------


class Temperature(nn.Module):
    """Eq. (6): softmax(z / T); T is one number, learned from 1.

    W rebuilds ones and zeros, so the logits of a perfect drawing are 1 apart, and their
    softmax is far too even. Without T the network could only answer with a large F. T
    lets one number do it, and the loss no longer stalls (Fig. 5).  [N11]
    """

    def __init__(self):
        super().__init__()
        self.log_T = nn.Parameter(torch.zeros(()))

    # task: minutes=10 points=4 section='Eq. (6)'
    def forward(self, z: Tensor) -> Tensor:
        """Logits z of any shape at the temperature T, whose logarithm is learned."""
        return z / self.log_T.exp()


class DUpsample(nn.Module):
    """Fig. 3: every location's E numbers to its r x r window of logits.

    W is in every checkpoint, but it is not trained unless `learn` says so: the encoder
    learns to write a code that exists, instead of the code and its meaning at once
    [N1]. Until `prepare` has seen the labels W is random, and training warns of it.
    """

    def __init__(self, *, components: int, num_classes: int, ratio: int, learn: bool,
                 mean: bool, temperature: bool):
        super().__init__()
        N = num_classes * ratio**2
        self.num_classes = num_classes
        self.ratio = ratio
        self.use_mean = mean
        W = torch.linalg.qr(torch.randn(N, components)).Q
        self.W = nn.Parameter(W, requires_grad=learn)
        self.register_buffer("mean", torch.zeros(N))  # [N2]
        self.register_buffer("fitted", torch.tensor(False))  # to the labels, by prepare
        self.temperature = Temperature() if temperature else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Division by T, 0.06 when trained on streets, makes an error 17 times as large,
        # and bfloat16 keeps two to three digits of a logit.
        with full_precision(x):
            z = decompress(widened(x), widened(self.W), ratio=self.ratio)
            if self.use_mean:
                window = self.mean.reshape(-1, self.ratio, self.ratio)
                z = z + window.tile(x.shape[-2:])
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
        # Downsampled first, as Eq. (8) has it. The other way round, the 1x1 of `reduce`
        # would visit up to 64 times as many positions at output stride 16.
        low = downsample(low, self.factor, (h, w))
        low = self.reduce(low)  # (B, L, h, w)
        both = torch.cat([last, low], dim=1)  # (B, D+L, h, w)
        return self.f(both)


class DUpsamplingDecoder(nn.Module):
    """Fig. 2: fuse on the coarse map, say E numbers per location, let W draw."""

    def __init__(self, encoder: nn.Module, num_classes: int, *, channels: int,
                 components: int, fuse: tuple[str, ...], output_stride: int, **options):
        super().__init__()
        self.fuse = fuse
        self.fusions = nn.ModuleList(
            Fuse(encoder.channels[stage], channels,
                 factor=output_stride // STRIDES[stage])
            for stage in fuse)
        self.project = nn.Conv2d(channels, components, 1, bias=False)  # D to E
        self.dupsample = DUpsample(components=components, num_classes=num_classes,
                                   ratio=output_stride, **options)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        """F of Eq. (4) and Eq. (5): what is said of each window, (B, E, h, w)."""
        if self.training and not self.dupsample.fitted:
            warnings.warn("W is random: call dupsampling.prepare(model, label_maps)")
        for stage, fusion in zip(self.fuse, self.fusions):  # one after the other  [N6]
            context = fusion(context, features[stage])
        return self.project(context)

    def to_pixels(self, coarse: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """Eq. (5): W draws logits (B, K, H, W) for `size` = (H, W).

        A window does not depend on its neighbours. So for `rows` = (lo, hi), the rows
        lo to hi-1 of the image, W draws the windows that these rows pass through and no
        others. What windows have too much, at the far borders too, is cut off.
        """
        r = self.dupsample.ratio
        lo, hi = rows or (0, size[0])
        first = lo // r  # of the rows of windows
        end = (hi + r - 1) // r  # rounded up, in whole numbers: hi may be a symbol
        drawn = self.dupsample(coarse[:, :, first:end])
        return drawn[..., lo - first * r:hi - first * r, :size[1]]


class VanillaDecoder(nn.Module):
    """Eq. (7), Fig. 1: bring everything to the finest fused map, convolve there.

    The convolutions are those of `Fuse`, on a map of up to 64 times as many positions.
    Without W the resolution of the logits is that of the finest feature, so there is no
    other place for them.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, *, channels: int,
                 fuse: tuple[str, ...], output_stride: int, reduced=48):
        super().__init__()
        self.fuse = fuse
        self.context_stride = output_stride
        self.stride = min(STRIDES[stage] for stage in fuse)
        self.reduce = nn.ModuleList(conv_bn_relu(encoder.channels[stage], reduced, 1)
                                    for stage in fuse)
        self.f = nn.Sequential(
            *separable_conv(channels + reduced * len(fuse), channels),
            *separable_conv(channels, channels))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        finest = min(self.fuse, key=STRIDES.get)
        size = features[finest].shape[-2:]
        maps = [upsample(context, self.context_stride // self.stride, size)]
        for stage, reduce in zip(self.fuse, self.reduce):
            low = reduce(features[stage])
            maps.append(upsample(low, STRIDES[stage] // self.stride, size))
        return self.classify(self.f(torch.cat(maps, dim=1)))

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        return upsample(widened(logits), self.stride, size, rows)


class BilinearDecoder(nn.Module):
    """Eq. (1): classify the coarse map and enlarge its logits by the output stride."""

    def __init__(self, num_classes: int, *, channels: int, output_stride: int):
        super().__init__()
        self.stride = output_stride
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(context)

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        return upsample(widened(logits), self.stride, size, rows)


# --- 4. Model ------------------------------------------------------------------------


class DUpsampling(nn.Module):
    """Fig. 2: encoder, ASPP, and DUpsampling's decoder or one of its rivals.

    How pixels are made of what a decoder says on its coarse grid is the question of the
    paper. So each decoder has its own `to_pixels`.
    """

    def __init__(self, encoder: nn.Module, context: nn.Module, decoder: nn.Module,
                 aux_heads: nn.ModuleList):
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.decoder = decoder
        self.aux_heads = aux_heads

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W) -> {"out": (B, K, H, W), "aux": [(B, K, H/16, W/16)]}."""
        coarse, aux = self.decode(images)
        return {"out": self.to_pixels(coarse, images.shape[-2:]), "aux": aux}

    def decode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) -> F (B, E, h, w) or a rival's logits, auxiliary ones."""
        features = self.encoder(images)
        context = self.context(features["res5"])  # (B, D, h, w)
        coarse = self.decoder(context, features)
        aux = [head(features["res4"]) for head in self.aux_heads if self.training]
        return coarse, aux

    def to_pixels(self, coarse: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """Logits of all H x W pixels, or, for `rows` = (lo, hi), of rows lo to hi-1."""
        return self.decoder.to_pixels(coarse, size, rows)


def build(num_classes: int, *, backbone="resnet50", weights="none",
          decoder="dupsampling", channels=256, components=64, output_stride=16,
          fuse=("stem", "res4"), temperature=True, learn_upsampling=False, mean=False,
          aspp=True, init="official", aux=False) -> DUpsampling:
    """DUpsampling or one of its rivals; VARIANTS names the rows of the paper's tables.

    decoder            'dupsampling', 'vanilla' (Table 3) or 'bilinear' (Table 1)
    channels           width D of ASPP and decoder (256)  [N7]
    components         E, numbers per window (64, Sec. 4)  [N10]
    output_stride      of the encoder, and the ratio r of the upsampling (16 or 32)
    fuse               low-level features, fused in this order (Table 2)
    temperature        learn T (Sec. 4.1.4)
    learn_upsampling   train W too  [N1]
    mean               add the mean window to the logits  [N2]
    aspp               the context module; without it, the decoder reads res5  [N13]
    init               of new layers: 'official' as the paper says, or 'torch'  [N8]
    aux                a classifier on res4 while training; the paper has none
    """
    for name, value, known in (
            ("decoder", decoder, ("dupsampling", "vanilla", "bilinear")),
            ("init", init, ("official", "torch"))):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if not set(fuse) <= set(STRIDES) or (decoder == "vanilla" and not fuse):
        raise UserError(f"fuse={fuse!r}: must name some of {', '.join(STRIDES)}")
    if output_stride not in (16, 32):
        raise UserError(f"output_stride={output_stride}: must be 16 or 32")
    encoder = make_encoder(backbone, num_classes, weights=weights,
                           output_stride=output_stride)
    rates = tuple(rate * 32 // output_stride for rate in (3, 6, 9))  # [N7]
    if aspp:
        context = ASPP(encoder.channels["res5"], channels, projection=1, rates=rates)
    else:
        context = nn.Identity()  # [N13]
        channels = encoder.channels["res5"]
    if decoder == "dupsampling":
        decoder_module = DUpsamplingDecoder(
            encoder, num_classes, channels=channels, components=components, fuse=fuse,
            output_stride=output_stride, learn=learn_upsampling, mean=mean,
            temperature=temperature)
    elif decoder == "vanilla":
        decoder_module = VanillaDecoder(encoder, num_classes, channels=channels,
                                        fuse=fuse, output_stride=output_stride)
    else:
        decoder_module = BilinearDecoder(num_classes, channels=channels,
                                         output_stride=output_stride)
    if init == "official":
        new = [*context.modules(), *decoder_module.modules()]
        if backbone == LABELS:
            new += encoder.modules()
        for layer in new:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.1)  # variance 0.01  [N8]
    return DUpsampling(encoder, context, decoder_module,
                       fcn_heads(encoder, num_classes, aux))


def prepare(model: DUpsampling, label_maps, **options) -> str:
    """Fit W to the training labels, once, before training; a line for the log."""
    if not isinstance(model.decoder, DUpsamplingDecoder):
        return "this variant has no W to fit"
    last = model.decoder.dupsample
    N, E = last.W.shape
    W, mean, lost = principal_components(label_maps, last.num_classes, components=E,
                                         ratio=last.ratio, **options)
    last.load_state_dict({"W": W, "mean": mean, "fitted": torch.tensor(True)},
                         strict=False)  # strict would ask for T as well
    return f"W: {E} of {N} directions keep {1 - lost:.2%} of the labels' variance"


def pretrain_loss(model: DUpsampling, images: Tensor, labels: Tensor) -> Tensor:
    """Eq. (4): squared distance of F and the compressed labels, a mean per number.

    The paper's sum over all numbers would grow with the size of the crops.
    """
    if not isinstance(model.decoder, DUpsamplingDecoder):
        raise UserError("--pretrain: this variant has no compressed labels to regress")
    said, _ = model.decode(images)
    last = model.decoder.dupsample
    wanted = compress(labels, last.W.detach(), last.mean, ratio=last.ratio,
                      num_classes=last.num_classes)
    return F.mse_loss(widened(said), widened(wanted))


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: DUpsampling, image: Tensor, *, palette=None, classes=None):
    """What W knows and what the network says: Fig. 3 from the model's own tensors.

    image (1, 3, H, W), normalised -> matplotlib Figure. Above: three windows in the
    image and in the labels, and how many components rebuild those labels. Middle: the
    three windows rebuilt by ever more columns of W, and what the network says of the
    first. Below: columns of W. `palette` and `classes` have a colour and a name per
    class.
    """
    from matplotlib.figure import Figure
    if not isinstance(model.decoder, DUpsamplingDecoder):
        raise UserError("nothing to explain: this variant has no W")
    last = model.decoder.dupsample
    K = last.num_classes
    r = last.ratio
    W = last.W.detach()
    height, width = image.shape[-2:]
    counts = component_counts(W.shape[1])
    with torch.no_grad():
        said, _ = model.decode(image)
        labels = model.to_pixels(said, (height, width)).argmax(1)
        again = compress(labels, W, last.mean, num_classes=K, ratio=r)
        rebuilt = [rebuild(labels, W[:, :E], last.mean, num_classes=K, ratio=r)[0]
                   for E in counts]
    chosen = windows_that_differ(labels[0], again[0], r, height // r, width // r)
    picture = viewable(image[0])
    colours = label_colours(palette, K)

    overview = 4.5 * height / width + 1.6  # inches: three pictures side by side
    figure = Figure(figsize=(WIDTH, overview + 9), layout="constrained")
    top, above, middle, below, names = figure.subfigures(
        5, 1, height_ratios=(0.4, overview, 4.7, 3.4, 0.5))
    heading(top, f"DUpsampling: say {W.shape[1]} numbers per window of {r}x{r} pixels, "
            "and let a matrix W, learned from labels alone, draw it")
    draw_overview(above, picture, labels[0], rebuilt, counts, chosen, colours, r)
    table, chart = middle.subfigures(1, 2, width_ratios=(2, 1))
    draw_windows(table, labels[0], rebuilt, counts, chosen, colours, r)
    draw_code(chart, said[0], again[0], chosen[0], last.temperature)
    draw_columns(below, W, colours, r)
    class_legend(names, torch.cat([labels, *(x[None] for x in rebuilt)]), colours,
                 classes)
    return figure


def component_counts(E: int) -> list[int]:
    """1, 2, 4, .. and all of E."""
    return sorted({2**i for i in range(E.bit_length())} | {E})


def rebuild(labels: Tensor, W: Tensor, mean: Tensor, *, num_classes: int,
            ratio: int) -> Tensor:
    """Labels (B, H, W) compressed by the columns of W and drawn again, (B, H, W).

    What was taken off before the compression, the mean, is added again.  [N2]
    """
    rows, columns = labels.shape[-2:]
    x = compress(labels, W, mean, num_classes=num_classes, ratio=ratio)
    drawn = decompress(x, W, ratio=ratio)
    drawn = drawn + mean.reshape(-1, ratio, ratio).tile(x.shape[-2:])
    return drawn[..., :rows, :columns].argmax(1)


def window_at(row: int, column: int, r: int) -> tuple[slice, slice]:
    return slice(row * r, row * r + r), slice(column * r, column * r + r)


def windows_that_differ(labels: Tensor, code: Tensor, r: int, h: int,
                        w: int) -> list[tuple[int, int]]:
    """Row and column of three windows, the first with the smallest share of one class.

    The other two are the farthest from those before by their code (E, h, w). Its
    distances are nearly those of the windows, because W's columns are orthonormal.
    Windows of which one class has 90 % are left out, if three others are there.
    """
    patches = windows(labels[:h * r, :w * r], r)  # (h*w, r*r)
    largest = (patches == patches.mode(1, keepdim=True).values).float().mean(1)
    mixed = (largest < 0.9).nonzero()[:, 0]
    if len(mixed) < 3:
        mixed = torch.arange(h * w)
    codes = code[:, :h, :w].flatten(1).T[mixed]
    chosen = farthest_points(codes, 3, int(largest[mixed].argmin()))
    return [divmod(window, w) for window in mixed[chosen].tolist()]


LETTERS = "ABC"


def draw_overview(figure, picture: Tensor, labels: Tensor, rebuilt: list[Tensor],
                  counts: list[int], chosen, colours: Tensor, r: int) -> None:
    """Where the windows lie, what is drawn, and how well E components rebuild that."""
    left, centre, right = figure.subplots(1, 3)
    panel(left, picture, "Image and three of its windows",
          f"The network sees the image at stride {r}: of a window of {r}x{r} pixels it "
          "can only say a list of numbers.", chars=46)
    panel(centre, colours[labels], "Labels that W draws",
          "W turns the numbers of each window into its labels, without looking at the "
          "image or at other windows.", chars=46)
    for axis in (left, centre):
        for letter, (row, column) in zip(LETTERS, chosen):
            mark(axis, row * r, column * r, r, letter)
    right_pixels = [(x == labels).float().mean().item() * 100 for x in rebuilt]
    right.plot(counts, right_pixels, "o-", color="black")
    right.set_xscale("log", base=2)
    right.set_xticks(counts, [str(E) for E in counts])
    right.set_ylim(min(right_pixels) - 3, 103)
    right.grid(color="0.9")
    right.spines[["top", "right"]].set_visible(False)
    describe(right, "Pixels rebuilt right, in %",
             f"These labels are compressed from {len(colours) * r * r:,} to E numbers "
             "per window and drawn again: the sooner the curve is high, the simpler "
             "windows are.",
             unit="components E (columns of W that are used)", chars=46)


def draw_windows(figure, labels: Tensor, rebuilt: list[Tensor], counts: list[int],
                 chosen, colours: Tensor, r: int) -> None:
    """Each window, and what is left of it after compression to 1, 2, 4, .. numbers."""
    axes = figure.subplots(len(chosen), len(counts) + 1, squeeze=False)
    titles = ["drawn", *(f"E = {E}" for E in counts)]
    for row, letter, window in zip(axes, LETTERS, chosen):
        here = window_at(*window, r)
        for axis, x, title in zip(row, (labels, *rebuilt), titles):
            panel(axis, colours[x[here]], title)
        row[0].set_ylabel(letter, fontsize=TITLE, fontweight="bold", rotation=0,
                          labelpad=12, va="center")
        titles = [""] * len(titles)  # above the first row only
    figure.suptitle("Three windows, rebuilt from E numbers each", fontsize=TITLE,
                    fontweight="bold", x=0.01, ha="left")
    footnote(figure, "The window that the network drew is compressed by the first E "
             "columns of W and rebuilt: first the class that fills it, then where the "
             "edge runs, last the small things.", chars=92)


def draw_code(figure, said: Tensor, again: Tensor, window: tuple[int, int],
              temperature: nn.Module) -> None:
    """What the network says of a window beside the code of the labels drawn from it."""
    axis = figure.subplots()
    row, column = window
    index = range(1, len(said) + 1)
    axis.bar(index, said[:, row, column].numpy(), color="0.6", width=1,
             label="F, what the network says")
    axis.plot(index, again[:, row, column].numpy(), "k.", label="code of these labels")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=TEXT, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    T = "" if isinstance(temperature, nn.Identity) else (
        f" The softmax divides W F by the learned T = {temperature.log_T.exp():.2f}.")
    describe(axis, "What is said of window A",
             "From these numbers W draws window A: F need not be the exact code of the "
             f"labels, only the largest logit of a pixel counts.{T}",
             unit="component", chars=46)


def draw_columns(figure, W: Tensor, colours: Tensor, r: int) -> None:
    """Columns of W as windows: what a positive number speaks for, and a negative."""
    shown = min(10, W.shape[1])
    axes = figure.subplots(2, shown, squeeze=False)
    for i in range(shown):
        column = W[:, i].reshape(-1, r, r)
        for axis, sign in zip(axes[:, i], (1, -1)):
            title = f"column {i + 1}" if sign > 0 else ""
            panel(axis, tinted(sign * column, colours), title)
    for axis, sign in zip(axes[:, 0], "+−"):
        axis.set_ylabel(sign, fontsize=TITLE + 3, rotation=0, labelpad=12, va="center")
    footnote(figure, "Columns of W are the directions in which windows of labels vary "
             "most. A positive number for a column speaks for the classes in its upper "
             "picture, a negative one for those in its lower picture; the stronger the "
             "colour, the louder. The first say which class fills a window, the later "
             "ones where its edge runs.", chars=158)


def tinted(window: Tensor, colours: Tensor) -> Tensor:
    """(K, r, r) -> RGB (r, r, 3): the class with the largest number, white if it is 0.

    Full colour is the largest absolute number of the window.
    """
    size, winner = window.max(0)
    strength = (size / window.abs().max().clamp(min=1e-6)).clamp(min=0)[..., None]
    return 1 - strength * (1 - colours[winner] / 255)


# --- 6. Demo -------------------------------------------------------------------------


def one_edge(num_classes: int, height: int, width: int) -> Tensor:
    """Labels (H, W) of two classes, with a straight edge at a random place."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    a, b, c = torch.randn(3)
    one, other = torch.randint(num_classes, (2,), dtype=torch.uint8)
    return torch.where(a * x + b * y > c, one, other)


def demo(file: str = "") -> None:
    """The way of one small image through DUpsampling; its picture, if a file is named.

    The network is not trained. W is fitted to label maps with one straight edge each.
    """
    model = build(19, backbone="resnet18", **FROM_SCRATCH).eval()
    print(prepare(model, [one_edge(19, 96, 160) for _ in range(20)]))
    image = synthetic_scene(96, 160)
    with torch.no_grad():
        features = model.encoder(image)
        said, _ = model.decode(image)
        logits = model.to_pixels(said, image.shape[-2:])
    steps = {"F": said, "W": model.decoder.dupsample.W, "out": logits}
    for name, x in ({"image": image} | features | steps).items():
        print(f"{name:<8} {tuple(x.shape)}")
    if file:
        explain(model, image).savefig(file, dpi=100)
        print(f"picture of the untrained network: {file}")
    print("costs: python evaluate.py cost dupsampling")


if __name__ == "__main__":
    with show_errors():
        demo(*sys.argv[1:2])
