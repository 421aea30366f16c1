"""NRD: every stride-32 location writes a tiny network that draws its own 32x32 patch.

Bowen Zhang, Yifan Liu, Zhi Tian, Chunhua Shen. "Dynamic Neural Representational
Decoders for High-Resolution Semantic Segmentation." NeurIPS 2021. arXiv:2107.14428

The idea
    A label map is redundant: most 32x32 patches of it are one or two smooth regions.
    So do not predict the patch pixel by pixel. From the feature vector of a location,
    predict theta, the weights and biases of a network g_theta of three 1x1 layers, and
    let g_theta draw the patch of that location. It is asked at 8x8 points of the patch.
    At each it is told the coordinates (x, y) and what a guidance map m knows of the
    edges there. It answers with the logits of the classes. A final bilinear step of x4
    turns the 8x8 points into 32x32 pixels.

Dimension key
    B batch   K classes (the paper's C)   H, W image size
    h, w = ceil(H/32), ceil(W/32): the grid of cells. A cell is the 32x32 pixels that
      one location of res5 draws.   N = B*h*w cells in the whole batch
    q, r = ceil(H/4), ceil(W/4): the finer grid, of the 1/4 features and of m
    s points per side of a cell (8), so g is asked on a grid of s*h x s*w
    D width of the context, which is what the controller reads (512; res5 itself has
      2048). The paper's "encoder" is encoder and context here, ResNet and ASPP.
    M channels of the guidance map (the paper's Cm; 16)
    I inputs of g (18: 2 coordinates and M guidance channels)
    P parameters of one g_theta. With 16 hidden channels (the paper's Cr), 19 classes
      need (18*16 + 16) + (16*16 + 16) + (16*19 + 19) = 899, ADE20K's 150 need 3,126.
    k neighbours of a point (25) and f the factor of enlargement (8), in CARAFE only

Paper -> code
    | Sec. 2.1      | NRD.decode          | encoder, context, decoder |
    | Sec. 2.2, x4  | NRD.to_pixels       | from the points to the pixels |
    | Fig. 3 (a)    | NRDDecoder.forward  | controller, inputs of g, g |
    | Fig. 3 (b)    | represent           | g_theta of all cells at once |
    | Sec. 2.2, Q   | coordinate_map      | [0 : 1/s : 1] x [0 : 1/s : 1] |
    | Sec. 2.2, 899 | theta_length        | weights and biases of g |
    | Sec. 2.2, m   | GuidanceMap         | two convolutions on the 1/4 features |
    | "Controller"  | Controller          | 3x3 with 512 channels, then 1x1 to P |
    | Table 1       | BilinearDecoder     | the rival without low-level features |
    | Table 3       | DUCDecoder          | dense upsampling convolution |
    | Table 3       | CARAFEDecoder       | content-aware reassembly of features |
    | Fig. 1        | explain             | patches, what g is told, what it says |

Notes: what the paper says, what the official code does, what is done here, and what
it changes. "Code" is the authors' release (NRD_decoder on GitHub), which builds on
mmsegmentation. GMACs are those of 1024x2048 pixels, ResNet-50 and 19 classes.
    N1  Normalisation of the inputs of g.
        Paper: Names none. g takes the raw coordinates and the guidance map.
        Code:  A batch norm with weight and bias works on the concatenation of
               coordinates and guidance. Coordinates alone (no guidance) stay raw.
        Here:  The same. Only where the batch norm follows, the coordinates are brought
               to mean 0 and variance 1 before it, once and for all.
               `standardise=True` does so without guidance, too.
        Effect: Before a batch norm it changes nothing but the share of its eps: 5.6e-5
               of x and y (computed). The running statistics are other numbers, however,
               so those of channels 0 and 1 of a released checkpoint must be converted;
               `convert` does, and takes out the 5.6e-5 as well (equal to 1e-10 then, in
               training and in eval, see tests/test_nrd.py).
               Without guidance `standardise` changes g. Raw coordinates put the lines
               at which the ReLUs of g's first layer switch, w . (x, y) = -b, close to
               the corner (0, 0) of the patch as long as b is small; standardised ones
               put them close to its centre. On streets (`no-guidance`, from scratch,
               450 steps, seeds 0 and 1) raw ones give an mIoU of 0.3800 and 0.3809,
               standardised ones 0.3927 and 0.3912.
    N2  Initialisation of the controller's last layer, the one that writes theta.
        Paper: Silent.
        Code:  Xavier weights divided by P, and bias 0. All three layers of g then start
               near zero, and at first only the last biases learn: the gradient of the
               first weights has two factors near zero. With ImageNet weights and
               84,000 steps g still learns.
        Here:  `init="official"` is the code's and the default, so that the paper's
               recipes use it. `init="mlp"` is ours, for short runs and from scratch
               (FROM_SCRATCH). Its bias is an ordinarily initialised MLP, its weights
               have a standard deviation of 0.3 (0.1 was tried and was slower), and the
               features are divided by sqrt(512). Without this division one step of SGD
               moves theta hundreds of times as far as the gradient of theta says, which
               kills ReLUs of g: on CamVid all 16 of the second layer in 75 steps.
        Effect: mIoU 0.556 with "mlp" and 0.403 with "official" (streets, ResNet-18 from
               scratch, 450 steps, seed 0). With the official last layer alone and all
               others as torch starts them it was 0.298: see N11.
    N3  Range of the coordinate map Q.
        Paper: "[0 : 1/s : 1] is the range from 0 to 1 with step 1/s", s values a side.
        Code:  0, 1/8, .., 7/8, which leaves out 1 and is not centred in the patch. The
               first channel is x.
        Here:  As the code.
        Effect: With guidance none: a shift or a stretch of Q is undone by N1's
               normalisation. Without guidance it matters: N1 has the scores of one
               shift and stretch.
    N4  Order of the numbers in theta.
        Paper: "split and reshaped into the weights and biases".
        Code:  Weights, then biases, of the first, the second and the third layer. The
               weights of a layer are stored as [output][input].
        Here:  As the code.
        Effect: None on a network that is trained here. In another order a released
               checkpoint would mean another g.
    N5  Cost of NRD without guidance.
        Paper: Prints 2.6 GMACs for the decoder and 216.8 in total (Table 1), and 203.2
               for NRD in Table 3, whose networks it does not describe.
        Code:  A development branch of the first author has 8 hidden channels in g and
               256 in the controller. These give the printed numbers.
        Here:  `no-guidance` is the text, `no-guidance-published` meets the numbers.
               203.2 is met without ASPP and without guidance: `no-aspp`.
        Effect: By the paper's way of counting, the g and the controller of its text
               (P = 643, 512 channels) cost 5.5 and 219.7. On scores: not measured.
    N6  Order of classifier and upsampling in the bilinear row of Table 1.
        Paper: "uses a 1x1 convolution .. and then simply uses the bilinear upsampling".
               The printed 1.3 GMACs, however, are those of a 1x1 at 1/4 of the image;
               at 1/32 it would cost 0.02.
        Code:  Not in the release.
        Here:  As the printed number: first to 1/4, then the 1x1.
        Effect: None on the result, since a 1x1 convolution and a bilinear resize may
               change places (tested). Only the cost differs.
    N7  ASPP.
        Paper: "some optional modules such as ASPP", without dimensions.
        Code:  Dilation rates 3, 6 and 9 in separable convolutions, 512 channels, and a
               3x3 convolution that projects the five concatenated branches.
        Here:  As the code.
        Effect: That 3x3 alone costs 24 of the 214 GMACs that Table 1 leaves for the
               paper's encoder (234.6 less 20.4).
    N8  Auxiliary head and dropout.
        Paper: "inherit the default settings" of mmsegmentation.
        Code:  An FCN head on res4, whose loss has the weight 0.4. The main head has no
               dropout.
        Here:  As the code. `aux=False` removes the head.
        Effect: The head has 2.36 M parameters, which the paper's Params (Table 3)
               include. It is not run in eval, so GMACs do not see it. On streets two
               trainings without it reach a mean mIoU of 0.5546 (results/README.md),
               two others with it 0.5594, and single ones differ by 0.007.
    N9  Image sizes that 32 does not divide.
        Paper: Silent.
        Code:  Works for multiples of 32 only, because otherwise the guidance map and
               the grid of the cells' points have different sizes. Test images of ADE20K
               and Context are padded to such multiples, with zeros after normalisation,
               and the logits cut.
        Here:  Not padded. The last row and the last column of the guidance map are
               repeated up to the grid of cells, and the logits are cut to the image.
        Effect: None at multiples of 32. Elsewhere the encoder sees zeros of its own
               convolutions beyond the border instead of up to 31 pixels of mean colour;
               not measured.
    N10 Dimensions of DUC and CARAFE.
        Paper: Names none.
        Code:  Neither decoder is in the release.
        Here:  Those for which the costs of Table 3 come out, found by trying.
        Effect: DUC meets the printed 336.1 GMACs. Its printed Params also contain 9.4 M
               that belong to no layer of ours; a 3x3 convolution to 512 channels that
               was built and not used would explain them. CARAFE comes within 0.5 % of
               the printed 203.0. Its reassembly, 1.7 GMACs, is not in that number,
               because the paper's counter does not see it.
    N11 Initialisation of all other convolutions of the heads and of ASPP.
        Paper: Silent.
        Code:  mmcv's for convolutions with a batch norm: Kaiming normal with fan_out.
               The guidance map's 1x1 has it, too, though no norm is its own. The
               classifier of the auxiliary head has a standard deviation of 0.01.
        Here:  `init="official"` is the code's, and for the rivals of Tables 1 and 3 the
               same rule, classifiers with 0.01 included. (CARAFE's two convolutions for
               its weights keep torch's default.) `init="mlp"` is torch's default.
        Effect: Before a batch norm the scale of weights does not change the function,
               but how fast they turn under SGD: the larger, the slower, by the square.
               The official standard deviation divided by torch's is 4.9 in ASPP's 1x1,
               5.5 in its projection, 2.45 in the controller's 3x3, 5.65 in the guidance
               map's 3x3 and 0.05 in the depthwise 3x3, and 0.01 / 0.036 in the
               auxiliary classifier (measured). On streets, seed 0, with the official
               last layer of N2: mIoU 0.403 with these, 0.298 with torch's.
    N12 Recipes: steps, encoder, scales.
        Paper: Sec. 3 has 160,000 steps for ADE20K and 80,000 for Context and for
               Cityscapes; Table 1 has 84,000, and Table 3 "80k iterations with a 4k
               linear warm-up". ResNet-50 is the encoder of Tables 1 and 3, and Tables 2
               and 4 have its score; Tables 5 and 6 have NRD with ResNet-101 and
               ResNeXt-101 only, Table 7 with ResNet-50 and ResNet-101.
        Code:  164,000 and 84,000 steps, the first 4,000 of which are the warm-up. It
               begins at a hundredth of the rate. The stem of the ResNets is deep: three
               3x3 convolutions instead of one 7x7. Each GPU has 4 images, so a step on
               the paper's four has 16. On ADE20K each has 2, so a step on four has 8.
               Stem and first stage of ResNeXt-101 are frozen. Images
               of ADE20K are resized to fit into 2048x512 and those of Context into
               520x520, in training and in testing; in training this size is first
               scaled by 0.5 to 2.
        Here:  As the code, with the encoders of the tables. But the ResNets have the
               7x7 stem, because torchvision has ImageNet weights for that one;
               `--backbone resnet101c --weights FILE` is the paper's. Nothing is frozen.
               `evaluate.py score --base-size LONG SHORT` resizes test images likewise.
               On ADE20K a step has 16 images, mmsegmentation's, and not 8.
        Effect: The deep stem costs 10.0 GMACs more (1024x2048; the demo and
               `evaluate.py cost` have it). On scores: not measured.
    N13 Released checkpoints, and numbers.
        Paper: Its tables.
        Code:  The list beside the checkpoints differs from them: ResNeXt-101 has 46.35
               on ADE20K by several scales (paper: 46.09); on the validation images of
               Cityscapes, by several scales, ResNet-50 has 80.8 and ResNet-101 82.0;
               on Context, by one scale, ResNet-101 has 52.31 for 59 classes and 47.5
               for 60. Two configurations name heads whose guidance map comes from
               stage 1 or 3 instead of 2. Those heads are not in the release.
        Here:  `convert` takes such a checkpoint; guidance is from stage 2 only. What is
               published stands in results/published.csv, the list's numbers as remarks.
        Effect: With equal weights our NRD gives the same logits and gradients as a
               literal restatement of the authors' head (1e-10, float64, see
               tests/test_nrd.py).
    N14 Testing.
        Paper: By several scales means 0.5, 0.75, 1, 1.25, 1.5 and 1.75, each mirrored,
               too (Sec. 3). The network that Cityscapes' server scores (Table 7) is
               trained on the images of train and val.
        Code:  One scale. The list of six is there as a comment.
        Here:  `evaluate.py score RUN --scales 0.5 0.75 1 1.25 1.5 1.75 --flip`, and
               `train.py --train-split trainval`.
        Effect: Not measured.

Run
    python nrd.py FILE.png                     shapes, and the picture of `explain`
    python train.py                            NRD on procedural streets, minutes
    python train.py --method nrd --dataset cityscapes --data-root DIR
"""
from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ASPP, TEXT, TITLE, WIDTH, UserError, class_legend, colour_bar,
                    conv_bn_relu, farthest_points, fcn_heads, footnote, full_precision,
                    heading, label_colours, make_encoder, mark, mosaic, one_hot,
                    panel, repeat_border, show_errors, synthetic_scene, upsample,
                    viewable, widened)
