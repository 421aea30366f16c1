"""What the methods share: encoder, context modules, losses, metrics, build_model.

A reader of a paper's module needs that file and this one, up to the line that says so.

    Encoder(images)   -> {"stem", "res2", "res3", "res4", "res5"}
    ASPP(res5)        -> context features at the encoder's output stride
    segmentation_loss -> scalar, and its terms for the log
    ConfusionMatrix   -> mIoU and what goes with it
    build_model("METHOD:VARIANT", 19), and the contract of a method

After that come pictures, and the parts of a program: what a model costs, checkpoints,
processes.

Dimension key: B batch, C channels, K classes, H, W image height and width in pixels,
h, w the size of a coarse feature map, q, r that of a finer one.
"""
from __future__ import annotations

import argparse
import colorsys
import csv
import difflib
import errno
import importlib
import inspect
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
import zipfile
from contextlib import (contextmanager, nullcontext, redirect_stderr, redirect_stdout,
                        suppress)
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

IGNORE_INDEX = 255  # the only "no label" value in the whole library (uint8 masks)


class UserError(Exception):
    """Something that needs a sentence and no traceback, and the program's exit code.

    2: a mistake in what was asked for, or in the data. train.py lists the others.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# What Python and torch raise where the values of options make no network.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
           ValueError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of one without a message, its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- Building blocks -----------------------------------------------------------------


def conv_bn(in_channels: int, out_channels: int, kernel: int = 1, *, stride=1,
            dilation=1, groups=1) -> nn.Sequential:
    """Convolution without bias, batch norm; gives ceil(size / stride)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride=stride, dilation=dilation,
                  padding=dilation * (kernel // 2), groups=groups, bias=False),
        nn.BatchNorm2d(out_channels))


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 3,
                 **options) -> nn.Sequential:
    """`conv_bn`, which takes the options, with a ReLU behind it."""
    return nn.Sequential(*conv_bn(in_channels, out_channels, kernel, **options),
                         nn.ReLU(inplace=True))


def separable_conv(in_channels: int, out_channels: int, *, dilation=1) -> nn.Sequential:
    """Depthwise 3x3 then pointwise 1x1, each with batch norm and ReLU."""
    depthwise = conv_bn_relu(in_channels, in_channels, 3, dilation=dilation,
                             groups=in_channels)
    return nn.Sequential(*depthwise, *conv_bn_relu(in_channels, out_channels, 1))


# task: minutes=20 points=6 section='arXiv:1903.02120, Eq. (1)'
def upsample(x: Tensor, factor: int, size: tuple[int, int] | None = None,
             rows: tuple[int, int] | None = None) -> Tensor:
    """Bilinear upsampling by a whole `factor`, then a cut to `size` = (H, W) if given.

    A stride-s map of an image has ceil(H/s) rows, so it covers up to s-1 pixels more
    than the image. Those are cut off. Squeezing the map into `size` instead would
    shift the last rows by as many pixels against the encoder's grid.

    `rows` = (lo, hi) gives those rows of the result alone, in at least float32.
    """
    if rows:
        lo, hi = rows
        if factor == 1:
            return x[..., lo:hi, : size[1]]
        centres = (torch.arange(lo, hi, dtype=torch.float64) + 0.5) / factor - 0.5
        x = rows_at(x, centres)
        x = F.interpolate(x, scale_factor=(1, factor), mode="bilinear")
        return x[..., : size[1]]
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return x[..., : size[0], : size[1]] if size else x


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x (B, C, q, r) at fractional `positions` (n,): (B, C, n, r), `widened`.

    Position 0.25 is three parts of row 0 and one part of row 1. Positions beyond the
    first or the last row mean that row.
    """
    positions = positions.clamp(0, x.shape[-2] - 1)
    above = positions.long()
    below = (above + 1).clamp(max=x.shape[-2] - 1)
    x = widened(x)
    weight = (positions - positions.floor())[:, None].to(x)
    return torch.lerp(x[..., above, :], x[..., below, :], weight)


def repeat_border(x: Tensor, rows: int, columns: int) -> Tensor:
    """The last row and the last column so many times more, (.., H + rows, W + columns).

    The gradient of F.pad(mode="replicate") depends on chance on a GPU, and
    torch.compile, in torch 2.15, stumbles over it.
    """
    # While the sizes are symbols, as in torch.export, nothing may depend on whether a
    # number is 0: what is traced at one size must be right at others.
    symbols = torch.compiler.is_compiling()
    if symbols or columns:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], columns)], dim=-1)
    if symbols or rows:
        last = x[..., -1:, :].expand(*x.shape[:-2], rows, x.shape[-1])
        x = torch.cat([x, last], dim=-2)
    return x


# task: minutes=15 points=5 section='arXiv:1903.02120, Sec. 3.1'
def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Class ids (B, H, W) to {0, 1} in float32, (B, K, H, W); ignored pixels are 0."""
    B, H, W = labels.shape
    ids = labels.long().clamp(max=num_classes)[:, None]  # 255: a class of its own
    planes = torch.zeros(B, num_classes + 1, H, W, device=labels.device)
    return planes.scatter_(1, ids, 1.0)[:, :num_classes]


def widened(x: Tensor) -> Tensor:
    """x in at least float32: half and bfloat16 are widened, float64 stays as it is.

    Models work in any of the four (`model.half()`). What 16 bits would spoil is then
    computed in float32, as under autocast, and each place says why. A decoder gives its
    result back in the type of its own weights. Logits are widened before they are
    enlarged: a GPU adds up the gradient of a coarse one, of 64 to 1024 terms, in its
    own type, and in bfloat16 a sum of ones stops at 256.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor):
    """A block in which autocast leaves float32 alone on the device of `x`."""
    device = x.device.type  # the meta device, used for counting, knows no autocast
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


def check_batch(values: int, layers: nn.Module) -> None:
    """A sentence where batch norm in `layers` would see one value per channel.

    `values` is batch times height times width. The mean of one value is that value, so
    it would be normalised to zero whatever it is. SyncBatchNorm also sees the images of
    other processes, and a norm in eval mode does not look at the batch: both may have
    one value.
    """
    trained = [layer for layer in layers.modules()
               if isinstance(layer, nn.BatchNorm2d) and layer.training]
    if trained and values == 1:
        raise UserError("a batch of 1 in training leaves batch norm a single image "
                        "with one value per channel; give two or more images, or call "
                        "model.eval()")


# --- Encoder -------------------------------------------------------------------------

STEMS = {"": None, "c": (32, 32, 64), "s": (64, 64, 128)}
# torchvision's networks whose stages have names, ResNets with three stems.
TORCHVISION = tuple(f"resnet{n}{s}" for n in (18, 34, 50, 101, 152) for s in STEMS)
TORCHVISION += ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
                "wide_resnet50_2", "wide_resnet101_2", "shufflenet_v2_x0_5",
                "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0")
LABELS = "labels"  # the backbone of an upper bound: it reads the ground truth


def encoders() -> dict:
    """The encoders that papers bring: {name: function that builds it}.

    A method's file offers them as ENCODERS, at the beginning of a line. Each function
    takes output_stride, and what it builds has the attributes and the `forward` of
    Encoder, with the stages that it has.
    """
    found = {}
    for name in methods():
        if "\nENCODERS" in (FOLDER / f"{name}.py").read_text(encoding="utf-8"):
            found |= importlib.import_module(name).ENCODERS
    return found


def backbones() -> list[str]:
    """Every --backbone, but for LABELS."""
    return [*TORCHVISION, *encoders()]


def split_backbone(backbone: str) -> tuple[str, tuple[int, ...] | None]:
    """'resnet50c' -> torchvision's name 'resnet50' and the widths of its deep stem."""
    if backbone not in TORCHVISION:
        known = backbones()
        raise UserError(f"unknown backbone {backbone!r}"
                        f"{did_you_mean(backbone, known)}; known: {', '.join(known)}")
    suffix = backbone[-1] if backbone[-1] in "cs" else ""
    return backbone.removesuffix(suffix), STEMS[suffix]


