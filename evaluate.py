"""Score a run, predict your own pictures, count the cost, make the table.

    python evaluate.py score runs/nrd-streets-s0
    python evaluate.py score RUN --scales 0.5 0.75 1.0 1.25 1.5 1.75 --flip --bands
    python evaluate.py predict runs/nrd-streets-s0/best.pt photo.jpg --out predictions
    python evaluate.py explain runs/nrd-streets-s0 --out explain.png
    python evaluate.py cost                       ours beside the published numbers
    python evaluate.py memory nrd sfnet           what one pass over an image takes
    python evaluate.py table runs/*               one line per run

Protocol of every number here: one image at a time, labels never resized, logits
bilinear to the image's own size, argmax; one int64 confusion matrix over all valid
pixels of the split; IoU per class; mean over the classes that occur. How an image
becomes logits (whole or in windows, scales, flip) is a `Protocol`, and is printed.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize

import data
from common import (IGNORE_INDEX, ConfusionMatrix, UserError, build_model, load_method,
                    methods, network_input)


@contextmanager
def show_errors(debug: bool = False):
    """User errors end in one sentence and their exit code, without a traceback."""
    try:
        yield
    except BaseException as error:
        for each in filter(None, (error, error.__context__)):
            traceback.clear_frames(each.__traceback__)  # loader processes end here
        if debug or not isinstance(error, (UserError, KeyboardInterrupt)):
            raise
        # An error from a loader process arrives inside that process' traceback.
        said = str(error).rsplit("UserError: ")[-1].strip() or "interrupted"
        rank = os.environ.get("RANK", "0")
        print(f"[process {rank}] " * (rank != "0") + f"error: {said}", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))


# --- Checkpoints ---------------------------------------------------------------------

FORMAT = 2


class Damaged(UserError):
    """A checkpoint that is not there, or not as it was written."""


def checkpoint_file(path: str | Path) -> Path:
    """A run folder stands for its best.pt."""
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise Damaged(f"no checkpoint {path}; give a run folder or a .pt file of it")
    return path


def checksum(value, digest=None) -> str:
    """SHA-256 of all that a checkpoint holds: names, numbers, the bytes of tensors.

    torch.load reads a file with a flipped bit without a word: weights are just other.
    """
    digest = digest or hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(b"{")
        for key, content in value.items():
            checksum(key, digest)
            checksum(content, digest)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for content in value:
            checksum(content, digest)
    else:
        digest.update(f"{value!r};".encode())
    return digest.hexdigest()


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content, verified; a run folder stands for its best.pt."""
    path = checkpoint_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        said = str(error).splitlines()[0] if str(error) else type(error)
        raise Damaged(f"{path} is damaged or not a checkpoint ({said})") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise Damaged(f"{path} is not a checkpoint of this train.py")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']}, this library reads "
                        f"format {FORMAT}; use the version that wrote it")
    if checkpoint.pop("sha256", None) != checksum(checkpoint):
        raise Damaged(f"{path} is damaged (its content does not fit its checksum)")
    return checkpoint


def untrained(checkpoint: dict) -> nn.Module:
    """The network of a checkpoint with fresh weights."""
    return build_model(checkpoint["method"], len(checkpoint["classes"]),
                       backbone=checkpoint["backbone"], **checkpoint["options"])


def restore(checkpoint: dict, device="cpu", *, reads_images=False) -> nn.Module:
    """The trained model, in eval mode; strict: every tensor must fit."""
    if reads_images and checkpoint["backbone"] == "labels":
        raise UserError("this run has --backbone labels: it reads the ground truth, "
                        "not pictures, and can only be scored, on whole images")
    model = untrained(checkpoint)
    model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last).eval()


def forget_tensors(checkpoint: dict) -> None:
    """Weights that the model has by now, and momentum: twice the model's memory."""
    for name in ("model", "optimizer"):
        checkpoint.pop(name, None)


# --- Prediction: one image by a protocol ---------------------------------------------

STRIP = 2**20  # floats of scores in a strip of rows of the image, decided at once
BAND = 2**27   # floats of the sum over scales and flips; beyond it, by bands of rows
WIDTHS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40)  # of bands, in pixels
CPU_PIXELS = 530_000  # in one pass: with a ResNet-50 all five stay below 2 GB


@dataclass(frozen=True)
class Protocol:
    """How an image becomes class ids; printed and stored with every number.

    scales, flip  passes of the resized and mirrored image
    fuse          mean: of the passes' softmax, as DeepLabv3+ and mmsegmentation;
                  exp: sum of exp(logits), EfficientFCN's code, trusts scales with
                  large logits more
    window        (h, w) of sliding windows over the resized image, None: all of it
    stride        from one window to the next; None: two thirds of a window
    max_pixels    leave out scales at which the image has more, 0: none
    pass_pixels   most pixels that go through the network at once, 0: any; a larger
                  image goes in windows, halved until they are small enough
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fuse: str = "mean"
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    max_pixels: int = 0
    pass_pixels: int = 0

    def __str__(self) -> str:
        said = "whole image" if not self.window else (
            "windows {}x{} every {}x{}".format(*self.window, *self.steps(self.window)))
        if self.scales == (1.0,):
            said += ", single scale"
        else:
            said += f", scales {' '.join(f'{s:g}' for s in self.scales)}"
        said += " + flip" if self.flip else ""
        if self.flip or len(self.scales) > 1:
            said += {"mean": ", mean softmax", "exp": ", sum of exp"}[self.fuse]
        return said + (f", <= {self.max_pixels} px" if self.max_pixels else "")

    def steps(self, window: tuple[int, int]) -> tuple[int, int]:
        """From one window to the next: no further than a window is long."""
        wished = self.stride or tuple(-(-2 * n // 3) for n in window)
        return tuple(min(step, n) for step, n in zip(wished, window))

    def passes(self, H: int, W: int) -> list[tuple[tuple[int, int], bool]]:
        """[(size, mirrored)] for an image of H x W pixels."""
        sizes = [(max(1, round(H * s)), max(1, round(W * s))) for s in self.scales]
        kept = [s for s in sizes if not self.max_pixels
                or s[0] * s[1] <= self.max_pixels]
        if not kept:
            raise UserError(f"--max-pixels {self.max_pixels} leaves no scale for an "
                            f"image of {H}x{W}")
        return [(s, flipped) for s in kept for flipped in (False, True)[:1 + self.flip]]


def native_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (K, q, r) of one image as the decoder leaves them, mostly at 1/4.

    This is `forward` without its last line, the enlargement to pixels: that would be
    16 times as large, and is done by strips of rows here. DUpsampling's last line is W,
    window by window: without it, what it says of each window (E, q, r).
    """
    features = model.encoder(images)
    context, decoder = model.context(features["res5"]), model.decoder
    if hasattr(decoder, "dupsample"):
        return decoder.compressed(context, features)[0]
    logits = decoder(context, features)
    return (logits if isinstance(logits, Tensor) else logits[0])[0].float()