from deeplabv3plus import (DeepLabv3PlusDecoder, block_names, decoder_names, renamed,
                           shared_names, start_as_mmsegmentation, start_classifier)

# --- 1. Config -----------------------------------------------------------------------

CELL = 32  # pixels per side of a cell: the stride of res5, whose locations draw cells
LOW_STRIDE = 4  # of the low-level features, res2

VARIANTS = {
    "default": {},
    # Table 1: four decoders on one encoder
    "deeplabv3plus": {"decoder": "deeplabv3plus"},
    "bilinear": {"decoder": "bilinear"},
    "no-guidance": {"guidance": False},
    "no-guidance-published": {"guidance": False, "hidden_channels": 8,
                              "controller_channels": 256},  # [N5]
    # Table 2: hidden channels of g (Cr), channels of the guidance map (Cm)
    "cr8": {"hidden_channels": 8}, "cr32": {"hidden_channels": 32},
    "cm8": {"guidance_channels": 8}, "cm32": {"guidance_channels": 32},
    # Table 3: ways of upsampling; without ASPP and guidance, as its costs say  [N5]
    "no-aspp": {"context": "conv", "guidance": False, "hidden_channels": 8,
                "controller_channels": 256},
    "duc": {"decoder": "duc", "context": "none"},
    "carafe": {"decoder": "carafe", "context": "conv"},
    # Table 4: what g is told. Its first row is `no-guidance`. Its last is `default`,
    # with a trimap mIoU of 51.5 there and of 51.6 in Table 1.
    "guidance-only": {"coordinates": False},
}