def replace_stem(net: nn.Module, widths: tuple[int, ...]) -> None:
    """Three 3x3 convolutions in the place of the 7x7, the first with stride 2.

    Submodule names (conv1.0, conv1.1, ...) are those of the common weight files.
    """
    a, b, c = widths
    net.conv1 = nn.Sequential(*conv_bn_relu(3, a, stride=2), *conv_bn_relu(a, b),
                              nn.Conv2d(b, c, 3, padding=1, bias=False))
    net.bn1 = nn.BatchNorm2d(c)
    if c != 64:  # a wider stem needs a first stage that accepts it
        net.inplanes = c
        net.layer1 = net._make_layer(type(net.layer1[0]), 64, len(net.layer1))


# task: minutes=25 points=8 section='arXiv:1802.02611, Sec. 3.1'
def dilate_stage(stage: nn.Sequential, dilation: int) -> None:
    """Trade a stage's stride 2 for `dilation`, so that its output keeps its resolution.

    The first 3x3 still sees the old grid and gets half the dilation, as torchvision
    and mmsegmentation (contract_dilation) do. torchvision's own switch refuses the
    BasicBlocks of ResNet-18, hence these lines.
    """
    first = True
    for conv in stage.modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            d = dilation // 2 if first else dilation
            conv.dilation = conv.padding = (d, d)
            first = False