def lerp_rows(x: Tensor, at: Tensor, first: int) -> Tensor:
    """Rows (K, n, w) at fractional positions `at`; x holds the rows from `first` on."""
    above = at.long() - first
    below = (above + 1).clamp(max=x.shape[1] - 1)
    weight = (at - at.floor()).float()[:, None].to(x.device)
    return torch.lerp(x[:, above], x[:, below], weight)


class Windows:
    """The logits of one (resized, mirrored) image by rows, from one or more windows.

    A window goes through the network when the first of its rows is asked for, and is
    forgotten when rows below it are: few are alive at a time. Where windows overlap,
    the logits are averaged. The last window of a row or column moves back inside.
    """

    def __init__(self, model: nn.Module, images: Tensor, window, steps):
        self.model, self.images, self.alive = model, images, {}
        H, W = images.shape[-2:]
        h, w = (min(n, N) for n, N in zip(window, (H, W)))
        places = lambda n, N, step: [min(i * step, N - n)
                                     for i in range(-(-(N - n) // step) + 1)]
        self.boxes = [(y, x, h, w) for y in places(h, H, steps[0])
                      for x in places(w, W, steps[1])]

    def rows(self, lo: int, hi: int) -> Tensor:
        """Logits (K, hi - lo, W) of the rows lo..hi-1."""
        self.alive = {box: x for box, x in self.alive.items() if box[0] + box[2] > lo}
        total = None
        for box in self.boxes:
            y, x, h, w = box
            top, bottom = max(lo, y), min(hi, y + h)
            if top >= bottom:
                continue
            if box not in self.alive:
                self.alive[box] = self.run(box)
            part = self.pixels(self.alive[box], box, top - y, bottom - y)
            if len(self.boxes) == 1:
                return part
            if total is None:
                total = part.new_zeros(len(part) + 1, hi - lo, self.images.shape[-1])
            view = total[:, top - lo:bottom - lo, x:x + w]
            view[:-1] += part
            view[-1] += 1  # how many windows saw a pixel
        return total[:-1] / total[-1]

    def run(self, box: tuple[int, int, int, int]) -> Tensor:
        y, x, h, w = box
        crop = self.images[..., y:y + h, x:x + w]
        if min(h, w) < 32:  # the encoder's smallest cell; repeat the border, cut later
            crop = F.pad(crop, (0, max(0, 32 - w), 0, max(0, 32 - h)), mode="replicate")
        return native_logits(self.model, crop)

    def pixels(self, native: Tensor, box, lo: int, hi: int) -> Tensor:
        """Rows lo..hi-1 of a window's logits at its own size, (K, hi - lo, w)."""
        (_, _, h, w), q = box, native.shape[1]
        stride = getattr(self.model.decoder, "stride", None)
        if stride == 1:  # no enlargement, or DUpsampling's, for all windows it touches
            if not hasattr(self.model.decoder, "dupsample"):
                return native[:, lo:hi, :w]
            r = self.model.decoder.dupsample.ratio
            cells = native[None, :, lo // r:-(-hi // r)]
            x = self.model.decoder.dupsample(cells)[0]
            return x[:, lo % r:lo % r + hi - lo, :w]
        y = torch.arange(lo, hi, dtype=torch.float64)
        # As the models' own last line: by a whole factor, or (SFNet, its note N3)
        # stretched so that the corners stay corners.
        y = (y + 0.5) / stride - 0.5 if stride else y * (q - 1) / max(max(h, 32) - 1, 1)
        y = y.clamp(0, q - 1)
        first, last = int(y[0]), min(int(y[-1]) + 2, q)
        x = lerp_rows(native[:, first:last], y, first)[None]
        if stride:
            x = F.interpolate(x, scale_factor=(1, stride), mode="bilinear")
        else:
            x = F.interpolate(x, (hi - lo, max(w, 32)), mode="bilinear",
                              align_corners=True)
        return x[0, :, :, :w]

    def resized_rows(self, lo: int, hi: int, size: tuple[int, int]) -> Tensor:
        """Rows lo..hi-1 of the logits bilinearly resized to `size` = (H, W)."""
        h, w = self.images.shape[-2:]
        if (h, w) == size:
            return self.rows(lo, hi)
        y = (torch.arange(lo, hi, dtype=torch.float64) + 0.5) * h / size[0] - 0.5
        y = y.clamp(0, h - 1)
        first, last = int(y[0]), min(int(y[-1]) + 2, h)
        x = lerp_rows(self.rows(first, last), y, first)[None]
        return F.interpolate(x, (hi - lo, size[1]), mode="bilinear")[0]


def halved(window: tuple[int, int]) -> tuple[int, int]:
    """Half the window: its longer side, to a multiple of the encoder's 32."""
    if max(window) <= 64:
        raise UserError("not even a window of 64x64 is small enough")
    h, w = window
    half = lambda n: 32 * -(-n // 64)
    return (half(h), w) if h > w else (h, half(w))


def window_for(size: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
    """The protocol's window for an image of `size`, halved while it is too large."""
    window = tuple(min(n, N) for n, N in zip(protocol.window or size, size))
    while protocol.pass_pixels and window[0] * window[1] > protocol.pass_pixels:
        window = halved(window)
    return window


def predict(model: nn.Module, images: Tensor, protocol=Protocol(),
            cut: Counter | None = None) -> Tensor:
    """Class ids (H, W) of one normalised image (1, 3, H, W), by a protocol.

    The score map (K, H, W) is never there: a single pass is enlarged and decided by
    strips of rows. Several passes need their sum, which is kept for a band of rows.
    `cut` counts the sizes that went through in smaller windows, for lack of memory.
    """
    H, W = images.shape[-2:]
    passes = len(protocol.passes(H, W))
    band = H if passes == 1 else max(1, BAND // (model.num_classes * W))
    bands = [slice(top, min(top + band, H)) for top in range(0, H, band)]
    cut = Counter() if cut is None else cut
    return torch.cat([decide(model, images, protocol, rows, cut) for rows in bands])


def decide(model: nn.Module, images: Tensor, protocol: Protocol, rows: slice,
           cut: Counter) -> Tensor:
    """Class ids of some rows, from all passes of the protocol."""
    H, W = images.shape[-2:]
    K, passes = model.num_classes, protocol.passes(H, W)
    exp, total = protocol.fuse == "exp", None
    if len(passes) > 1:
        total = images.new_full((K, rows.stop - rows.start, W), -math.inf if exp else 0)
    ids, strip = [], max(1, STRIP // (K * W))
    for size, mirrored in passes:
        view = images if size == (H, W) else resize(images, size)
        window = window_for(size, protocol)
        wished = window_for(size, replace(protocol, pass_pixels=0))
        if rows.start == 0 and window != wished:
            cut["{}x{} in windows of {}x{}".format(*size, *window)] += 1
        scores = Windows(model, view.flip(-1) if mirrored else view, window,
                         protocol.steps(window))
        for lo in range(rows.start, rows.stop, strip):
            hi = min(lo + strip, rows.stop)
            x = scores.resized_rows(lo, hi, (H, W))
            x = x.flip(-1) if mirrored else x
            if total is None:
                ids.append(x.argmax(0))
                continue
            part = total[:, lo - rows.start:hi - rows.start]
            if exp:  # the logarithm of the sum of exp: nothing overflows
                torch.logaddexp(part, x, out=part)
            else:
                part += x.softmax(0)
    ids = torch.cat(ids) if total is None else total.argmax(0)
    return ids.byte()


def out_of_memory(error: Exception) -> bool:
    said = str(error).lower()  # a GPU's is a RuntimeError: "CUDA out of memory. Tried"
    return (isinstance(error, MemoryError) or "allocate memory" in said
            or "out of memory" in said)


def predict_in_memory(model: nn.Module, images: Tensor, protocol: Protocol,
                      cut: Counter) -> Tensor:
    """predict; out of memory, again with half the window, and it is said."""
    while True:
        try:
            return predict(model, images, protocol, cut)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        H, W = images.shape[-2:]
        largest = round(H * max(protocol.scales)), round(W * max(protocol.scales))
        window = halved(protocol.window or largest)
        protocol = replace(protocol, window=window, stride=None)
        said = "{}x{} in windows of {}x{}".format(H, W, *window)
        cut[f"out of memory: {said}"] += 1
        print(f"out of memory: {said}", file=sys.stderr)


# --- Scoring -------------------------------------------------------------------------


# How long a process waits for one that is stuck. One that dies is noticed at once.
PATIENCE = timedelta(minutes=10)


def join_processes(device: str) -> str:
    """Under torchrun: meet the other processes; the device that is this one's."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=PATIENCE)
    return device


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def autocast(device, amp: str):
    """--amp bf16, fp16: products and convolutions in 16 bits; weights stay float32.

    What 16 bits would spoil leaves by itself (`full_precision` in common.py, and every
    loss): each place says why.
    """
    kind = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, kind, enabled=amp != "off")


def score_dataset(model: nn.Module, dataset, *, device, workers=0, amp="off",
                  protocol=Protocol(), extras=(), cut=None,
                  stopped=None) -> ConfusionMatrix | None:
    """Confusion matrix of the model on a whole split; train.py uses this too.

    Of several processes each scores the images rank, rank + world, ..: none twice, none
    left out, and no word between them before the sums at the end. `extras` are told
    every image, too; their `sums` are added up as the matrix is. If `stopped()` comes
    true, in any process, there is no result.
    """
    model.eval()
    rank, world = rank_and_world()
    matrix = ConfusionMatrix(len(dataset.info.classes))
    cut, cut_short = Counter() if cut is None else cut, False
    loader = data.val_loader(dataset, workers=workers, start=rank, step=world)
    with torch.inference_mode(), autocast(device, amp):
        for step, (images, labels) in enumerate(loader):
            if stopped and stopped():
                cut_short = True
                break
            inputs = network_input(model, images, labels).to(device)
            guess = predict_in_memory(model, inputs, protocol, cut).cpu()
            matrix.update(labels[0], guess)
            for extra in extras:
                extra.update(rank + step * world, labels[0], guess)
            if rank == 0 and sys.stderr.isatty():
                print(f"\r{step + 1}/{len(loader)} ", end="", file=sys.stderr)
    if world > 1:
        sums = [torch.cat([matrix.counts.flatten(),
                           torch.tensor([matrix.images, cut_short])])]
        sums = [x.to(device) for x in sums + [extra.sums for extra in extras]]
        for x in sums:
            dist.all_reduce(x)
        matrix.counts.copy_(sums[0][:-2].reshape(matrix.counts.shape))
        matrix.images, cut_short = sums[0][-2:].tolist()
        for extra, x in zip(extras, sums[1:]):
            extra.sums.copy_(x)
        cuts = [None] * world
        dist.all_gather_object(cuts, cut)
        cut.update(sum(cuts, Counter()) - cut)
    if cut_short:
        return None
    if matrix.images != len(dataset):
        raise RuntimeError(f"scored {matrix.images} of {len(dataset)} images")
    return matrix


class PerImage:
    """mIoU of every image by itself, to find the worst and the best."""

    def __init__(self, images: int, num_classes: int):
        self.num_classes = num_classes
        self.sums = torch.zeros(images, dtype=torch.float64)  # NaN: nothing to score

    def update(self, index: int, labels: Tensor, guess: Tensor) -> None:
        one = ConfusionMatrix(self.num_classes)
        one.update(labels, guess)
        self.sums[index] = one.iou().nanmean()

    def order(self) -> list[int]:
        """Indices of the images, worst first, those without valid pixels left out."""
        order = self.sums.nan_to_num(math.inf).argsort(stable=True).tolist()
        return order[:int((~self.sums.isnan()).sum())]


def dilate(mask: Tensor, radius: int) -> Tensor:
    """(H, W) bool: every pixel within `radius` rows and columns (a square) of mask."""
    x = F.max_pool2d(mask[None].half(), (2 * radius + 1, 1), 1, (radius, 0))
    return F.max_pool2d(x, (1, 2 * radius + 1), 1, (0, radius))[0] > 0


def class_boundary(labels: Tensor) -> Tensor:
    """(H, W) bool: both pixels of every 4-neighbour pair of two different classes."""
    edge, valid = torch.zeros_like(labels, dtype=bool), labels != IGNORE_INDEX
    for dim in (0, 1):
        n = labels.shape[dim] - 1
        a, b = (labels.narrow(dim, k, n) for k in (0, 1))
        differ = (a != b) & valid.narrow(dim, 0, n) & valid.narrow(dim, 1, n)
        for k in (0, 1):
            edge.narrow(dim, k, n).logical_or_(differ)
    return edge


class Bands:
    """mIoU of the pixels near boundaries, in bands of growing width.

    trimap (DeepLabv3+ Sec. 4.4): within w pixels of "void", which in PASCAL VOC is a
    strip along every object. Elsewhere void is the ego-vehicle and the like, so there
    the bands are those within w pixels of a class boundary, and have another name.
    "Within" is a square: the papers do not give the shape. Void is never scored.
    """

    def __init__(self, num_classes: int, *, trimap: bool, widths=WIDTHS):
        self.trimap, self.widths = trimap, widths
        self.name = "trimap mIoU" if trimap else "class-boundary mIoU"
        self.near = "void" if trimap else "a class boundary"
        # [0] counts images without any band, [i + 1] pixels that enter at widths[i]
        self.sums = torch.zeros(len(widths) + 1, num_classes, num_classes,
                                dtype=torch.int64)

    def update(self, index: int, labels: Tensor, guess: Tensor) -> None:
        seeds = labels == IGNORE_INDEX if self.trimap else class_boundary(labels)
        if not seeds.any():
            self.sums[0, 0, 0] += 1
            return
        K, done, reach = self.sums.shape[1], labels == IGNORE_INDEX, 0
        for i, width in enumerate(self.widths):
            seeds, reach = dilate(seeds, width - reach), width
            new = seeds & ~done
            done |= new
            pairs = labels[new].long() * K + guess[new].long()
            self.sums[i + 1] += torch.bincount(pairs, minlength=K * K).reshape(K, K)

    def results(self) -> list[tuple[int, float, int]]:
        """[(width, mIoU, pixels)]; a band is all that entered at its width or below."""
        rows = []
        for width, counts in zip(self.widths, self.sums[1:].cumsum(0)):
            matrix = ConfusionMatrix(len(counts))
            matrix.counts = counts
            rows.append((width, matrix.iou().nanmean().item(), int(counts.sum())))
        return rows


def outline(mask: Tensor) -> Tensor:
    """Boundary pixels of a binary mask as DAVIS has them: unlike the one to the right,
    below, or diagonally below; (H, W) bool."""
    padded = F.pad(mask[None].byte(), (0, 1, 0, 1), mode="replicate")[0].bool()
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edge = (mask ^ right) | (mask ^ below) | (mask ^ both)
    edge[-1, -1] = False
    return edge


def within(points: Tensor, radii: list[int]) -> Tensor:
    """(H, W) uint8: which is the first of `radii` whose disk around a point of the mask
    `points` covers the pixel; len(radii) if none does."""
    (H, W), R = points.shape, max(radii)
    y, x = points.nonzero(as_tuple=True)
    first = torch.full((H + 2 * R, W + 2 * R), len(radii), dtype=torch.uint8)
    dy, dx = torch.meshgrid(*2 * [torch.arange(-R, R + 1)], indexing="ij")
    for i in reversed(range(len(radii))):
        disk = dy**2 + dx**2 <= radii[i]**2
        steps = (dy * (W + 2 * R) + dx)[disk]
        for place in ((y + R) * (W + 2 * R) + x + R).split(8192):
            first.view(-1)[(place[:, None] + steps).flatten()] = i
    return first[R:R + H, R:R + W]


class BoundaryF:
    """SFNet's boundary metric: DAVIS' F-measure of outlines, per class and image.

    Outline pixels count as found within a disk of 0.05 to 0.5 % of the image's diagonal
    (2, 5, 9, 12 pixels at 1024x2048). Mean over images, then classes. Its code gives a
    class that is in neither truth nor prediction F = 1; here such images do not count.
    """

    shares = (0.0005, 0.001875, 0.00375, 0.005)

    def __init__(self, images: int, num_classes: int):
        self.sums = torch.zeros(images, num_classes, len(self.shares),
                                dtype=torch.float64)

    def update(self, index: int, labels: Tensor, guess: Tensor) -> None:
        radii = [math.ceil(share * math.hypot(*labels.shape)) for share in self.shares]
        guess = torch.where(labels == IGNORE_INDEX, labels, guess)
        for c in range(self.sums.shape[1]):
            truth, found = labels == c, guess == c
            self.sums[index, c] = math.nan
            if truth.any() or found.any():
                self.sums[index, c] = self.f_measure(outline(truth), outline(found),
                                                     radii)

    @staticmethod
    def f_measure(truth: Tensor, found: Tensor, radii: list[int]) -> Tensor:
        """2 P R / (P + R) at every radius; an outline on one side only gives 0."""
        if not (truth.any() and found.any()):
            return torch.full((len(radii),), float(not (truth.any() or found.any())))
        i = torch.arange(len(radii))[:, None]
        precision = (within(truth, radii)[found] <= i).double().mean(1)
        recall = (within(found, radii)[truth] <= i).double().mean(1)
        return 2 * precision * recall / (precision + recall).clamp(min=1e-12)

    def results(self) -> list[tuple[float, float]]:
        """[(share of the diagonal, mean F)]."""
        return list(zip(self.shares, self.sums.nanmean(0).nanmean(0).tolist()))


# --- Pictures ------------------------------------------------------------------------


def draw_curves(rows: list[dict], path: Path, title: str) -> None:
    """Of the rows of log.csv: loss and learning rate left, validation mIoU right."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(name):
        known = [row for row in rows if row.get(name)]
        return ([int(row["iteration"]) for row in known],
                [float(row[name]) for row in known])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    left.plot(*series("loss"), color="tab:blue", label="training loss")
    left.set(xlabel="iteration", ylabel="loss", ylim=(0, None), title=title)
    rate = left.twinx()
    rate.plot(*series("lr"), color="0.6", lw=1)
    rate.set_ylabel("learning rate", color="0.5")
    right.plot(*series("miou"), "o-", color="tab:green", label="mIoU")
    right.plot(*series("pixel_accuracy"), "o-", color="0.6", label="pixel accuracy")
    right.set(xlabel="iteration", ylim=(0, 1), title="validation")
    right.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sample_sheet(model, dataset, path: Path, *, device, indices=None,
                 protocol=Protocol()) -> None:
    """Some images of a split, each as image | truth | prediction | errors."""
    model.eval()
    if indices is None:
        indices = np.linspace(0, len(dataset) - 1, min(4, len(dataset)), dtype=int)
    rows = []
    for index in indices:
        image, truth = dataset.load(index)
        with torch.inference_mode():
            inputs = network_input(model, data.NORMALISE(image)[None], truth[None])
            guess = predict_in_memory(model, inputs.to(device), protocol, Counter())
        every = -(-truth.shape[1] // 480)  # a large image: every second, third .. pixel
        thin = lambda x: x[..., ::every, ::every].cpu().numpy()
        rows.append(sample_row(thin(image).transpose(1, 2, 0), thin(truth), thin(guess),
                               dataset.info.palette))
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255)
            for r in rows]
    titles = Image.new("RGB", (width, 20), "white")
    for i, word in enumerate(("image", "truth", "prediction", "errors")):
        ImageDraw.Draw(titles).text((i * width // 4 + 4, 2), word, fill="black",
                                    font=ImageFont.load_default(size=13))
    strip = data.legend(dataset.info, width)
    Image.fromarray(np.concatenate([np.array(titles), *rows, strip])).save(path)


def sample_row(picture, truth, guess, palette) -> np.ndarray:
    wrong = (guess != truth) & (truth != IGNORE_INDEX)
    errors = np.where(wrong[..., None], (220, 30, 30), picture // 3 + 150)
    guess = np.where(truth == IGNORE_INDEX, IGNORE_INDEX, guess)
    tiles = [picture, data.colourise(truth, palette), data.colourise(guess, palette),
             errors.astype(np.uint8)]
    return np.concatenate([np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=255)
                           for tile in tiles], axis=1)


def confusion_picture(matrix: ConfusionMatrix, classes, path: Path) -> None:
    """Each row: where the pixels of one true class went, from 0 to 1."""
    import matplotlib.pyplot as plt
    counts, side = matrix.counts.double(), 2.5 + 0.22 * len(classes)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow((counts / counts.sum(1, keepdim=True)).numpy(), cmap="Blues", vmin=0,
                vmax=1)
    axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set(xlabel="prediction", ylabel="truth")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def bands_picture(bands: Bands, miou: float, path: Path) -> None:
    """mIoU over the width of the band, as DeepLabv3+ Fig. 5."""
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    widths, mious, _ = zip(*bands.results())
    axis.plot(widths, mious, "o-", label=bands.name)
    axis.axhline(miou, color="grey", linestyle="--", label="mIoU of all pixels")
    axis.set(xlabel=f"within so many pixels of {bands.near}", ylabel="mIoU")
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- score ---------------------------------------------------------------------------


def protocol_of(args, *, device: str) -> Protocol:
    """The protocol that the command line asks for."""
    if min(args.scales) <= 0 or len(set(args.scales)) < len(args.scales):
        raise UserError(f"--scales {args.scales}: positive and different ones, please")
    if args.stride and (not args.window or max(
            s - n for s, n in zip(args.stride, args.window)) > 0):
        raise UserError("--stride is the step from window to window, at most their "
                        "size; give --window H W, too")
    for name in ("window", "stride"):
        if getattr(args, name) and min(getattr(args, name)) < 1:
            raise UserError(f"--{name}: pixels, from 1 on")
    at_once = args.pass_pixels
    if at_once is None:
        at_once = CPU_PIXELS if device == "cpu" else 0
    pair = lambda x: tuple(x) if x else None
    return Protocol(tuple(args.scales), args.flip, args.fuse, pair(args.window),
                    pair(args.stride), args.max_pixels, at_once)


def open_scored(args, checkpoint: dict):
    """The data set to score on, whose classes must be the checkpoint's."""
    dataset = data.open_dataset(
        args.dataset or checkpoint["dataset"], args.split,
        root=args.data_root or checkpoint["data_root"],
        difficulty=checkpoint["difficulty"])
    if list(dataset.info.classes) != checkpoint["classes"]:
        raise UserError(
            f"{args.checkpoint} knows the {len(checkpoint['classes'])} classes of "
            f"{checkpoint['dataset']}, but {dataset.info.name} has other "
            f"{len(dataset.info.classes)}; score it on its own data set")
    return dataset


def command_score(args) -> None:
    """mIoU, accuracies, per-class table and pictures of a checkpoint."""
    device, started = join_processes(args.device), time.time()
    checkpoint = load_checkpoint(args.checkpoint)
    protocol = protocol_of(args, device=device)
    if checkpoint["backbone"] == "labels":
        if protocol.window or protocol.flip or protocol.scales != (1.0,):
            raise UserError("this run reads the ground truth: whole, single scale only")
        protocol = replace(protocol, pass_pixels=0)
    dataset = open_scored(args, checkpoint)
    if not dataset.has_labels:
        dataset.labels(0)  # says why, and what to do instead
    model, K = restore(checkpoint, device), len(dataset.info.classes)
    forget_tensors(checkpoint)
    cut, extras = Counter(), {"per_image": PerImage(len(dataset), K)}
    if args.bands:
        trimap = dataset.info.name.startswith("voc")
        extras["bands"] = Bands(K, trimap=trimap)
    if args.boundary_f:
        extras["boundary_f"] = BoundaryF(len(dataset), K)
    matrix = score_dataset(model, dataset, device=device, workers=args.workers,
                           amp=args.amp, protocol=protocol, extras=extras.values(),
                           cut=cut)
    rank, _ = rank_and_world()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    report = make_report(args, checkpoint, dataset, matrix, protocol, extras, cut)
    report["seconds"] = round(time.time() - started, 1)
    folder = Path(args.out or checkpoint_file(args.checkpoint).parent
                  / f"score-{dataset.info.name}-{args.split}")
    folder.mkdir(parents=True, exist_ok=True)
    text = report_text(report, matrix)
    print(text)
    (folder / "score.txt").write_text(text + "\n")
    (folder / "score.json").write_text(json.dumps(report, indent=1) + "\n")
    confusion_picture(matrix, dataset.info.classes, folder / "confusion.png")
    if args.bands:
        bands_picture(extras["bands"], report["miou"], folder / "bands.png")
    order = extras["per_image"].order()
    for name, indices in (("worst", order[:4]), ("best", order[:-5:-1])):
        sample_sheet(model, dataset, folder / f"{name}.png", device=device,
                     indices=indices, protocol=protocol)
    print(f"{folder}: score.json, score.txt, confusion.png, worst.png, best.png"
          f"{', bands.png' if args.bands else ''}")


def make_report(args, checkpoint, dataset, matrix, protocol, extras, cut) -> dict:
    """All that is known of this score, for score.json; NaN becomes null."""
    number = lambda x: None if x != x else x
    file = checkpoint_file(args.checkpoint)
    absent = 0.0 if args.convention == "encoding" else math.nan
    order = extras["per_image"].order()
    place = lambda i: {"image": dataset.name(i),
                       "miou": extras["per_image"].sums[i].item()}
    columns = zip(dataset.info.classes, matrix.iou().tolist(),
                  matrix.accuracy().tolist(), matrix.counts.sum(1).tolist(),
                  matrix.counts.sum(0).tolist())
    report = {
        "checkpoint": file.name, "method": checkpoint["method"],
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "options": checkpoint["options"], "iteration": checkpoint["iteration"],
        "dataset": dataset.info.name, "split": args.split, "images": matrix.images,
        "protocol": str(protocol) + (f", {sum(cut.values())} passes in smaller windows"
                                     if cut else ""),
        "settings": asdict(protocol) | {"amp": args.amp},
        "cut_for_memory": dict(cut), "convention": args.convention,
        # Two data sets with two numbers, which no formula turns into one another.
        "metric": {"context59": "mIoU59", "context60": "mIoU60"}.get(
            dataset.info.name, "mIoU"),
        "miou": matrix.miou(absent=absent),
        "mean_accuracy": matrix.mean_accuracy(),
        "pixel_accuracy": matrix.pixel_accuracy(),
        "classes": {name: {"iou": number(iou), "accuracy": number(accuracy),
                           "truth_pixels": truth, "predicted_pixels": guess}
                    for name, iou, accuracy, truth, guess in columns},
        "worst": [place(i) for i in order[:4]],
        "best": [place(i) for i in order[:-5:-1]]}
    if "bands" in extras:
        bands = extras["bands"]
        report["bands"] = {
            "name": bands.name, "near": bands.near, "without": int(bands.sums[0, 0, 0]),
            "rows": [[w, number(miou), n] for w, miou, n in bands.results()]}
    if "boundary_f" in extras:
        report["boundary_f"] = extras["boundary_f"].results()
    return report


def report_text(report: dict, matrix: ConfusionMatrix) -> str:
    """The report for reading."""
    shown = lambda x, width=8: f"{'-':>{width}}" if x is None else f"{x:>{width}.4f}"
    lines = [f"{report['method']} on {report['dataset']} {report['split']}, iteration "
             f"{report['iteration']}, {report['checkpoint']} {report['sha256'][:12]}",
             f"{'class':<20}{'IoU':>8}{'accuracy':>10}{'truth px':>13}{'found px':>13}"]
    lines += [f"{name:<20}{shown(c['iou'])}{shown(c['accuracy'], 10)}"
              f"{c['truth_pixels']:>13}{c['predicted_pixels']:>13}"
              for name, c in report["classes"].items()]
    absent = [name for name, c in report["classes"].items() if c["iou"] is None]
    if absent:
        how = "counted as 0" if report["convention"] == "encoding" else "not averaged"
        lines.append(f"in neither truth nor prediction, {how}: {', '.join(absent)}")
    if "bands" in report:
        bands = report["bands"]
        lines.append(f"{bands['name']} within w pixels of {bands['near']} "
                     f"({bands['without']} images have none):")
        lines += [f"  w = {w:<3} {shown(miou)}  {n} pixels"
                  for w, miou, n in bands["rows"]]
    if "boundary_f" in report:
        lines.append("boundary F-score (SFNet's), by radius as share of the diagonal: "
                     + "  ".join(f"{share:.3%} {f:.4f}"
                                 for share, f in report["boundary_f"]))
    lines += cut_lines(report["cut_for_memory"])
    lines.append(matrix.summary(
        protocol=report["protocol"], expected_images=report["images"],
        name=report["metric"], miou=report["miou"]))
    return "\n".join(lines)


# --- predict -------------------------------------------------------------------------


def command_predict(args) -> None:
    """Index PNG, colour PNG and overlay with legend for any pictures.

    Method, classes, palette and normalisation come from the checkpoint.
    """
    checkpoint = load_checkpoint(args.checkpoint)
    model = restore(checkpoint, args.device, reads_images=True)
    forget_tensors(checkpoint)
    protocol, cut = protocol_of(args, device=args.device), Counter()
    normalise = data.normaliser(checkpoint["mean"], checkpoint["std"])

    @torch.inference_mode()
    def label(image: Tensor) -> np.ndarray:
        inputs = normalise(image)[None].to(args.device)
        return predict_in_memory(model, inputs, protocol, cut).cpu().numpy()

    write = write_submission if args.submission else write_pictures
    write(args, checkpoint, label)
    print("\n".join(cut_lines(cut)), end="\n" * bool(cut))


def cut_lines(cut: Counter) -> list[str]:
    """What went through the network in smaller windows than the protocol says."""
    return [f"for lack of memory: {how} ({n} times); --pass-pixels 0 is without limit"
            for how, n in cut.items()]


def write_pictures(args, checkpoint: dict, label) -> None:
    """Three pictures for each of args.images."""
    if not args.images:
        raise UserError("predict: name the pictures, or ask for --submission")
    info = data.Info(checkpoint["dataset"], tuple(checkpoint["classes"]),
                     tuple(map(tuple, checkpoint["palette"])))
    out = Path(args.out)
    stems = [Path(p).stem for p in args.images]
    if len(set(stems)) < len(stems):
        raise UserError("two images have the same name; predict them into two folders")
    images = [data.read_image(Path(p)) for p in args.images]  # all of them, or none
    out.mkdir(parents=True, exist_ok=True)
    for stem, image in zip(stems, images):
        ids, picture = label(image), image.permute(1, 2, 0).numpy()
        colours = data.colourise(ids, info.palette)
        overlay = (0.5 * picture + 0.5 * colours).astype(np.uint8)
        Image.fromarray(ids).save(out / f"{stem}_ids.png")
        Image.fromarray(colours).save(out / f"{stem}_colour.png")
        width = max(overlay.shape[1], 200)  # a legend needs some room
        overlay = np.pad(overlay, ((0, 0), (0, width - overlay.shape[1]), (0, 0)),
                         constant_values=255)
        Image.fromarray(np.concatenate([overlay, data.legend(info, width)])
                        ).save(out / f"{stem}_overlay.png")
        print(f"{stem}: {', '.join(info.classes[i] for i in np.unique(ids))} -> "
              f"{out}/{stem}_{{ids,colour,overlay}}.png")


# What the servers want: folder inside the archive, and the command that packs it.
SERVERS = {
    "cityscapes": ("", "cd {out} && zip -q ../cityscapes.zip *.png"),
    "ade20k": ("", "cd {out} && zip -q ../ade20k.zip *.png"),
    "voc": ("results/VOC2012/Segmentation/comp6_test_cls",
            "tar -czf {out}.tgz -C {out} results"),
}


def write_submission(args, checkpoint: dict, label) -> None:
    """PNGs with the data set's own ids under the images' names, then read again.

    Cityscapes: ids 7..33, 8 bit grey; ADE20K: 1..150; VOC: palette PNG, 0..20.
    """
    name = checkpoint["dataset"].removesuffix("-aug")
    if name not in SERVERS:
        raise UserError(f"{name} has no test server; there is one for "
                        f"{', '.join(SERVERS)}")
    dataset = data.open_dataset(checkpoint["dataset"], args.split, difficulty=0.5,
                                root=args.data_root or checkpoint["data_root"])
    folder, pack = SERVERS[name]
    out = Path(args.out) / folder
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; the archive must hold nothing else")
    raw = data.raw_values(name, len(checkpoint["classes"]))
    written = {}
    for index in range(len(dataset)):
        image = dataset.image(index)
        picture = Image.fromarray(raw[label(image)])
        if name == "voc":
            picture.putpalette(np.array(data.VOC_PALETTE, np.uint8).tobytes())
        path = out / f"{Path(dataset.name(index)).stem}.png"
        picture.save(path)
        written[path] = tuple(image.shape[1:])
        if sys.stderr.isatty():
            print(f"\r{index + 1}/{len(dataset)} ", end="", file=sys.stderr)
    for path, size in written.items():
        ids = data.read_mask(path)
        if ids.shape != size or not np.isin(ids, raw).all():
            raise RuntimeError(f"{path} was not written well: {ids.shape}, expected "
                               f"{size} and values of {raw}")
    files = len(list(out.iterdir()))
    if files != len(dataset):
        raise RuntimeError(f"{files} files for {len(dataset)} images")
    print(f"{len(written)} files, read again: sizes and values are right. Pack them:")
    print(pack.format(out=args.out))


# --- memory --------------------------------------------------------------------------


def command_memory(args) -> None:
    """Peak memory and time of one image through methods with random weights."""
    if len(args.methods) > 1:  # a process of its own for each: its peak is its life's
        for name in args.methods:
            keep = [w for w in args.argv if w == name or w not in args.methods]
            subprocess.run([sys.executable, __file__, *keep], check=True)
        return
    (name,), (H, W), started = args.methods, args.size, time.time()
    model = build_model(name, args.classes, backbone=args.backbone).eval()
    model = model.to(args.device, memory_format=torch.channels_last)
    protocol, cut = protocol_of(args, device=args.device), Counter()
    with torch.inference_mode():
        predict(model, torch.randn(1, 3, H, W, device=args.device), protocol, cut)
    if args.device == "cpu":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)
    else:
        peak = torch.cuda.max_memory_allocated()
    print(f"{name} {args.backbone} {H}x{W} {args.classes} classes, {protocol}: "
          f"peak {peak / 1e9:.2f} GB, {time.time() - started:.1f} s"
          + "".join(f"; {how}" for how in cut))


# --- explain -------------------------------------------------------------------------


def command_explain(args) -> None:
    """The key figure of the checkpoint's paper, drawn from its own tensors."""
    checkpoint = load_checkpoint(args.checkpoint)
    if args.image:
        image = data.read_image(Path(args.image))
    else:
        image, _ = data.open_dataset(
            checkpoint["dataset"], "val", root=checkpoint["data_root"],
            difficulty=checkpoint["difficulty"]).load(args.index)
    module, _ = load_method(checkpoint["method"])
    normalise = data.normaliser(checkpoint["mean"], checkpoint["std"])
    model = restore(checkpoint, reads_images=True)
    figure = module.explain(model, normalise(image)[None],
                            palette=checkpoint["palette"])
    figure.savefig(args.out, dpi=100)
    print(f"{checkpoint['method']} explains itself in {args.out}")


# --- cost ----------------------------------------------------------------------------


PARTS = ("encoder", "context", "decoder", "aux_heads")
# The papers' "GFLOPs" are multiply-adds, but each was counted by another program. Only
# layers are seen by these programs, no functions: neither interpolation nor a product
# of two predicted tensors.
RULES = {
    "plain": "convolutions and matrix products, by torch's own counter",
    "mmcv": "convolutions and their biases, 1 per ReLU and per pooled input element, "
            "2 per element of batch norm",
    "mmcv-sync": "the same of a network with SyncBN, which that counter passes over",
    "thop": "convolutions, 2 per element of batch norm; a transposed convolution as if "
            "each output element had seen the whole kernel",
    "2x": "2 per multiply-add, and one multiply-add for each logit divided by T",
}


def booked(rule: str, layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """Operations that the program behind `rule` books for one call of a layer.

    "2x" takes the products from torch's counter and adds what that does not see.
    """
    if rule == "2x":
        return y.numel() if type(layer).__name__ == "Temperature" else 0
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        bias = rule != "thop" and layer.bias is not None
        return y.numel() * (layer.in_channels // layer.groups * kernel + bias)
    if isinstance(layer, nn.BatchNorm2d):
        return 0 if rule == "mmcv-sync" else 2 * x.numel()
    if rule != "thop" and isinstance(layer, nn.ReLU):
        return y.numel()
    pooling = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
    return x.numel() if rule != "thop" and isinstance(layer, pooling) else 0


def count_cost(spec: str, num_classes: int, size: tuple[int, int], *, rule="plain",
               backbone="resnet50", **options) -> dict[str, dict[str, float]]:
    """Parameters (millions) and multiply-adds (GMACs) of each part of a method.

    Runs on torch's meta device: no memory, no arithmetic. "gmacs" are those of torch's
    counter, which does not see batch norm, ReLU, pooling and interpolation, under 0.5 %
    here; "by_rule" is the same work as `rule`, one of RULES, counts it.
    """
    with torch.device("meta"):
        model = build_model(spec, num_classes, backbone=backbone, **options)
        inputs = network_input(model, torch.empty(1, 3, *size),
                               torch.empty(1, *size, dtype=torch.uint8))
    model.eval()
    listed = dict.fromkeys(PARTS, 0)
    for name, layer in model.named_modules():
        def add(layer, inputs, output, part=name.split(".")[0]):
            if isinstance(output, Tensor):
                listed[part] += booked(rule, layer, inputs[0], output)
        if not list(layer.children()):
            layer.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    counts, root, cost = counter.get_flop_counts(), type(model).__name__, {}
    for part in PARTS:
        products = sum(counts.get(f"{root}.{part}", {}).values()) / 2
        by_rule = {"plain": products, "2x": 2 * (products + listed[part])}
        params = sum(p.numel() for p in getattr(model, part).parameters())
        cost[part] = {"params": params / 1e6, "gmacs": products / 1e9,
                      "by_rule": by_rule.get(rule, listed[part]) / 1e9}
    cost["total"] = {key: sum(cost[part][key] for part in PARTS)
                     for key in ("params", "gmacs", "by_rule")}
    return cost


def print_costs(method: str, size: tuple[int, int], *, backbone="resnet50c") -> None:
    """The cost of every variant of a method on one encoder, for its demo."""
    print(f"{'variant':<24}{'decoder GMACs':>15}{'total GMACs':>13}{'params':>9}"
          f"   at {size[0]}x{size[1]}, {backbone}, 19 classes")
    for variant in load_method(method)[0].VARIANTS:
        cost = count_cost(f"{method}:{variant}", 19, size, backbone=backbone)
        print(f"{variant:<24}{cost['decoder']['gmacs']:>15.2f}"
              f"{cost['total']['gmacs']:>13.2f}{cost['total']['params']:>8.2f}M")


def cost_rows(names: list[str], *, rule: str | None = None) -> list[dict]:
    """Ours beside the published figure, for every row that states a cost."""
    rows = []
    for name in names:
        method, _, variant = name.partition(":")
        for row in load_method(name)[0].PUBLISHED:
            stated = row["gmacs"] or row.get("decoder")
            if stated and variant in ("", row["variant"]):
                rows.append(cost_row(method, row, rule or row.get("rule", "plain")))
    return rows


def cost_row(method: str, row: dict, rule: str) -> dict:
    """One row of `cost`; `compared` is empty for a network that is not built here."""
    result = {"method": f"{method}:{row['variant']}", "why": row.get("why", ""),
              "rule": rule, "compared": {}}
    result |= {key: row[key] for key in ("table", "backbone", "size", "classes")}
    if row["variant"] is None:
        shown = {"method": row["name"], "published": row["gmacs"]}
        return result | shown | {"parts": None}
    parts = count_cost(f"{method}:{row['variant']}", row["classes"], row["size"],
                       rule=rule, backbone=row["backbone"], **row.get("options", {}))
    params = parts["total"]["params"] + row.get("unused", 0)
    if not row.get("aux", True):
        params -= parts["aux_heads"]["params"]
    pairs = {"total": (parts["total"]["by_rule"], row["gmacs"]),
             "decoder": (parts["decoder"]["by_rule"], row.get("decoder")),
             "params": (params, row.get("params"))}
    decimals = 2 if rule == "2x" else 1  # of the tables, but for a round 70
    for key, (ours, theirs) in pairs.items():
        if theirs:
            half = 0.5001 * 10 ** -(0 if isinstance(theirs, int) else decimals)
            result["compared"][key] = {
                "ours": ours, "published": theirs, "difference": ours / theirs - 1,
                "rounds": abs(ours - theirs) <= half}
    return result | {"parts": parts}


def cost_line(row: dict) -> str:
    """One row of `cost` for the screen."""
    size, parts = "{}x{}".format(*row["size"]), row["parts"]
    gmacs = f"{'not built':>45}" if not parts else "".join(
        f"{parts[p]['gmacs']:>9.2f}" for p in (*PARTS[:3], "total")
    ) + f"{parts['total']['params']:>8.2f}M"
    shown = f"total ?/{row['published']}" if not parts else ", ".join(
        f"{key} {c['ours']:.2f}/{c['published']:.4g} ({c['difference']:+.2%})"
        for key, c in row["compared"].items())
    return (f"{row['table']:<7}{row['method']:<31}{row['backbone']:<19}{size:<10}"
            f"{row['classes']:>4}{gmacs}  {row['rule']}: {shown}"
            f"{'  ! ' + row['why'] if row['why'] else ''}")


def command_cost(args) -> None:
    """GMACs and parameters by part, and ours beside the papers' by the papers' rule.

    Parameters include the auxiliary heads, GMACs do not: they are gone in evaluation.
    """
    rows = cost_rows(args.methods or methods(), rule=args.rule)
    if args.json:
        return print(json.dumps(rows, indent=1))
    print(f"{'table':<7}{'method':<31}{'backbone':<19}{'H x W':<10}{'K':>4}"
          f"{'encoder':>9}{'context':>9}{'decoder':>9}{'total':>9}{'params':>9}"
          "  rule: ours / published (difference)")
    for row in rows:
        print(cost_line(row))
    print("GMACs by part: plain. Rules:")
    for name, text in RULES.items():
        print(f"  {name:<10} {text}")


# --- table ---------------------------------------------------------------------------


def run_row(folder: Path) -> dict:
    """What one run says of itself: method, cost, mIoU of last.pt, speed."""
    checkpoint = load_checkpoint(folder / "last.pt")
    size = checkpoint["recipe"]["crop"]
    cost = count_cost(checkpoint["method"], len(checkpoint["classes"]), tuple(size),
                      backbone=checkpoint["backbone"], **checkpoint["options"])["total"]
    with open(folder / "log.csv") as file:
        speeds = [float(r["images_per_s"]) for r in csv.DictReader(file)
                  if r["images_per_s"]]
    return {"method": checkpoint["method"], "dataset": checkpoint["dataset"],
            "backbone": checkpoint["backbone"],
            # Runs that differ in any of these are not averaged.
            "key": json.dumps([checkpoint[k] for k in (
                "method", "options", "dataset", "difficulty", "recipe", "iteration")]
                + [checkpoint.get("train_split", "train")]),
            "set": " ".join(f"{k}={v}" for k, v in checkpoint["options"].items()
                            if k != "channels"),
            "iterations": checkpoint["evaluated"],
            "params": cost["params"], "gmacs": cost["gmacs"], "size": size,
            "seed": checkpoint["seed"], "miou": checkpoint["miou"],
            "images_per_s": float(np.median(speeds)) if speeds else float("nan")}


def command_table(args) -> None:
    """Markdown to the screen, csv with --csv: a line per configuration, over seeds."""
    groups: dict[str, list[dict]] = {}
    for row in map(run_row, map(Path, args.runs)):
        groups.setdefault(row["key"], []).append(row)
    table = []
    for rows in groups.values():
        scores = [r["miou"] for r in sorted(rows, key=lambda r: r["seed"])]
        spread = f" ± {np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
        first = rows[0]
        table.append({
            "method": f"{first['method']} {first['set']}".strip(),
            "dataset": first["dataset"], "backbone": first["backbone"],
            "steps": first["iterations"], "params (M)": f"{first['params']:.2f}",
            "GMACs": "{:.2f} at {}x{}".format(first["gmacs"], *first["size"]),
            "mIoU": f"{np.mean(scores):.4f}{spread}", "n": len(scores),
            "each seed": " ".join(f"{s:.4f}" for s in scores),
            "img/s": f"{np.median([r['images_per_s'] for r in rows]):.1f}"})
    print("| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)


# --- Command line --------------------------------------------------------------------


def protocol_options() -> argparse.ArgumentParser:
    """How an image becomes class ids, for score, predict and memory."""
    how = argparse.ArgumentParser(add_help=False)
    group = how.add_argument_group("protocol")
    group.add_argument("--scales", nargs="+", type=float, default=[1.0],
                       help="of the image (default 1)")
    group.add_argument("--flip", action="store_true", help="mirrored images, too")
    group.add_argument("--fuse", choices=("mean", "exp"), default="mean",
                       help="mean softmax of the passes, or sum of exp(logits)")
    group.add_argument("--window", nargs=2, type=int, metavar=("H", "W"),
                       help="sliding windows of this size (default: whole image)")
    group.add_argument("--stride", nargs=2, type=int, metavar=("H", "W"),
                       help="from window to window (default: two thirds of it)")
    group.add_argument("--max-pixels", type=int, default=0, metavar="N",
                       help="leave out scales at which the image has more")
    group.add_argument("--pass-pixels", type=int, metavar="N",
                       help="larger images go through in windows; 0: whole ones "
                            f"(default {CPU_PIXELS} on a CPU, 0 on a GPU)")
    return how


def score_options(score: argparse.ArgumentParser) -> None:
    score.add_argument("checkpoint", help="a run folder (its best.pt) or a .pt file")
    score.add_argument("--dataset", help="default: the one it was trained on")
    score.add_argument("--data-root", metavar="DIR", help="default: as in training")
    score.add_argument("--split", default="val", help="default val")
    score.add_argument("--workers", type=int, default=2, help="loader processes (2)")
    score.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    score.add_argument("--bands", action="store_true",
                       help="mIoU near void (VOC) or near class boundaries")
    score.add_argument("--boundary-f", action="store_true", help="SFNet's F-score")
    score.add_argument("--convention", choices=("ours", "encoding"), default="ours",
                       help="encoding: absent classes count as 0, as EfficientFCN's")
    score.add_argument("--out", metavar="DIR",
                       help="for score.json and pictures (default: in the run folder)")
    score.set_defaults(command=command_score)


def predict_options(shown: argparse.ArgumentParser) -> None:
    shown.add_argument("checkpoint")
    shown.add_argument("images", nargs="*")
    shown.add_argument("--out", required=True, metavar="DIR")
    shown.add_argument("--submission", action="store_true",
                       help="files for the test server of the checkpoint's data set")
    shown.add_argument("--split", default="test", help="of a submission (test)")
    shown.add_argument("--data-root", metavar="DIR", help="of a submission")
    shown.set_defaults(command=command_predict)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True,
                                     metavar="score|predict|explain|cost|memory|table")
    common = argparse.ArgumentParser(add_help=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common.add_argument("--device", default=device, help=f"default {device}")

    how = protocol_options()
    score_options(commands.add_parser("score", parents=[common, how],
                                      help=command_score.__doc__))

    predict_options(commands.add_parser(
        "predict", parents=[common, how],
        help="label your own pictures, or a test split"))

    explain = commands.add_parser("explain", help=command_explain.__doc__)
    explain.add_argument("checkpoint")
    explain.add_argument("image", nargs="?", help="default: one of the val split")
    explain.add_argument("--index", type=int, default=0, help="which of them (0)")
    explain.add_argument("--out", default="explain.png", metavar="FILE")
    explain.set_defaults(command=command_explain)

    cost = commands.add_parser("cost", help="parameters and GMACs beside the papers'")
    cost.add_argument("methods", nargs="*", help="as nrd or nrd:bilinear; default all")
    cost.add_argument("--rule", choices=RULES,
                      help="count all rows by one rule (default: each paper's own)")
    cost.add_argument("--json", action="store_true", help="for machines, every part")
    cost.set_defaults(command=command_cost)

    memory = commands.add_parser("memory", parents=[common, how],
                                 help=command_memory.__doc__)
    memory.add_argument("methods", nargs="+")
    memory.add_argument("--size", nargs=2, type=int, default=[1024, 2048],
                        metavar=("H", "W"), help="of the image (default 1024 2048)")
    memory.add_argument("--classes", type=int, default=19, help="(19)")
    memory.add_argument("--backbone", default="resnet50", help="(resnet50)")
    memory.set_defaults(command=command_memory)

    table = commands.add_parser("table", help="one line per configuration of some runs")
    table.add_argument("runs", nargs="+")
    table.add_argument("--csv", metavar="FILE", help="also write it there")
    table.set_defaults(command=command_table)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    with show_errors(args.debug):
        args.command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