FROM_SCRATCH = {"init": "mlp"}  # options of `build` in train.py's own recipes  [N2]
PAPER = "paper, Sec. 3"
MMSEG = "mmsegmentation's default, which Sec. 3 inherits"
CODE = "official code"
SCHEDULE = {"lr": (0.01, PAPER), "weight_decay": (5e-4, PAPER),
            "weights": ("imagenet", PAPER),
            "batch": (16, "official code: 4 on each GPU; Sec. 3: four of them"),
            "momentum": (0.9, MMSEG), "power": (0.9, MMSEG), "min_lr": (1e-4, CODE),
            "warmup": (4000, "Table 3"), "warmup_from": (0.01, CODE),
            "scale": ((0.5, 2.0), MMSEG), "photometric": (True, MMSEG),
            "aux_weight": (0.4, MMSEG)}
RECIPES = {  # [N12] [N14]
    "cityscapes": SCHEDULE | {
        "backbone": ("resnet50", "Tables 1 and 3"), "crop": ((512, 1024), PAPER),
        "iterations": (84_000, "Table 1; Sec. 3: 80k, and Table 3: 4k of warm-up")},
    "ade20k": SCHEDULE | {
        "backbone": ("resnet101", "Table 5"), "crop": ((512, 512), PAPER),
        "base_size": ((2048, 512), CODE), "batch": (16, MMSEG),
        "iterations": (164_000, "Sec. 3: 160k, and Table 3: 4k of warm-up")},
    # for context59, too
    "context60": SCHEDULE | {
        "backbone": ("resnet101", "Table 6"), "lr": (0.004, PAPER),
        "weight_decay": (1e-4, PAPER), "crop": ((480, 480), PAPER),
        "base_size": ((520, 520), CODE),
        "iterations": (84_000, "Sec. 3: 80k, and Table 3: 4k of warm-up")},
}

# --- 2. Equations --------------------------------------------------------------------


# task: minutes=10 points=4
def coordinate_map(s: int) -> Tensor:
    """Q of Sec. 2.2: x and y of a cell's s x s points, (2, s, s) in float32.  [N3]"""
    steps = torch.arange(s) / s  # 0, 1/s, .., (s-1)/s
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y])