def imagenet_weights(backbone: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights; offline, or for a deep stem, says what to do."""
    name, stem = split_backbone(backbone)
    if stem:
        raise UserError(
            f"torchvision has no ImageNet weights for the deep stem of {backbone}: use "
            f"--backbone {name}, or --weights PATH with a file for {backbone}, or none")
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:  # URLError is an OSError
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"cannot download ImageNet weights ({error}): fetch {weights.url}, "
            f"put it into {folder} and run again, or pass --weights none") from None


def load_weights(net: nn.Module, backbone: str, weights: str) -> str:
    """Fill `net` from 'imagenet', 'none' or a file; returns a line for the log."""
    if weights == "none":
        return "random initialisation"
    if weights == "imagenet":
        state = imagenet_weights(backbone)
    elif Path(weights).is_file():
        state = load_file(Path(weights))
        state = state.get("state_dict", state.get("model", state))
    else:
        raise UserError(f"--weights {weights}: no such file; give imagenet, none or "
                        f"a file")
    if backbone in TORCHVISION:
        state = torchvision_names(state)
    own = {k: v for k, v in net.state_dict().items()
           if not k.startswith("fc.") and not k.endswith("batches_tracked")}
    parts = {name.split(".")[0] for name in own}
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
    # All of a ResNet-50 is in a ResNet-101's file, too: what is left over tells.
    wrong += [k for k in state if k.split(".")[0] in parts and k not in own
              and not k.endswith("batches_tracked")]
    if wrong:
        raise UserError(
            f"--weights {weights}: {len(wrong)} tensors do not fit {backbone} "
            f"({', '.join(wrong[:3])}{' ..' if len(wrong) > 3 else ''}); nothing was "
            f"loaded. Is it for another backbone, or another stem (c, s)?")
    net.load_state_dict({k: state[k] for k in own}, strict=False)
    return f"all {len(own)} tensors of {weights}"


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a weight file in torchvision's way.

    A prefix goes. mmsegmentation calls the layers of a deep stem stem.0 .. stem.7, in
    order: convolution, norm, ReLU, three times. Here and in most files the first five
    that have weights are conv1.0 .. conv1.6, and the last norm is bn1.
    """
    names = {}
    tensors = {str(key): x for key, x in state.items() if isinstance(x, Tensor)}
    for key, value in tensors.items():
        for prefix in ("module.", "backbone.", "encoder."):
            key = key.removeprefix(prefix)
        if key.startswith("stem."):
            key = "conv1." + key.removeprefix("stem.")
            key = "bn1." + key.removeprefix("conv1.7.") if "1.7." in key else key
        names[key] = value
    return names


def resnet_stages(net: nn.Module, output_stride: int) -> tuple[tuple, tuple]:
    """The five stages of a torchvision ResNet (less its pooling) and their widths."""
    if output_stride == 16:
        dilate_stage(net.layer4, 2)
    if output_stride == 8:
        dilate_stage(net.layer3, 2)
        dilate_stage(net.layer4, 4)
    width = [m.num_features for m in net.layer4[-1].modules()
             if isinstance(m, nn.BatchNorm2d)][-1]
    stem = nn.Sequential(net.conv1, net.bn1, net.relu)
    return (stem, net.layer1, net.layer2, net.layer3, net.layer4), (
        net.bn1.num_features, width // 8, width // 4, width // 2, width)


def shufflenet_stages(net: nn.Module, output_stride: int) -> tuple[tuple, tuple]:
    """The same of a ShuffleNetV2, whose 1/4 features are its pooled stem."""
    if output_stride != 32:
        raise UserError(f"output_stride {output_stride}: for ShuffleNetV2 32 only")
    a, c, d, _, e = net._stage_out_channels
    res5 = nn.Sequential(net.stage4, net.conv5)
    return (net.conv1, nn.Identity(), net.stage2, net.stage3, res5), (a, a, c, d, e)


class Encoder(nn.Module):
    """A torchvision ResNet or ShuffleNetV2 as five named stages.

    images (B, 3, H, W) -> {"stem": (B, C0, H/2, W/2), "res2": .. H/4, "res3": .. H/8,
    "res4": .. H/16, "res5": .. H/32}; every size is rounded up. `output_stride` 16 or
    8 dilates the last one or two stages and stops the shrinking there.

    `channels[name]` gives each stage's width. The suffix of a ResNet's name chooses the
    stem: 'resnet50' torchvision's 7x7 (it has ImageNet weights), 'resnet50c' three 3x3
    (32, 32, 64), 'resnet50s' three 3x3 (64, 64, 128). `ceil_mode` lets the pooling
    keep a last odd column: 512 -> 257 instead of 256. For other images than RGB see
    `read_channels`.
    """

    def __init__(self, backbone: str = "resnet50", *, weights="none", output_stride=32,
                 ceil_mode=False):
        super().__init__()
        name, stem = split_backbone(backbone)
        check_output_stride(output_stride)
        self.in_channels = 3
        net = torchvision.models.get_model(name, weights=None)
        if stem:
            replace_stem(net, stem)
        self.loaded = load_weights(net, backbone, weights)
        split = resnet_stages if "resne" in name else shufflenet_stages
        stages, widths = split(net, output_stride)
        self.stem, self.res2, self.res3, self.res4, self.res5 = stages
        self.channels = Stages(backbone, zip(("stem", "res2", "res3", "res4", "res5"),
                                             widths))
        self.maxpool, self.output_stride = net.maxpool, output_stride
        self.maxpool.ceil_mode = ceil_mode

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stem = self.stem(images)
        res2 = self.res2(self.maxpool(stem))
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        if self.training and self.output_stride == 32:
            check_batch(res4[:, 0, ::2, ::2].numel(), self.res5)
        return {"stem": stem, "res2": res2, "res3": res3, "res4": res4,
                "res5": self.res5(res4)}


def read_channels(encoder: nn.Module, in_channels: int, *, pretrained: bool) -> None:
    """Let an encoder of RGB images read (B, in_channels, H, W): depth, more spectra.

    Its first convolution gets other weights. Without pretrained ones they are drawn
    anew. Else channels beyond three start at 0, so that at first the network says what
    it says of the first three, which should be the RGB that it knows. Of fewer than
    three each gets an equal share of the sum over RGB: of an image that is equal in all
    its channels the network says what it says of the same image in grey.
    """
    conv = next((layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)
                 and layer.in_channels == 3), None)
    if conv is None or isinstance(encoder, LabelEncoder):
        raise UserError(f"in_channels={in_channels}: this encoder has no convolution "
                        f"that reads RGB images")
    rgb = conv.weight.detach()  # (C, 3, k, k)
    conv.in_channels = encoder.in_channels = in_channels
    weight = rgb.new_zeros(len(rgb), in_channels, *conv.kernel_size)
    if in_channels > 3:
        weight[:, :3] = rgb
    else:
        weight[:] = rgb.sum(1, keepdim=True) / in_channels
    conv.weight = nn.Parameter(weight)
    if not pretrained:
        conv.reset_parameters()


class LabelEncoder(nn.Module):
    """Five 3x3 convolutions over the one-hot *ground truth*, --backbone labels.

    An upper bound: with nothing left to recognise, what is still wrong is what the
    decoder cannot draw from a coarse map. (B, K, H, W) -> {"res5": (B, 512, H/32,
    W/32)}; at output stride 16 the last has stride 1. There is no finer stage, which
    would give the answer away. What feeds it: `data.network_input`.
    """

    def __init__(self, num_classes: int, *, output_stride=32):
        super().__init__()
        if output_stride not in (16, 32):
            raise UserError(f"output_stride {output_stride!r}: for {LABELS}, 32 or 16")
        widths = (num_classes, 32, 64, 128, 256, 512)
        strides = (2, 2, 2, 2, output_stride // 16)
        self.in_channels, self.output_stride = num_classes, output_stride
        self.channels = Stages(LABELS, res5=512)
        self.loaded = "reads the ground truth"
        self.layers = nn.Sequential(*(conv_bn_relu(i, o, stride=s) for i, o, s in
                                      zip(widths, widths[1:], strides)))

    def forward(self, labels: Tensor) -> dict[str, Tensor]:
        return {"res5": self.layers(labels)}


class Stages(dict):
    """Channels of an encoder's stages; one that asks for another stage is told why."""

    def __init__(self, backbone: str, *args, **channels):
        super().__init__(*args, **channels)
        self.backbone = backbone

    def __missing__(self, stage: str):
        known = ", ".join(self)
        raise UserError(f"--backbone {self.backbone} has no {stage}, only {known}: "
                        f"choose a variant whose decoder reads {known} alone")


def make_encoder(backbone: str, num_classes: int, *, weights="none", output_stride=32,
                 ceil_mode=False) -> nn.Module:
    """Any encoder by its name: torchvision's, a paper's, or LabelEncoder.

    num_classes counts for the last alone, ceil_mode for the first (see Encoder).
    """
    if backbone == LABELS:
        return LabelEncoder(num_classes, output_stride=output_stride)
    known = encoders()
    if backbone not in known:
        return Encoder(backbone, weights=weights, output_stride=output_stride,
                       ceil_mode=ceil_mode)
    check_output_stride(output_stride)
    if weights == "imagenet":
        raise UserError(f"ImageNet weights of {backbone} are not at hand: pass "
                        f"--weights none, or a file with the names of its tensors")
    encoder = known[backbone](output_stride=output_stride)
    encoder.loaded = load_weights(encoder, backbone, weights)
    return encoder


def check_output_stride(output_stride: int) -> None:
    if output_stride not in (8, 16, 32):
        raise UserError(f"output_stride {output_stride!r}: must be 32, 16 or 8")


# --- Context modules and the auxiliary head ------------------------------------------


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (arXiv:1706.05587, Sec. 3.3): five views of a map.

    1x1, three dilated 3x3 and the global average, each to `channels`; concatenated and
    projected back to `channels` by a `projection` x `projection` convolution: 1x1 in
    that paper, 3x3 in mmsegmentation. `separable` splits the dilated 3x3 into depthwise
    and pointwise. Without `image_level` the global average is left out.
    """

    def __init__(self, in_channels: int, channels: int, *, rates=(3, 6, 9),
                 separable=True, projection=3, image_level=True):
        super().__init__()
        atrous = separable_conv if separable else conv_bn_relu
        self.pool = None
        if image_level:
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1),
                                      *conv_bn_relu(in_channels, channels, 1))
        self.branches = nn.ModuleList([conv_bn_relu(in_channels, channels, 1)])
        self.branches += [atrous(in_channels, channels, dilation=r) for r in rates]
        views = len(self.branches) + image_level
        self.project = conv_bn_relu(channels * views, channels, projection)

    # task: minutes=15 points=5 section='arXiv:1706.05587, Sec. 3.3'
    def forward(self, x: Tensor) -> Tensor:
        views = []
        if self.pool is not None:
            if self.training:
                check_batch(len(x), self.pool)
            pooled = self.pool(x)  # one vector, for every position
            views.append(pooled.expand(-1, -1, *x.shape[-2:]))
        views += [branch(x) for branch in self.branches]
        return self.project(torch.cat(views, dim=1))


class FCNHead(nn.Module):
    """The auxiliary classifier on res4 that helps early layers learn; gone in eval."""

    def __init__(self, in_channels: int, num_classes: int, *, channels=256,
                 dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(*conv_bn_relu(in_channels, channels),
                                    nn.Dropout2d(dropout),
                                    nn.Conv2d(channels, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def fcn_heads(encoder: nn.Module, num_classes: int, wanted: bool) -> nn.ModuleList:
    """The auxiliary head on res4 if it is wanted and there is a res4, as a list."""
    if not wanted or "res4" not in encoder.channels:
        return nn.ModuleList()
    return nn.ModuleList([FCNHead(encoder.channels["res4"], num_classes)])


# --- Losses --------------------------------------------------------------------------


def pixel_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every pixel (0 where ignored), `widened`, and the valid mask."""
    loss = F.cross_entropy(widened(logits), labels.long(), ignore_index=IGNORE_INDEX,
                           reduction="none")
    return loss, labels != IGNORE_INDEX


# task: minutes=15 points=6 section='arXiv:1903.02120, Eq. (1)'
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over valid pixels; exactly 0 with zero gradient if none is.

    logits (B, K, H, W), labels (B, H, W). mmsegmentation divides by *all* pixels, so
    its learning rates were tuned with a smaller loss on images with much void.
    """
    loss, valid = pixel_losses(logits, labels)
    return loss.sum() / valid.sum().clamp(min=1)


# task: minutes=40 points=10 section='arXiv:2002.10120, Sec. 3.3'
def ohem_cross_entropy(logits: Tensor, labels: Tensor, *, share: float,
                       threshold=0.0) -> Tensor:
    """Online hard example mining: the mean over the pixels that are still hard.

    Of each image, the `share` of the valid pixels with the largest loss is kept, and
    every pixel whose true class has a probability below `threshold`. Image by image,
    so that without a threshold nothing depends on how a batch is divided among
    processes. With one, the share that is kept differs from image to image, and the
    mean of a part's pixels is weighted as if all parts had kept equally many.
    """
    losses, valid = pixel_losses(logits, labels)
    kept = []
    for loss, mask in zip(losses, valid):
        loss = loss[mask]
        if loss.numel():
            count = math.ceil(share * loss.numel())
            if threshold:
                hard = (loss > -math.log(threshold)).sum().item()
                count = max(count, hard)
            kept.append(loss.topk(count).values)
    return torch.cat(kept).mean() if kept else (logits * 0.0).sum()


def segmentation_loss(outputs: dict, labels: Tensor, *, aux_weight=0.4, ohem=0.0,
                      ohem_threshold=0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Main loss plus `aux_weight` times each auxiliary one; also each term by name.

    `ohem` is the share of hard pixels that counts (see ohem_cross_entropy), 0: all.

    Auxiliary logits may be coarser than the labels: they are enlarged, since labels
    have no meaningful smaller version.
    """
    criterion = cross_entropy if not ohem else partial(
        ohem_cross_entropy, share=ohem, threshold=ohem_threshold)
    terms = {"out": criterion(outputs["out"], labels)}
    for i, logits in enumerate(outputs["aux"]):
        logits = F.interpolate(widened(logits), labels.shape[-2:], mode="bilinear",
                               align_corners=False)
        terms[f"aux{i}"] = criterion(logits, labels)
    weights = {name: 1.0 if name == "out" else aux_weight for name in terms}
    total = sum(weights[name] * term for name, term in terms.items())
    return total, {name: term.detach() for name, term in terms.items()}


# --- Metrics -------------------------------------------------------------------------


# task: minutes=10 points=6 section='arXiv:1411.4038, Sec. 5'
def ious(counts: Tensor) -> Tensor:
    """IoU per class of one or many confusion matrices: (.., K, K) -> (.., K) float64.

    Rows are truth, columns predictions. NaN where the class occurs in neither.
    """
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


class ConfusionMatrix:
    """counts[truth, prediction] in int64 over every valid pixel of a data set.

    IoU of class c = counts[c, c] / (row c + column c - counts[c, c]). A class that is
    neither in the truth nor predicted has no IoU: NaN, listed, not averaged. A class
    that is predicted but absent from the truth has IoU 0 and *is* averaged.
    """

    def __init__(self, num_classes: int):
        self.num_classes, self.images = num_classes, 0
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    # task: minutes=25 points=8 section='arXiv:1411.4038, Sec. 5'
    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Add one image: two integer maps of equal shape (H, W)."""
        K = self.num_classes
        valid = labels != IGNORE_INDEX
        truth, guess = labels[valid].long().cpu(), predictions[valid].long().cpu()
        for ids in (truth, guess):
            if ids.numel() and not 0 <= ids.min() <= ids.max() < K:
                raise ValueError(f"labels and predictions must be 0..{K - 1} or 255, "
                                 f"got {ids.min().item()} to {ids.max().item()}")
        self.counts += torch.bincount(truth * K + guess, minlength=K * K).reshape(K, K)
        self.images += 1

    def iou(self) -> Tensor:
        """IoU per class, (K,) float64, NaN where the class never occurs."""
        return ious(self.counts)

    def miou(self, *, absent=math.nan) -> float:
        """Mean IoU over the classes that occur; an error if no pixel was valid.

        absent=0 counts the others, as PyTorch-Encoding's evaluator does.
        """
        if self.counts.sum() == 0:
            raise UserError("no valid pixel was scored: are all labels 255?")
        return self.iou().nan_to_num(absent).nanmean().item()

    def accuracy(self) -> Tensor:
        """Share of each true class' pixels that is found, (K,), NaN where it is not."""
        return self.counts.diag().double() / self.counts.sum(1)

    def mean_accuracy(self) -> float:
        return self.accuracy().nanmean().item()

    def pixel_accuracy(self) -> float:
        return (self.counts.diag().sum() / self.counts.sum()).item()

    def summary(self, *, protocol: str, expected_images: int, name="mIoU",
                miou: float | None = None) -> str:
        """The number together with what it means; never print one without the other."""
        if self.images != expected_images:
            raise RuntimeError(f"scored {self.images} of {expected_images} images")
        present = int((~self.iou().isnan()).sum())
        miou = self.miou() if miou is None else miou
        return (f"{name} {miou:.4f}  mean accuracy {self.mean_accuracy():.4f}  "
                f"pixel accuracy {self.pixel_accuracy():.4f}  "
                f"({present} of {self.num_classes} classes present, {protocol}, "
                f"{self.images}/{expected_images} images)")


# --- Methods by name -----------------------------------------------------------------

FOLDER = Path(__file__).parent  # where the paper modules are


def methods() -> list[str]:
    """Every paper module: a file beside this one with VARIANTS and `build`."""
    texts = {path.stem: path.read_text(encoding="utf-8")
             for path in FOLDER.glob("*.py")}
    return sorted(name for name, text in texts.items()
                  if "\nVARIANTS" in text and "\ndef build(" in text)


def load_method(spec: str) -> tuple[object, dict]:
    """'METHOD:VARIANT' -> (the module, the options of that row of its tables)."""
    name, _, variant = spec.partition(":")
    if name not in methods():
        if (FOLDER / f"{name}.py").is_file():
            raise UserError(f"{name}.py is no method yet: a method has VARIANTS = "
                            f"{{'default': {{}}}} and a function build; see "
                            f"build_model in common.py")
        raise UserError(f"unknown method {name!r}{did_you_mean(name, methods())}; "
                        f"known: {', '.join(methods())}")
    module = importlib.import_module(name)
    lost = {"backbone", "weights"} - set(inspect.signature(module.build).parameters)
    if "default" not in module.VARIANTS or lost:
        raise UserError(f"{name}.py: VARIANTS needs an entry 'default', and build the "
                        f"arguments (num_classes, *, backbone, weights, ..)")
    if (variant or "default") not in module.VARIANTS:
        raise UserError(f"{name} has no variant {variant!r}"
                        f"{did_you_mean(variant, module.VARIANTS)}; it has: "
                        f"{', '.join(module.VARIANTS)}")
    return module, dict(module.VARIANTS[variant or "default"])


def did_you_mean(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def method_options(spec: str) -> dict:
    """All options that `--set` may change for this method, with their defaults."""
    module, variant = load_method(spec)
    fixed = ("num_classes", "backbone", "weights")
    parameters = inspect.signature(module.build).parameters
    defaults = {key: p.default for key, p in parameters.items() if key not in fixed}
    for key in variant:
        if key not in defaults:
            raise UserError(f"{spec}: {module.__name__}.build has no option "
                            f"{key!r}{did_you_mean(key, defaults)}")
    return defaults | variant


def check_option(spec: str, key: str) -> None:
    """A sentence with the right names if the method has no such option."""
    known = method_options(spec)
    if key not in known:
        raise UserError(f"{spec} has no option {key!r}{did_you_mean(key, known)}; it "
                        f"has: {', '.join(f'{k}={v!r}' for k, v in known.items())}")


def check_count(key: str, value, default) -> None:
    """UserError if an option that counts something, as channels, is below one.

    torch builds a layer of zero channels without a word. An option counts if its
    default is a whole number, or None; if that is 0 or less, it may be as low.
    """
    if type(value) is int and (default is None or type(default) is int):
        least = 1 if default is None else min(default, 1)
        if value < least:
            raise UserError(f"{key}={value}: must be at least {least}")


def build_model(spec: str, num_classes: int, *, backbone="resnet50", weights="none",
                in_channels=3, **options) -> nn.Module:
    """Build 'module:variant'. `options` go on top of the variant's own.

    With `in_channels` it reads other images than RGB, see `read_channels`; the programs
    know RGB images only. A wrong name or value is a UserError.

    This is the contract of a method, the whole of what a file beside this one must
    offer to be trained, scored and counted by the programs:

        VARIANTS          {name: options of build}, with "default"
        build(num_classes, *, backbone, weights, **options) -> nn.Module
        model(images (B, 3, H, W)) -> {"out": logits (B, K, H, W), "aux": [logits, ..]}
                          any H, W >= 32, any B >= 1 in eval; aux in training only;
                          logits are `widened` before they are enlarged

    What it may offer, and what stands in where it is missing:

        model.decode(images) -> native, aux    `forward` in two steps, so that a large
        model.to_pixels(native, (H, W), rows)  image is enlarged by strips of rows, with
                          rows = (lo, hi); else `forward` makes whole logits: more
                          memory, the same numbers
        model.encoder, .context, .decoder, .aux_heads
                          parts for cost and learning rates; else it is one part
        RECIPES           {data set: {name: (value, source)}}; else train.py's own.
                          "DATASET:BACKBONE" is a key, too, and "finetuned DATASET" for
                          runs that begin with the weights of another
        FROM_SCRATCH      options of build in train.py's own recipes; else none. They,
                          and `channels` of those recipes, go above a variant's own
        ENCODERS          {name: function of output_stride}: more names for --backbone,
                          with every method; see `encoders`
        prepare(model, label_maps, progress) -> line for the log, before step one;
                          while it works, progress(step, steps, images done)
        pretrain_loss(model, images, labels) -> loss of the first --pretrain steps
        explain(model, image, *, palette, classes) -> figure; else nothing to explain
        results/published.csv: rows that `evaluate.py cost` compares with

    `cost` and `table` build on torch's meta device, where no tensor has a number: no
    .item(). In `export` H and W may be symbols: (H + 3) // 4, not math.ceil(H / 4).
    Whether a model keeps the contract is tried at once, with one small image.
    """
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise UserError(f"num_classes={num_classes}: class ids are bytes and "
                        f"{IGNORE_INDEX} is no class, so 1 to {IGNORE_INDEX}")
    if in_channels not in range(1, 2**16):
        raise UserError(f"in_channels={in_channels!r}: must be a number above 0")
    method_options(spec)  # an error if VARIANTS names an option that build lacks
    module, variant = load_method(spec)
    for key, value in options.items():
        check_option(spec, key)
        check_count(key, value, inspect.signature(module.build).parameters[key].default)
    model = module.build(num_classes, backbone=backbone, weights=weights,
                         **(variant | options))
    model.num_classes = num_classes
    if in_channels != 3:
        read_channels(getattr(model, "encoder", model), in_channels,
                      pretrained=weights != "none")
    fault = broken_contract(model)
    if fault:
        raise UserError(f"{spec}: {fault}; see build_model in common.py")
    return model


@torch.no_grad()
def broken_contract(model: nn.Module) -> str:
    """What a new model does otherwise than build_model says; "" if nothing.

    The image has an odd size: there a wrong enlargement shows.
    """
    size, K, parameter = (33, 65), model.num_classes, next(model.parameters())
    if parameter.is_meta:  # it has no numbers, and is built to be counted
        return ""
    shape = 1, input_channels(model), *size
    images = torch.linspace(-2, 2, math.prod(shape), device=parameter.device)
    images, was_training = images.reshape(shape), model.training
    try:
        outputs = model.eval()(images)
    except Exception as error:
        error.add_note(f"(raised for a trial image of {size[0]}x{size[1]} pixels: any "
                       f"size from 32 on must do)")
        raise
    if not isinstance(outputs, dict) or set(outputs) != {"out", "aux"}:
        return 'forward must give {"out": logits, "aux": [..]}'
    if outputs["out"].shape != (1, K, *size) or outputs["aux"]:
        return (f"in eval, for {size[0]}x{size[1]} pixels, out must be {(1, K, *size)} "
                f"and aux empty; they are {tuple(outputs['out'].shape)} and "
                f"{len(outputs['aux'])} maps")
    two_steps = [hasattr(model, name) for name in ("decode", "to_pixels")]
    if sum(two_steps) == 1:
        return "decode and to_pixels belong together, one of them is missing"
    if all(two_steps):
        native, _ = model.decode(images)
        for rows in (None, (9, 20)):
            part = model.to_pixels(native, size, rows)
            whole = outputs["out"][:, :, slice(*rows) if rows else slice(None)]
            if part.shape != whole.shape or (
                    (part - whole).abs().max() > 1e-3 * whole.abs().max()):
                return (f"to_pixels(native, {size}, rows={rows}) is not what forward "
                        f"gives; forward must be decode, then to_pixels")
    model.train(was_training)
    return ""


def input_channels(model: nn.Module) -> int:
    """Channels of the images, mostly 3; for an upper bound, the number of classes."""
    readers = [part for part in model.modules() if isinstance(part, LabelEncoder)]
    first = readers[0] if readers else getattr(model, "encoder", model)
    return getattr(first, "in_channels", 3)


# =====================================================================================
# A reader of the papers may stop here. What follows is for pictures and programs.
# =====================================================================================

# --- Pictures of tensors -------------------------------------------------------------


def viewable(x: Tensor) -> Tensor:
    """(3, h, w) of any range to (h, w, 3) in 0..1."""
    low, high = x.amin(), x.amax()
    return ((x - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0)


def label_colours(palette, num_classes: int) -> Tensor:
    """RGB per class (K, 3), made up if the data set gives none."""
    return torch.tensor(made_up_colours(num_classes) if palette is None else palette)


def made_up_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that can be told apart: hues far from each other, light and dark in turn.

    The golden ratio puts each hue into the widest gap that those before have left.
    """
    colours = []
    for i in range(count):
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.5)[i // 2 % 2],
                                  (0.95, 0.6)[i % 2])
        colours.append(tuple(round(255 * x) for x in rgb))
    return colours


WIDTH = 14  # inches of a figure of `explain`; at 900 pixels, 12 points are 8 points
TEXT = 12  # points, of captions and legends
TITLE = 13


def describe(axis, title: str, caption: str = "", *, chars=40, unit="") -> None:
    """A bold title above an axis; below it the unit of x and a sentence of caption."""
    axis.set_title(title, fontsize=TITLE, fontweight="bold", loc="left")
    below = [unit] * bool(unit) + textwrap.wrap(caption, chars)
    axis.set_xlabel("\n".join(below), fontsize=TEXT, loc="left", ma="left")
    axis.tick_params(labelsize=TEXT)


def panel(axis, picture: Tensor, title: str, caption: str = "", *, chars=40, **options):
    """One tensor (h, w) or (h, w, 3) as a picture with its title and its caption."""
    drawn = axis.imshow(picture.numpy(), interpolation="nearest", **options)
    axis.set(xticks=[], yticks=[], anchor="N")  # neighbours begin at one height
    axis.spines[:].set_visible(False)
    describe(axis, title, caption, chars=chars)
    return drawn


def mosaic(maps: Tensor, columns: int) -> Tensor:
    """Small maps (C, h, w) in rows of `columns`, one position of NaN between them."""
    C, h, w = maps.shape
    rows = math.ceil(C / columns)
    tiles = maps.new_full((rows * columns, h + 1, w + 1), math.nan)
    tiles[:C, 1:, 1:] = maps
    tiles = tiles.unflatten(0, (rows, columns)).transpose(1, 2)
    return tiles.reshape(rows * (h + 1), columns * (w + 1))[1:, 1:]


def colour_bar(drawn, unit: str, caption: str = "", *, chars=40) -> None:
    """What the shades of a picture mean, in numbers, and the caption, below it."""
    axis = drawn.axes
    bar = axis.figure.colorbar(drawn, ax=axis, location="bottom", pad=0.03, aspect=40,
                               fraction=0.06, panchor=False)
    text = "\n".join([unit, *textwrap.wrap(caption, chars)])
    bar.set_label(text, fontsize=TEXT, loc="left", ma="left")
    bar.ax.tick_params(labelsize=TEXT)
    bar.ax.locator_params(nbins=5)


def heading(figure, text: str) -> None:
    """The sentence that a figure is about, in a strip of its own."""
    figure.text(0.01, 0.5, text, fontsize=TITLE + 2, fontweight="bold", va="center")


def footnote(figure, text: str, *, chars=150) -> None:
    """A sentence below all pictures of a figure or of a part of it."""
    figure.supxlabel("\n".join(textwrap.wrap(text, chars)), fontsize=TEXT, x=0.01,
                     ha="left")


def class_patches(labels: Tensor, colours: Tensor, classes=None) -> list:
    """For a legend: the colour and the name of every class that occurs in `labels`."""
    from matplotlib.patches import Patch
    return [Patch(color=(colours[k] / 255).tolist(),
                  label=classes[k] if classes else f"class {k}")
            for k in labels.unique().tolist() if k < len(colours)]


def class_legend(figure, labels: Tensor, colours: Tensor, classes=None) -> None:
    """The classes that occur in `labels`, side by side."""
    patches = class_patches(labels, colours, classes)
    figure.legend(handles=patches, loc="center", ncols=min(len(patches), 11),
                  fontsize=TEXT, frameon=False, handlelength=1, columnspacing=1.2)


def placed_panel(figure, *, left: float, top: float, height: float, width: float,
                 title="", caption="", weight="normal", below=0.1):
    """An axis of that place and size in inches; its caption, in lines of its width."""
    w, h = figure.get_size_inches()
    axis = figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    axis.set_title(title, loc="left", fontsize=TITLE, fontweight=weight, pad=6)
    letters = int(10.7 * width)  # of a line
    figure.text(left / w, 1 - (top + height + below) / h,
                textwrap.fill(caption, letters), fontsize=TEXT, va="top",
                linespacing=1.2)
    return axis


def mark(axis, row: float, column: float, side: float, letter: str) -> None:
    """A white frame around the square that starts at (row, column), and its letter."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    # -0.5: for matplotlib pixel 0 runs from -0.5 to 0.5
    dark = [withStroke(linewidth=4, foreground="black")]
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), side, side, fill=False,
                             edgecolor="white", linewidth=2, path_effects=dark))
    style = {"color": "white", "fontsize": TITLE, "fontweight": "bold",
             "path_effects": dark}
    low, high = axis.get_xlim()
    if side * 14 > high - low:
        axis.text(column + 0.08 * side, row + 0.05 * side, letter, va="top", **style)
    elif column < 0.9 * high:  # no room for it inside
        axis.text(column + 1.3 * side, row + side / 2, letter, va="center", **style)
    else:
        axis.text(column - 0.3 * side, row + side / 2, letter, va="center", ha="right",
                  **style)


def farthest_points(x: Tensor, count: int, first: int) -> list[int]:
    """Rows of x (N, D) that differ: each is the farthest from those chosen before."""
    chosen = [first]
    while len(chosen) < min(count, len(x)):
        distance = torch.cdist(x, x[chosen]).amin(1)
        distance[chosen] = -1  # never twice, even if all rows are alike
        chosen.append(int(distance.argmax()))
    return chosen


def synthetic_scene(H: int, W: int) -> Tensor:
    """(1, 3, H, W): sky, road, a house, a pole and a sun, for a module's own demo.

    Values are about those of a normalised image. No data set is needed for it.
    """
    y = torch.arange(H)[:, None] / H
    x = torch.arange(W)[None] / W
    here = (y + x) * 0 == 0  # everywhere
    shapes = (((-0.5, 0.3, 1.2), here),  # sky
              ((-0.9, -0.9, -0.8), (y > 0.62) & here),  # road
              ((0.9, -0.4, -0.7), (y > 0.3) & (y < 0.68) & (x > 0.1) & (x < 0.38)),
              ((-1.2, 0.6, -1.1), (y > 0.2) & (y < 0.8) & (x > 0.57) & (x < 0.61)),
              ((1.6, 1.5, -0.2), (y - 0.3)**2 + (W / H * (x - 0.8))**2 < 0.03))
    image = torch.zeros(1, 3, H, W)
    for colour, where in shapes:
        image[0, :, where] = torch.tensor(colour)[:, None]
    return image


# --- Cost ----------------------------------------------------------------------------

PARTS = ("encoder", "context", "decoder", "aux_heads")


def published(method: str) -> list[dict[str, str]]:
    """The rows of results/published.csv, one per number, for a method's variants."""
    path = FOLDER / "results" / "published.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file)
                if row["method"].partition(":")[0] == method]
    for row in rows:
        if None in row.values() or None in row:
            raise UserError(f"{path}: a line of {row['method']} has too few columns, "
                            f"or too many")
    return rows


def shapes_only(spec: str, num_classes: int, size: tuple[int, int], *,
                backbone="resnet50", **options) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and an image on torch's meta device: no memory needed."""
    with torch.device("meta"):
        try:
            model = build_model(spec, num_classes, backbone=backbone, **options).eval()
        except MISFITS as error:
            raise UserError(f"{spec} cannot be built, on torch's meta device "
                            f"({first_line(error)}); see build_model in "
                            f"common.py") from error
        return model, torch.empty(1, input_channels(model), *size)


def count_cost(model: nn.Module, images: Tensor, *,
               divisions=False) -> dict[str, dict[str, float]]:
    """Parameters (millions) and multiply-adds (GMACs) of each part, and in total.

    The papers' "GFLOPs" are multiply-adds, too. Counted by torch's own counter, which
    does not see batch norm, ReLU, pooling and interpolation, under 0.5 % here; nor
    `divisions`, unless asked to. What belongs to no other part is the decoder's.
    """
    per_element = lambda *_, out_shape, **__: 2 * math.prod(out_shape)
    more = {torch.ops.aten.div: per_element} if divisions else {}
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with counter, torch.no_grad():
        model(images)
    counts, root = counter.get_flop_counts(), type(model).__name__
    products = lambda name: sum(counts.get(name, {}).values()) / 2e9
    size = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    total = {"params": size(model), "gmacs": products("Global")}
    if not all(hasattr(model, part) for part in PARTS):
        return {"model": total, "total": total}
    cost = {part: {"params": size(getattr(model, part)),
                   "gmacs": products(f"{root}.{part}")}
            for part in PARTS if part != "decoder"}
    rest = {key: total[key] - sum(part[key] for part in cost.values()) for key in total}
    return {part: cost.get(part, rest) for part in PARTS} | {"total": total}