def standardised(coordinates: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the points of a cell.  [N1]

    With s = 1 the only point has no variance. The clamp then keeps 0 / 0 away, and the
    coordinates are 0.
    """
    deviation = coordinates.std(correction=0).clamp(min=1e-6)
    return (coordinates - coordinates.mean()) / deviation


# task: minutes=10 points=4
def theta_length(widths: tuple[int, ...]) -> int:
    """P: all weights and biases of a chain of 1x1 convolutions with these widths.

    Sec. 2.2: (18, 16, 16, 19) -> 899, and without guidance (2, 16, 16, 19) -> 643.
    """
    return sum(fan_in * fan_out + fan_out
               for fan_in, fan_out in zip(widths, widths[1:]))


# task: minutes=20 points=8 section='Sec. 2.2'
def split_theta(theta: Tensor, widths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """theta (N, P) -> per layer a weight (N, out, in) and a bias (N, out, 1).  [N4]

    `start` walks along the P numbers: the weights of a layer, then its biases.
    """
    layers = []
    start = 0
    for fan_in, fan_out in zip(widths, widths[1:]):
        end = start + fan_in * fan_out
        weight = theta[:, start:end].unflatten(1, (fan_out, fan_in))
        bias = theta[:, end:end + fan_out].unsqueeze(2)
        layers.append((weight, bias))
        start = end + fan_out
    return layers


def in_order(x: Tensor) -> Tensor:
    """A copy of x (any shape) in memory in the order of its dimensions, for `view`.

    `reshape` copies only where it must, and for a map of one cell it need not. So
    torch.export, which traces an image of many cells, would refuse one of 32x32 pixels.
    """
    return x.clone(memory_format=torch.contiguous_format)


# task: minutes=20 points=6 section='Fig. 3 (b)'
def to_cells(x: Tensor, s: int) -> Tensor:
    """Cut a map into its cells: (B, I, s*h, s*w) -> (N, I, s*s).

    The N = B*h*w cells come image by image, row by row, column by column, and the s*s
    points of a cell row by row.
    """
    B, I, rows, columns = x.shape
    h = rows // s
    w = columns // s
    x = x.reshape(B, I, h, s, w, s)  # (B, I, h, s, w, s)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, I, s, s)
    return in_order(x).view(B * h * w, I, s * s)


# task: minutes=15 points=4 needs=nrd.to_cells section='Fig. 3 (b)'
def from_cells(x: Tensor, B: int, h: int, w: int) -> Tensor:
    """Put the cells back side by side: (N, K, s*s) -> (B, K, s*h, s*w).

    s is the root of the last dimension.
    """
    N, K, points = x.shape
    s = math.isqrt(points)
    x = x.reshape(B, h, w, K, s, s)  # (B, h, w, K, s, s)
    x = x.permute(0, 3, 1, 4, 2, 5)  # (B, K, h, s, w, s)
    return in_order(x).view(B, K, h * s, w * s)


# task: minutes=40 points=12 needs=nrd.split_theta,nrd.from_cells
def represent(theta: Tensor, inputs: Tensor, *, widths: tuple[int, ...]) -> Tensor:
    """g_theta of every cell on that cell's own points, Fig. 3 (b).

    theta (B, P, h, w), inputs (B, I, s*h, s*w) -> logits (B, K, s*h, s*w). There is a
    ReLU between the layers, and none behind the last one.

    All N small networks run in one batched product per layer: cell n multiplies its own
    weight matrix with its own s*s points. The literal reading, a loop over cells and
    points, is `represent_slowly` in tests/test_nrd.py. The official code gets the same
    logits by enlarging theta to the grid of points, which takes s*s times the memory.
    """
    B, P, h, w = theta.shape
    s = inputs.shape[-1] // w
    N = B * h * w
    # In memory, too, the P numbers of a cell are neighbours from here on: else each
    # product would collect them anew.
    theta = in_order(theta.permute(0, 2, 3, 1)).view(N, P)  # (N, P)
    x = to_cells(inputs, s)  # (N, I, s*s)
    layers = split_theta(theta, widths)
    for depth, (weight, bias) in enumerate(layers):
        # weight @ x + bias, one product for all N cells; bias and ReLU need no copy:
        # (N, out, in) x (N, in, s*s) -> (N, out, s*s)
        x = torch.bmm(weight, x).add_(bias)
        if depth < len(layers) - 1:
            x = x.relu_()  # between the layers only: the last one gives logits
    return from_cells(x, B, h, w)


# --- 3. Layers -----------------------------------------------------------------------


class Controller(nn.Module):
    """Writes theta: a 3x3 convolution with 512 channels, then a 1x1 to P (Sec. 2.2).

    context (B, D, h, w) -> theta (B, P, h, w), the parameters of each cell's network.
    """

    def __init__(self, in_channels: int, channels: int, widths: tuple[int, ...], *,
                 init: str):
        super().__init__()
        self.features = conv_bn_relu(in_channels, channels)  # [N11]
        self.theta = nn.Conv2d(channels, theta_length(widths), 1)
        # The 1x1 computes theta = A v + b from the features v of a location. So the
        # gradient of the loss L by A is dL/dtheta v^T, and a step of SGD with learning
        # rate lr moves theta by lr (|v|^2 + 1) dL/dtheta, where the 1 is b's share.
        # |v|^2 grows with the number of channels. The scale takes that out.  [N2]
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
    """theta (P,) of a chain of nn.Linear layers as torch initialises them.  [N2]

    Such a g passes gradients on to all of its layers from the first step.
    """
    parts = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layer = nn.Linear(fan_in, fan_out)
        parts += [layer.weight.flatten(), layer.bias]
    return torch.cat(parts)


class GuidanceMap(nn.Module):
    """m of Sec. 2.2: two convolutions that reduce the 1/4 features to M channels.

    res2 (B, 256, q, r) of a ResNet-50 -> m (B, M, q, r). The hidden width 48 is the one
    to which DeepLabv3+ reduces the same features. The result has neither norm nor
    ReLU, since the batch norm over all inputs of g follows.  [N1]
    """

    def __init__(self, in_channels: int, guidance_channels: int, *, hidden=48):
        super().__init__()
        self.layers = nn.Sequential(*conv_bn_relu(in_channels, hidden),
                                    nn.Conv2d(hidden, guidance_channels, 1))

    def forward(self, res2: Tensor) -> Tensor:
        return self.layers(res2)


class NRDDecoder(nn.Module):
    """Fig. 3 (a): context and low-level features to logits at the points of all cells.

    With the paper's 8 points per side of a cell that is 1/4 of the image's resolution.
    """

    def __init__(self, in_channels: int, low_channels: int, num_classes: int, *,
                 controller_channels: int, hidden_channels: int, guidance_channels: int,
                 guidance: bool, coordinates: bool, standardise: bool, points: int,
                 init: str):
        super().__init__()
        if not (guidance or coordinates):
            raise UserError("guidance=False coordinates=False: g needs an input")
        if points not in (1, 2, 4, 8, 16, 32):
            raise UserError(f"points={points}: points per side of a cell, must divide "
                            f"the {CELL} pixels of that side")
        self.points = points
        self.stride = CELL // points
        coordinate_channels = 2 if coordinates else 0
        if not guidance:
            guidance_channels = 0
        g_inputs = coordinate_channels + guidance_channels
        self.widths = (g_inputs, hidden_channels, hidden_channels, num_classes)
        self.controller = Controller(in_channels, controller_channels, self.widths,
                                     init=init)
        self.guidance = None
        if guidance:
            self.guidance = GuidanceMap(low_channels, guidance_channels)
        # The coordinates are the same in every cell and are not learned: a buffer
        # travels to the GPU with the model, and this one is left out of checkpoints.
        told = coordinate_map(points) if coordinates else None
        if coordinates and (guidance or standardise):
            told = standardised(told)  # [N1]
        self.register_buffer("coordinates", told, persistent=False)
        self.norm = nn.BatchNorm2d(g_inputs) if guidance else nn.Identity()  # [N1]

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        theta = self.controller(context)  # (B, P, h, w)
        # --backbone labels has no res2. It is refused unless guidance is off, and then
        # nobody looks at this None.
        inputs = self.inputs_of_g(features.get("res2"), theta)
        # Three products in a chain, each of predicted numbers: 16 bits would lose too
        # much, so they are made in float32 even under autocast and in a model in 16
        # bits. The logits of the latter are rounded at the end.
        with full_precision(theta):
            logits = represent(widened(theta), widened(inputs), widths=self.widths)
        return logits.to(self.controller.theta.weight.dtype)

    def inputs_of_g(self, res2: Tensor | None, theta: Tensor) -> Tensor:
        """What g is told at the points of all cells, normalised: (B, I, s*h, s*w)."""
        B, P, h, w = theta.shape
        s = self.points
        maps = []
        if self.coordinates is not None:
            maps.append(self.coordinates.repeat(B, 1, h, w))
        if self.guidance is not None:
            maps.append(self.fit(self.guidance(res2), h, w))
        x = torch.cat(maps, dim=1)  # (B, I, s*h, s*w)
        return self.norm(x)

    # task: minutes=25 points=7 needs=nrd.represent section='Sec. 2.2, m'
    def fit(self, m: Tensor, h: int, w: int) -> Tensor:
        """Line the guidance map up with the cells: (B, M, q, r) -> (B, M, s*h, s*w).

        A cell is 8 x 8 positions of the 1/4 map whatever the image size, so position
        (0, 0) stays where it is, and what is missing at the bottom and on the right is
        added there. Resizing the map to (8*h, 8*w) instead would slide it against the
        cells by up to 7 positions.  [N9] Where s is not 8, the whole cells are then
        resized bilinearly (align_corners=False) to s*h x s*w.
        """
        B, M, q, r = m.shape
        side = CELL // LOW_STRIDE  # of a cell, in positions of the 1/4 map: 8
        m = repeat_border(m, side * h - q, side * w - r)
        if self.points != side:
            m = F.interpolate(m, scale_factor=self.points / side, mode="bilinear")
        return m


# The rivals of Tables 1 and 3. Their `forward` takes what NRDDecoder's takes, and gives
# logits on a finer grid as well; only the way from one to the other is their own.


class BilinearDecoder(nn.Module):
    """Table 1: no learned decoder, the classifier on enlarged features.  [N6]"""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.classify = nn.Conv2d(in_channels, num_classes, 1)
        self.stride = LOW_STRIDE

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(upsample(context, CELL // LOW_STRIDE))


class DUCDecoder(nn.Module):
    """Table 3: dense upsampling convolution, 64 channels at each of a cell's points.

    Like NRD it lets a location draw its own patch. But every point of the patch gets 64
    channels of its own: 64*8*8 = 4096, where Table 3's NRD needs a theta of 267. [N10]
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels=64, points=8):
        super().__init__()
        self.points = points
        self.stride = CELL // points
        self.expand = conv_bn_relu(in_channels, channels * points * points)
        self.shuffle = nn.PixelShuffle(points)  # channels of a location -> its points
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        return self.classify(self.shuffle(self.expand(context)))