# --- Checkpoints ---------------------------------------------------------------------

FORMAT = 3  # 2 had no log in it


class Damaged(UserError):
    """A checkpoint that is not there, or not as it was written."""


def checkpoint_file(path: str | Path) -> Path:
    """A run folder stands for its last.pt; best.pt is to be named."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if path.suffix in (".pt2", ".onnx"):
        raise UserError(f"{path} is an exported network, which only `evaluate.py "
                        f"predict` reads (.pt2); give a run or a .pt file of it")
    if not path.is_file():
        raise Damaged(f"no checkpoint {path}; give a run folder or a .pt file of it")
    return path


def load_file(path: Path) -> dict:
    """The dict in a file of torch.save. Only data is read: no code in it is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise Damaged(f"{path} is damaged, or not a file of torch.save "
                      f"({first_line(error)})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


def fits_its_checksums(path: Path) -> bool:
    """Is it as it was written? torch.load reads a flipped bit without a word."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # half a dozen kinds for damage outside the weights
        return False


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content, verified; a run folder stands for its last.pt."""
    path = checkpoint_file(path)
    checkpoint = load_file(path)
    if not fits_its_checksums(path):
        raise Damaged(f"{path} is damaged (what is in it does not fit its checksums)")
    if "format" not in checkpoint:
        raise Damaged(f"{path} is not a checkpoint of this train.py")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']}, this library reads "
                        f"format {FORMAT}; use the version that wrote it")
    fault = wrong_field(checkpoint)
    if fault:
        raise Damaged(f"{path} was not written by train.py: {fault}")
    return checkpoint


FIELDS = {
    "method": str, "backbone": str, "dataset": str, "train_split": str, "amp": str,
    "options": dict, "recipe": dict, "args": dict, "environment": dict, "model": dict,
    "optimizer": dict, "scaler": dict, "classes": list, "palette": list, "mean": list,
    "std": list, "log": list, "iteration": int, "steps": int, "evaluated": int,
    "train_images": int, "seed": int, "bad_steps": int, "difficulty": float,
    "miou": float, "best_miou": float}


def wrong_field(checkpoint: dict) -> str:
    """What is missing in a checkpoint, or not of its kind; "" if nothing."""
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            return f"{name} is {checkpoint.get(name)!r:.60}, expected a {kind.__name__}"
    names = [name for name in checkpoint["classes"] if isinstance(name, str)]
    palette = checkpoint["palette"]
    legal = [c for colour in palette for c in colour if c in range(256)]
    if not len(names) == len(checkpoint["classes"]) == len(palette) == len(legal) / 3:
        return "each class needs a name and a colour, of 3 numbers in 0..255"
    if not len(checkpoint["mean"]) == len(checkpoint["std"]) == 3 or not all(
            isinstance(x, float) and x > 0 for x in checkpoint["std"]):
        return "mean and std must be three numbers each, std above 0"
    tensors = checkpoint["model"].values()
    if not all(isinstance(x, Tensor) and x.isfinite().all() for x in tensors):
        return "its weights are not tensors of finite numbers"
    return ""