class CARAFEDecoder(nn.Module):
    """Table 3: content-aware reassembly (Wang et al., ICCV 2019), x8 at once.  [N10]

    Every point of the finer grid is a weighted mean of the 5x5 features around its
    location, and the weights are predicted from the context. This is as smooth as
    bilinear enlargement, but it can follow edges.
    """

    def __init__(self, in_channels: int, num_classes: int, *, factor=8, kernel=5,
                 compressed=64):
        super().__init__()
        self.factor = factor
        self.kernel = kernel
        self.stride = CELL // factor
        self.compress = nn.Conv2d(in_channels, compressed, 1)
        self.predict = nn.Conv2d(compressed, kernel**2 * factor**2, 3, padding=1)
        self.classify = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, context: Tensor, features: dict[str, Tensor]) -> Tensor:
        B, D, h, w = context.shape
        k = self.kernel**2
        f = self.factor
        weights = self.predict(self.compress(context))  # (B, k*f*f, h, w)
        weights = weights.reshape(B, k, f * f, h * w)  # (B, k, f*f, h*w)
        # softmax over the k neighbours: the weights of a point add up to 1
        weights = weights.softmax(dim=1).permute(0, 3, 1, 2)  # (B, h*w, k, f*f)
        # What F.unfold gives, by shifted maps: torch.export would make of it a network
        # that refuses an image of one column of cells.
        padded = F.pad(context, (self.kernel // 2,) * 4)
        shifts = range(self.kernel)
        around = torch.stack([padded[..., y:y + h, x:x + w] for y in shifts
                              for x in shifts], dim=2)  # (B, D, k, h, w)
        around = around.permute(0, 3, 4, 1, 2)  # (B, h, w, D, k)
        # (B*h*w, D, k) x (B*h*w, k, f*f) -> (B*h*w, D, f*f)
        x = torch.bmm(in_order(around).flatten(0, 2),
                      in_order(weights).flatten(0, 1))  # (B*h*w, D, f*f)
        return self.classify(from_cells(x, B, h, w))


# --- 4. Model ------------------------------------------------------------------------


class NRD(nn.Module):
    """Encoder without dilation, context (ASPP), and one of the decoders (Sec. 2.1)."""

    def __init__(self, encoder: nn.Module, context: nn.Module, decoder: nn.Module,
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
        """images (B, 3, H, W) -> logits at the cells' points, auxiliary logits.

        The logits cover whole cells, so at sizes that 32 does not divide they reach
        beyond the image. `to_pixels` cuts that off.
        """
        features = self.encoder(images)
        context = self.context(features["res5"])  # (B, D, h, w)
        logits = self.decoder(context, features)
        aux = [head(features["res4"]) for head in self.aux_heads if self.training]
        return logits, aux

    def to_pixels(self, logits: Tensor, size: tuple[int, int], rows=None) -> Tensor:
        """The last bilinear step (x4): logits (B, K, H, W) of the size = (H, W) pixels.

        With rows = (lo, hi), those of the rows lo..hi-1 alone, (B, K, hi - lo, W).
        """
        return upsample(widened(logits), self.decoder.stride, size, rows)


def make_context(name: str, in_channels: int, channels: int) -> tuple[nn.Module, int]:
    """What stands between encoder and decoder, and D, the channels that it gives."""
    if name == "aspp":
        return ASPP(in_channels, channels, rates=(3, 6, 9)), channels  # [N7] [N11]
    if name == "conv":
        return conv_bn_relu(in_channels, channels), channels
    if name == "none":
        return nn.Identity(), in_channels
    raise UserError(f"context={name!r}: must be one of aspp, conv, none")


def build(num_classes: int, *, backbone="resnet50", weights="none", decoder="nrd",
          context="aspp", channels=512, controller_channels=512, hidden_channels=16,
          guidance_channels=16, guidance=True, coordinates=True, standardise=False,
          points=8, init="official", aux=True) -> NRD:
    """NRD or one of its rivals; VARIANTS names the rows of the paper's tables.

    decoder              nrd, deeplabv3plus, bilinear (Table 1), duc, carafe (Table 3)
    context              aspp, conv (a 3x3) or none (res5 as it is)
    channels             D, width of the context (512, mmsegmentation)
    controller_channels  width of the controller's 3x3 (512, Sec. 2.2)
    hidden_channels      Cr, hidden width of g (16, Table 2)
    guidance_channels    M, Cm in the paper: width of the guidance map (16, Table 2)
    guidance, coordinates  which inputs g gets (Table 4)
    standardise          bring raw coordinates, too, to mean 0 and variance 1  [N1]
    points               s, points per side of a cell (8, Sec. 2.2)
    init                 'official'; 'mlp' for short runs, from scratch  [N2] [N11]
    aux                  train with an auxiliary head on res4  [N8]
    """
    if init not in ("mlp", "official"):
        raise UserError(f"init={init!r}: must be 'mlp' or 'official'")
    encoder = make_encoder(backbone, num_classes, weights=weights)
    heads = fcn_heads(encoder, num_classes, aux)  # [N8]
    between, width = make_context(context, encoder.channels["res5"], channels)
    if decoder == "nrd":
        low_channels = encoder.channels["res2"] if guidance else 0
        top = NRDDecoder(
            width, low_channels, num_classes, controller_channels=controller_channels,
            hidden_channels=hidden_channels, guidance_channels=guidance_channels,
            guidance=guidance, coordinates=coordinates, standardise=standardise,
            points=points, init=init)
    elif decoder == "deeplabv3plus":
        top = DeepLabv3PlusDecoder(width, encoder.channels["res2"], num_classes,
                                   channels=channels)
    elif decoder == "bilinear":
        top = BilinearDecoder(width, num_classes)
    elif decoder == "duc":
        top = DUCDecoder(width, num_classes)
    elif decoder == "carafe":
        top = CARAFEDecoder(width, num_classes)
    else:
        raise UserError(f"decoder={decoder!r}: must be one of nrd, deeplabv3plus, "
                        f"bilinear, duc, carafe")
    if init == "official":
        official_start(between, top, heads)
    return NRD(encoder, between, top, heads)


def official_start(context: nn.Module, decoder: nn.Module,
                   aux_heads: nn.ModuleList) -> None:
    """Draw all weights but the controller's last layer as mmsegmentation does.  [N11]

    That layer, which writes theta, has drawn its own (see Controller).
    """
    start_as_mmsegmentation(context, decoder, aux_heads)
    for head in aux_heads:
        start_classifier(head.layers[-1])
    if isinstance(decoder, DeepLabv3PlusDecoder):
        start_classifier(decoder.classify[-1])
    elif not isinstance(decoder, NRDDecoder):
        start_classifier(decoder.classify)
    elif decoder.guidance is not None:
        # The only convolution with a bias that is drawn like those with a batch norm.
        last = decoder.guidance.layers[-1]
        nn.init.kaiming_normal_(last.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(last.bias)


def convert(state: dict, model: NRD) -> dict:
    """A released checkpoint as a state dict of `model`: NRD, or DeepLabv3+ of Table 1.

    The authors' head has a classifier of its base class that is never used. It is
    dropped. In the batch norm over the inputs of g, what belongs to x and y is
    converted, because our coordinates come to it standardised.  [N1] [N13]
    """
    if isinstance(model.decoder, DeepLabv3PlusDecoder):
        return renamed(state, model, shared_names() | decoder_names())
    decoder = model.decoder
    if not isinstance(decoder, NRDDecoder) or decoder.guidance is None or (
            decoder.coordinates is None or decoder.points != 8):
        raise UserError("the authors have released NRD with guidance map, coordinates "
                        "and 8 points per side, and DeepLabv3+; no other decoder")
    names = shared_names() | block_names("decode_head.classifier.classifier.0",
                                         "decoder.controller.features")
    names |= block_names("decode_head.c1_bottleneck.0", "decoder.guidance.layers")
    names |= {"decode_head.classifier.classifier.1": "decoder.controller.theta",
              "decode_head.c1_bottleneck.1.conv": "decoder.guidance.layers.3",
              "decode_head.cat_norm": "decoder.norm"}
    state = {key: value for key, value in state.get("state_dict", state).items()
             if not key.removeprefix("module.").startswith("decode_head.conv_seg.")}
    state = renamed(state, model, names)
    theta = "decoder.controller.theta.weight"
    state[theta] = state[theta] / decoder.controller.scale
    for kind, value in norm_of_standardised(
            state["decoder.norm.weight"], state["decoder.norm.running_mean"],
            state["decoder.norm.running_var"], eps=decoder.norm.eps).items():
        state[f"decoder.norm.{kind}"] = value
    return state


def norm_of_standardised(weight: Tensor, mean: Tensor, var: Tensor, *,
                         eps: float) -> dict[str, Tensor]:
    """The batch norm that does to standardised x and y what the given does to raw ones.

    Raw coordinates have the mean c and the variance v, 0.082. In training their norm
    divides by sqrt(v + eps) and ours by sqrt(1 + eps) what was divided by sqrt(v)
    before. The weight makes up for that. In eval the running variance does.  [N1]
    """
    raw = coordinate_map(8).double()
    c = raw.mean()
    v = raw.var(correction=0)
    xy = slice(0, 2)
    weight = weight.clone()
    mean = mean.clone()
    var = var.clone()
    weight[xy] *= (v * (1 + eps) / (v + eps)).sqrt()
    mean[xy] = (mean[xy].double() - c).div(v.sqrt()).to(mean)
    var[xy] = ((1 + eps) * (var[xy].double() + eps) / (v + eps) - eps).to(var)
    return {"weight": weight, "running_mean": mean, "running_var": var}


# --- 5. Explain ----------------------------------------------------------------------


def explain(model: NRD, image: Tensor, *, palette=None, classes=None):
    """Fig. 1 from the model's own tensors: cells that differ, and how g draws them.

    image (1, 3, H, W), normalised -> matplotlib Figure. Above: three cells in the image
    and in the labels, and where labels change from cell to cell. Middle: for each of
    the cells what g is told and what it draws, with its own theta and with that of the
    cell beside it. Below: one cell, layer by layer. `palette` and `classes` have a
    colour and a name per class.
    """
    from matplotlib.figure import Figure
    decoder = model.decoder
    if not isinstance(decoder, NRDDecoder):
        raise UserError("nothing to explain: this variant has no g")
    s = decoder.points
    widths = decoder.widths
    H, W = image.shape[-2:]
    with torch.no_grad():
        features = model.encoder(image)
        theta = decoder.controller(model.context(features["res5"]))
        inputs = decoder.inputs_of_g(features["res2"], theta)
        units, logits = layers_of_g(theta, inputs, widths)
        final = model.to_pixels(logits, (H, W))[0].argmax(0)
        said = logits[0].argmax(0)  # the class at every point of every cell
        planes = one_hot(said[None], widths[-1])[0]
        cells = cells_that_differ(planes, s, H // CELL, W // CELL)
        # The same inputs under the theta of the cell beside, or of another of the three
        beside = represent(of_the_cell_beside(theta), inputs, widths=widths)
        beside = beside[0].argmax(0)
        others = [g_of_another_cell(theta, inputs, widths, cell, other)[0].argmax(0)
                  for cell, other in zip(cells, cells[1:] + cells[:1])]
    picture = viewable(image[0])
    colours = label_colours(palette, widths[-1])
    told = " and ".join(["x, y"] * (decoder.coordinates is not None)
                        + ["guidance map m"] * (decoder.guidance is not None))
    tiles = [{"pixels": picture[block(*cell, CELL)],
              "told": viewable(last_three(inputs[0])[:, rows, columns]),
              "own θ": colours[said[rows, columns]],
              "next θ": colours[beside[rows, columns]],
              "θ of another": colours[other]}
             for cell, other in zip(cells, others)
             for rows, columns in [block(*cell, s)]]
    rows, columns = block(*cells[0], s)
    layers = [x[0, :, rows, columns] for x in (inputs, *units, logits)]
    highest = layers[-1].amax((1, 2)).topk(min(16, widths[-1])).indices.sort().values

    overview = 4.5 * H / W + 1.4  # inches: three pictures side by side, and captions
    figure = Figure(figsize=(WIDTH, overview + 7.6), layout="constrained")
    top, above, middle, below, names = figure.subfigures(
        5, 1, height_ratios=(0.4, overview, 2.3, 4.45, 0.45))
    heading(top, "NRD: every cell of 32x32 pixels is drawn by a tiny network g of its "
                 "own, whose weights θ are predicted")
    draw_overview(above, picture, colours[final], said, cells, s)
    draw_patches(middle, tiles, told, (said != beside).float().mean())
    if decoder.guidance:
        unit = "after the batch norm"
    elif decoder.coordinates.min() < 0:
        unit = "standardised"
    else:
        unit = "shares of the cell's side"
    draw_layers(below, layers, highest, colours, told, unit)
    seen = torch.cat([x.flatten() for x in (highest, said, beside, *others)])
    class_legend(names, seen, colours, classes)
    return figure


def layers_of_g(theta: Tensor, inputs: Tensor, widths: tuple[int, ...]):
    """Hidden units of g after their ReLU, a tensor per layer, and its logits.

    A g of the first layers alone reads the first numbers of theta.
    """
    units = [represent(theta, inputs, widths=widths[:depth]).relu()
             for depth in range(2, len(widths))]
    return units, represent(theta, inputs, widths=widths)


def of_the_cell_beside(theta: Tensor) -> Tensor:
    """For every cell the theta of its right neighbour; in the last column, the left."""
    B, P, h, w = theta.shape
    beside = torch.arange(1, w + 1)
    beside[-1] = max(w - 2, 0)
    theta = theta[..., beside]  # (B, P, h, w)
    return theta


def g_of_another_cell(theta: Tensor, inputs: Tensor, widths: tuple[int, ...],
                      cell: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """Logits that the theta of `other` makes of what `cell` is told: (B, K, s, s)."""
    B, P, h, w = theta.shape
    s = inputs.shape[-1] // w
    K = widths[-1]
    rows, columns = block(*other, 1)
    theta = theta[:, :, rows, columns]  # (B, P, 1, 1)
    rows, columns = block(*cell, s)
    told = inputs[:, :, rows, columns]
    logits = represent(theta, told, widths=widths)  # (B, K, s, s)
    return logits


def last_three(inputs: Tensor) -> Tensor:
    """Three maps to show as red, green and blue: of m, or x and y without m."""
    I, rows, columns = inputs.shape
    shown = torch.cat([inputs, inputs.new_zeros(2, rows, columns)])
    return shown[I - 3:I] if I >= 3 else shown[:3]


def block(row: int, column: int, side: int) -> tuple[slice, slice]:
    """Where a cell lies in a map in which it has `side` x `side` positions."""
    return (slice(row * side, row * side + side),
            slice(column * side, column * side + side))


def cells_that_differ(planes: Tensor, s: int, h: int, w: int) -> list[tuple[int, int]]:
    """Row and column of three cells, the first with the most even mixture of classes.

    `planes` (K, s*h, s*w) is 1 where a class was drawn. A cell's histogram says how
    much of it each class has. The other two are the farthest from those before, by
    histogram and by place. Cells of which one class has 90 % are left out, if three
    others are there.
    """
    cells = planes[:, :s * h, :s * w].unfold(1, s, s).unfold(2, s, s)
    histograms = cells.mean((3, 4)).flatten(1).T  # a row of K shares per cell
    mixed = (histograms.amax(1) < 0.9).nonzero()[:, 0]
    if len(mixed) < 3:
        mixed = torch.arange(h * w)
    places = torch.stack([mixed // w, mixed % w], dim=1) / max(h, w)
    first = torch.special.entr(histograms[mixed]).sum(1).argmax()
    chosen = farthest_points(torch.cat([histograms[mixed], places], dim=1), 3,
                             int(first))
    return [divmod(cell, w) for cell in mixed[chosen].tolist()]


def class_changes(labels: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Where neighbouring points in a row have two classes, and where cells meet.

    labels (rows, columns) -> (rows, columns - 1) bool, (columns - 1,) bool.
    """
    changes = labels[:, 1:] != labels[:, :-1]
    border = torch.arange(1, labels.shape[1]) % s == 0
    return changes, border


def seam_shares(labels: Tensor, s: int) -> Tensor:
    """Of all pairs of neighbouring points the share that differs in class, (2,).

    First that of the pairs inside cells, then that of the pairs from cell to cell.
    """
    differ = torch.zeros(2)
    pairs = torch.zeros(2)
    for x in (labels, labels.T):
        changes, border = class_changes(x, s)
        for i, where in enumerate((~border, border)):
            differ[i] += (changes & where).sum()
            pairs[i] += len(x) * where.sum()
    return differ / pairs.clamp(min=1)


LETTERS = "ABC"


def draw_overview(figure, picture: Tensor, labels: Tensor, said: Tensor, cells,
                  s: int) -> None:
    """Where the cells lie, what is drawn, and whether one sees the cells in it."""
    left, centre, right = figure.subplots(1, 3)
    panel(left, picture, "Image and three of its cells",
          "The stride-32 map has one feature vector per cell, from which the weights "
          "of the cell's own g are predicted.", chars=46)
    panel(centre, labels, "Predicted labels, cell by cell",
          "Each cell is drawn by itself: outlines go on across the white grid only as "
          "far as neighbouring networks agree.", chars=46)
    draw_grid(centre, labels.shape, CELL, "white")
    for axis in (left, centre):
        for letter, (row, column) in zip(LETTERS, cells):
            mark(axis, row * CELL, column * CELL, CELL, letter)
    draw_seams(right, said, s)


def draw_grid(axis, shape: tuple[int, ...], side: int, colour: str) -> None:
    """Thin lines between cells that have `side` positions a side."""
    for at in range(side, shape[1], side):
        axis.axvline(at - 0.5, color=colour, linewidth=0.8, zorder=1)
    for at in range(side, shape[0], side):
        axis.axhline(at - 0.5, color=colour, linewidth=0.8, zorder=1)


def draw_seams(axis, said: Tensor, s: int) -> None:
    """Changes of class between neighbouring points: thick where two cells meet."""
    inside, across = seam_shares(said, s).tolist()
    panel(axis, torch.ones(*said.shape, 3), "Seams between cells",
          f"Neighbouring points differ in class at {across:.0%} of the pairs across a "
          f"border of cells (thick) and at {inside:.0%} inside cells (thin): equal "
          "shares would mean no seams.", chars=46)
    thin = min(1, 80 / max(said.shape))
    for x, draw in ((said, axis.vlines), (said.T, axis.hlines)):
        changes, border = class_changes(x, s)
        for where, width, colour in ((~border, thin, "grey"),
                                     (border, 3 * thin, "black")):
            lines, positions = (changes & where).nonzero().T
            draw(positions + 0.5, lines - 0.5, lines + 0.5, colors=colour,
                 linewidth=width)
    axis.spines[:].set_visible(True)
    draw_grid(axis, said.shape, s, "0.85")


def draw_patches(figure, tiles: list[dict[str, Tensor]], told: str,
                 change: Tensor) -> None:
    """Per cell: pixels, what g is told of them, its patch, those of other thetas."""
    for i, (group, row) in enumerate(zip(figure.subfigures(1, 3, wspace=0.04), tiles)):
        for axis, (title, tile) in zip(group.subplots(1, len(row)), row.items()):
            other = LETTERS[(i + 1) % len(tiles)]
            panel(axis, tile, title.replace("another", other))
        group.suptitle(f"Cell {LETTERS[i]}", fontsize=TITLE, fontweight="bold")
    side = len(tiles[0]["told"])
    footnote(figure, f"At {side}x{side} points of its cell g is told {told} (in the "
             "pictures the last channels as red, green and blue), and its own θ draws "
             "the patch. The last two pictures have the same inputs under another θ, "
             "that of the cell beside or of another of the three: what g is told shows "
             "where edges are, and θ decides which classes meet there. With θ of the "
             f"cell beside, {change:.0%} of all points change class.", chars=156)


def draw_layers(figure, layers: list[Tensor], shown: Tensor, colours: Tensor,
                told: str, unit: str) -> None:
    """One cell from what g is told to the class at each of its points, 4 maps high.

    `unit` is that of what g is told. Of the logits those of the classes `shown`.
    """
    from matplotlib.patches import Rectangle
    logits = layers[-1]
    layers = [*layers[:-1], logits[shown]]
    widths = [math.ceil(len(x) / 4) for x in layers]
    texts = [("What g is told", unit,
              f"The points of cell A are described to g by {told}."),
             ("Hidden units, first", "after the ReLU",
              "θ weighs what g is told, and black units are off."),
             ("Hidden units, second", "after the ReLU",
              "θ weighs the first units in the same way."),
             ("Logits", "logit", "Each class has a map, framed in its colour.")]
    axes = figure.subplots(1, len(layers) + 1, width_ratios=[*widths, 4])
    for axis, x, width, (title, unit, caption) in zip(axes, layers, widths, texts):
        high = x.abs().max().item()
        style = {"cmap": "inferno", "vmin": 0} if "ReLU" in unit else {
            "cmap": "RdBu_r", "vmin": -high, "vmax": high}
        drawn = panel(axis, mosaic(x, width), f"{title} →", **style)
        colour_bar(drawn, unit, caption, chars=7 * width)
    step = logits.shape[-1] + 1  # from one map of the mosaic to the next
    for i, k in enumerate(shown.tolist()):
        corner = (i % widths[-1] * step - 0.5, i // widths[-1] * step - 0.5)
        axes[-2].add_patch(Rectangle(corner, step - 1, step - 1, fill=False,
                                     edgecolor=(colours[k] / 255).tolist(),
                                     linewidth=3, clip_on=False))
    panel(axes[-1], colours[logits.argmax(0)], "Patch of cell A",
          "At each point the class with the largest logit wins.", chars=28)


# --- 6. Demo -------------------------------------------------------------------------


def demo(file: str = "") -> None:
    """The way of one small image through NRD, and its picture, if a file is named.

    Nothing is trained here, so the picture shows what is drawn by chance.
    """
    model = build(19, backbone="resnet18", **FROM_SCRATCH).eval()
    image = synthetic_scene(96, 160)
    with torch.no_grad():
        features = model.encoder(image)
        context = model.context(features["res5"])
        theta = model.decoder.controller(context)
        inputs = model.decoder.inputs_of_g(features["res2"], theta)
        logits = represent(theta, inputs, widths=model.decoder.widths)
        out = model(image)["out"]
    for name, x in {"image": image, **features, "context": context, "theta": theta,
                    "inputs": inputs, "logits": logits, "out": out}.items():
        print(f"{name:<8} {tuple(x.shape)}")
    cells = theta[0].flatten(1).T  # one row of P numbers per cell
    for weight, bias in split_theta(cells, model.decoder.widths):
        print(f"layer of g: weights {tuple(weight.shape)}, biases {tuple(bias.shape)}")
    if file:
        explain(model, image).savefig(file, dpi=100)
        print(f"picture of the untrained network: {file}")
    print("costs: python evaluate.py cost nrd")


if __name__ == "__main__":
    with show_errors():
        demo(*sys.argv[1:2])