def save_checkpoint(state: dict, path: Path, *, keep: Path | None = None) -> None:
    """Write beside, flush, read back, rename: `path` is the old or the new, never half.

    Killed at any moment it leaves a whole one, if only in `keep`: between two renames.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            reach_disk(file.fileno())
        load_checkpoint(temporary)  # what the disk has, not what was meant
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError, UserError) as error:  # torch's zip writer: Runtime..
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({first_line(error)}); "
            f"{free_on_disk(path) / 1e9:.2f} GB are free; the older checkpoint is "
            f"untouched", code=4) from None
    with suppress(OSError):  # Windows and some network drives cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            reach_disk(folder)  # the names, too, survive a power cut
        finally:
            os.close(folder)


def reach_disk(file: int) -> None:
    """fsync, where the file system has it; some network drives do not."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def make_folder(folder: str | Path) -> Path:
    """A folder that one can write to, before the work that is to be stored there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({error}); give another "
                        f"--out") from None
    return Path(folder)


def free_on_disk(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def restore(checkpoint: dict, device="cpu") -> nn.Module:
    """The trained model, in eval mode; strict: every tensor must fit."""
    model = build_model(checkpoint["method"], len(checkpoint["classes"]),
                        backbone=checkpoint["backbone"], **checkpoint["options"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:  # torch lists what does not fit, a line each
        raise UserError(f"the checkpoint's weights do not fit {checkpoint['method']} "
                        f"as it is here: {' '.join(str(error).split()):.300}") from None
    return model.to(device, memory_format=torch.channels_last).eval()


# --- Processes, machines, errors -----------------------------------------------------

# How long a process waits for one that is stuck. One that dies is noticed at once.
PATIENCE = timedelta(minutes=10)


def usable(device: str) -> str:
    """The device as it was named, if this machine can compute on it."""
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        raise UserError(f"--device {device}: {first_line(error):.200}") from None
    if ":" in device and device.startswith("cuda"):
        torch.cuda.set_device(device)  # else NCCL and the loader take the first GPU
    return device


def join_processes(device: str) -> str:
    """Under torchrun: meet the other processes; the device that is this one's."""
    if "WORLD_SIZE" not in os.environ:
        return usable(device)
    told = " ".join(f"{name}={os.environ.get(name, '?')}" for name in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    try:
        rank, local, world = (int(os.environ[name]) for name in (
            "RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if not rank < world:  # torch would wait for the others
            raise ValueError(f"there is no process {rank} of {world}")
        device = usable(f"cuda:{local}" if device == "cuda" else device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=PATIENCE)
    except (RuntimeError, ValueError, KeyError) as error:  # the last: not set
        raise UserError(
            f"the processes of this run did not meet ({told}: "
            f"{first_line(error):.200}); did torchrun start them all, and is "
            f"the port free? For one process alone, unset WORLD_SIZE", code=1) from None
    return device


def told_rank() -> int:
    """The rank that torchrun has given this process, also before they have met."""
    rank = os.environ.get("RANK", "")
    return int(rank) if "WORLD_SIZE" in os.environ and rank.isdigit() else 0


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def progress(done: int, total: int, title="") -> None:
    """A counter that moves on the spot; in a file it would be one endless line."""
    if rank_and_world()[0] == 0 and sys.stderr and sys.stderr.isatty():
        print(f"\r{title} {done}/{total} ", end="", file=sys.stderr)


def autocast(device, amp: str):
    """--amp bf16, fp16: products and convolutions in 16 bits; weights stay float32.

    What 16 bits would spoil leaves by itself (`full_precision`, and every loss): each
    place says why.
    """
    kind = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, kind, enabled=amp != "off")


def out_of_memory(error: Exception) -> bool:
    said = str(error).lower()  # a GPU's is a RuntimeError: "CUDA out of memory. Tried"
    return (isinstance(error, MemoryError) or "allocate memory" in said
            or "out of memory" in said)


def peak_memory(device) -> float:
    """Peak memory in GB (10^9 bytes): of the GPU if there is one, else of this process.

    NaN on Windows, which has no such count in Python's library.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # it counts bytes, Linux KiB
        return peak / 1e9
    # On Linux that is at least what the program had which started this one. VmHWM is
    # of this one alone.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (own or [peak])[0] * 1024 / 1e9


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError: one sentence, as every other."""

    def __init__(self, **options):
        super().__init__(**options)
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                          help="show tracebacks")  # see show_errors

    def error(self, message: str):
        raise UserError(f"{message}; --help lists all options")


ABOVE_ZERO = 1e-9


def number(kind: type, least: float = 0, most: float = 2**31):
    """A type for argparse: a number from `least` to `most`."""
    def convert(text: str):
        said = "above 0" if least == ABOVE_ZERO else f"at least {least:g}"
        try:
            value = int(text) if kind in (int, bool) else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no {kind.__name__} {said}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {said} and at most {most:.10g}, "
                                             f"got {text}")
        return kind(value)
    return convert


class Sturdy:
    """stdout or stderr, which a program outlives if it is closed or its disk is full.

    What can no longer be written is lost. Control characters, which the name of a class
    in another's checkpoint may hold, and letters that the terminal does not have are
    written as \\x1b and the like.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: closed from outside

    def write(self, text: str) -> int:
        text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]",
                      lambda found: repr(found[0])[1:-1], text)
        encoding = self.stream.encoding or "utf-8"
        self.do("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self.do("flush")

    def do(self, what: str, *args) -> None:
        try:
            getattr(self.stream, what)(*args)
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # or Python would try again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, "w")

    def isatty(self) -> bool:
        return self.stream.isatty()


@contextmanager
def show_errors(argv: list[str] | None = None):
    """A program's frame: a UserError ends in its sentence and exit code, no traceback.

    So does an error of the operating system that names a file, and a full disk. --debug
    among the arguments shows the traceback.
    """
    debug = "--debug" in (sys.argv if argv is None else argv)
    with redirect_stdout(Sturdy(sys.stdout)), redirect_stderr(Sturdy(sys.stderr)):
        try:
            yield
        except BaseException as error:
            if isinstance(error, NotImplementedError) and str(error).startswith("task"):
                error = UserError(str(error))  # of an assignment, not written yet
            for each in filter(None, (error, error.__context__)):
                traceback.clear_frames(each.__traceback__)  # loader processes end here
            named = isinstance(error, OSError) and (
                error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT))
            known = named or isinstance(error, (UserError, KeyboardInterrupt))
            if debug or not known:
                raise
            # An error from a loader process arrives inside that process' traceback.
            said = str(error).rsplit("UserError: ")[-1].strip() or "interrupted"
            who = f"[process {told_rank()}] " if told_rank() else ""
            print(f"{who}error: {said}", file=sys.stderr)
            sys.exit(4 if named else getattr(error, "code", 130))
