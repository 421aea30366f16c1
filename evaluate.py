"""Score a run, predict your own pictures, count the cost, make the table.

    python evaluate.py score RUN
    python evaluate.py score RUN --scales 0.5 0.75 1.0 1.25 1.5 1.75 --flip --bands
    python evaluate.py predict RUN photo.jpg --out predictions
    python evaluate.py explain RUN --out explain.png
    python evaluate.py export RUN --out model.pt2     or model.onnx, for other programs
    python evaluate.py predict model.pt2 photo.jpg --out predictions
    python evaluate.py cost                       ours beside the published numbers
    python evaluate.py table runs/*               one line per configuration
    python evaluate.py compare runs/a runs/b      on the same images, with intervals
    python evaluate.py speed METHOD METHOD         time and memory, side by side

RUN is a run's folder, which means its last.pt, or a .pt file of it.

Protocol of every number here: one image at a time, labels never resized, logits
bilinear to the image's own size, argmax; one int64 confusion matrix over all valid
pixels of the split; IoU per class; mean over the classes that occur. How an image
becomes logits (whole or in windows, scales, flip) is a `Protocol`, and is printed.

First comes what turns an image into class ids, then what counts them, then a section
for each command.
"""
from __future__ import annotations

import argparse
import ast
import copy
import csv
import gc
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

import data
from common import (ABOVE_ZERO, IGNORE_INDEX, LABELS, MISFITS, ConfusionMatrix,
                    Damaged, Parser, UserError, autocast, backbones, build_model,
                    checkpoint_file, class_patches, count_cost, first_line, ious,
                    join_processes, label_colours, load_checkpoint, load_method,
                    make_folder, methods, number, out_of_memory, peak_memory, progress,
                    published, rank_and_world, restore, rows_at, segmentation_loss,
                    shapes_only, show_errors, usable)

# --- An image becomes class ids ------------------------------------------------------

STRIP = 2**20  # floats of scores in a strip of rows of the image, decided at once
BAND = 2**27   # floats of the sum over scales and flips; beyond it, by bands of rows


@dataclass(frozen=True)
class Protocol:
    """How an image becomes class ids; printed and stored with every number.

    scales, flip  passes of the resized and mirrored image
    fuse          mean: of the passes' softmax, as mmsegmentation and most papers;
                  exp: sum of exp(logits), which trusts scales with large logits more;
                  the code of arXiv:2008.10487 does so, before it enlarges them
    window        (h, w) of sliding windows over the resized image, None: all of it
    stride        from one window to the next; None: two thirds of a window
    base_size     (long, short) into which an image is made to fit before it is scaled,
                  (0, 0): its own size
    max_pixels    leave out scales at which the image has more, 0: none
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fuse: str = "mean"
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    base_size: tuple[int, int] = (0, 0)
    max_pixels: int = 0

    def __str__(self) -> str:
        said = "whole image" if not self.window else (
            "windows {}x{} every {}x{}".format(*self.window, *self.steps()))
        if self.scales == (1.0,):
            said += ", single scale"
        else:
            said += f", scales {' '.join(f'{s:g}' for s in self.scales)}"
        said += " + flip" if self.flip else ""
        if self.flip or len(self.scales) > 1:
            said += {"mean": ", mean softmax", "exp": ", sum of exp"}[self.fuse]
        if any(self.base_size):
            said += ", resized into {}x{}".format(*self.base_size)
        return said + (f", <= {self.max_pixels} px" if self.max_pixels else "")

    def steps(self) -> tuple[int, int]:
        """From one window to the next."""
        return self.stride or tuple(math.ceil(2 * n / 3) for n in self.window)

    def passes(self, H: int, W: int) -> list[tuple[tuple[int, int], bool]]:
        """[(size, mirrored)] for an image of H x W pixels."""
        base = data.fit_into((H, W), self.base_size)
        sizes = [(max(1, round(H * base * s)), max(1, round(W * base * s)))
                 for s in self.scales]
        kept = [s for s in sizes if not self.max_pixels
                or s[0] * s[1] <= self.max_pixels]
        if not kept:
            raise UserError(f"--max-pixels {self.max_pixels} leaves no scale for an "
                            f"image of {H}x{W}")
        mirrored = (False, True) if self.flip else (False,)
        return [(size, flipped) for size in kept for flipped in mirrored]


class Windows:
    """The logits of one (resized, mirrored) image by rows, from one or more windows.

    The map of all logits (K, H, W) is never made where a method has `decode` and
    `to_pixels`: what it decodes is a 16th of it or less, and is enlarged by rows.

    A window goes through the network when the first of its rows is asked for, and is
    forgotten when rows below it are: few are alive at a time. Where windows overlap,
    the logits are averaged. The last window of a row or column moves back inside.
    """

    def __init__(self, model: nn.Module, images: Tensor, protocol: Protocol):
        self.model, self.images, self.alive = model, images, {}
        H, W = images.shape[-2:]
        h, w = (min(n, N) for n, N in zip(protocol.window or (H, W), (H, W)))
        steps = protocol.steps() if protocol.window else (h, w)
        places = lambda n, N, step: [min(i * step, N - n)
                                     for i in range(math.ceil((N - n) / step) + 1)]
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
                self.alive[box] = self.decode(box)
            part = self.pixels(self.alive[box], box, top - y, bottom - y)
            if len(self.boxes) == 1:
                return part
            if total is None:
                total = part.new_zeros(len(part) + 1, hi - lo, self.images.shape[-1])
            view = total[:, top - lo:bottom - lo, x:x + w]
            view[:-1] += part
            view[-1] += 1  # how many windows saw a pixel
        return total[:-1] / total[-1]

    def decode(self, box: tuple[int, int, int, int]) -> Tensor:
        """What the method says of a window, at its own resolution if it can."""
        y, x, h, w = box
        crop = self.images[..., y:y + h, x:x + w]
        if min(h, w) < 32:  # the encoder's smallest cell; repeat the border, cut later
            crop = F.pad(crop, (0, max(0, 32 - w), 0, max(0, 32 - h)), mode="replicate")
        if hasattr(self.model, "decode"):
            return self.model.decode(crop)[0]
        return self.model(crop)["out"]

    def pixels(self, native: Tensor, box, lo: int, hi: int) -> Tensor:
        """Rows lo..hi-1 of a window's logits at its own size, (K, hi - lo, w)."""
        h, w = box[2:]
        if hasattr(self.model, "to_pixels"):
            x = self.model.to_pixels(native, (max(h, 32), max(w, 32)), (lo, hi))
        else:
            x = native[:, :, lo:hi]
        return x[0, :, :, :w].float()

    def resized_rows(self, lo: int, hi: int, size: tuple[int, int]) -> Tensor:
        """Rows lo..hi-1 of the logits bilinearly resized to `size` = (H, W)."""
        h, w = self.images.shape[-2:]
        if (h, w) == size:
            return self.rows(lo, hi)
        y = (torch.arange(lo, hi, dtype=torch.float64) + 0.5) * h / size[0] - 0.5
        y = y.clamp(0, h - 1)
        first, last = int(y[0]), min(int(y[-1]) + 2, h)
        x = rows_at(self.rows(first, last)[None], y - first)
        return F.interpolate(x, (hi - lo, size[1]), mode="bilinear")[0]


def predict(model: nn.Module, images: Tensor, protocol=Protocol()) -> Tensor:
    """Class ids (H, W) of one normalised image (1, 3, H, W), by a protocol.

    A single pass is enlarged and decided by strips of rows. Several passes need their
    sum, which is kept for a band of rows at a time. Out of memory is a UserError: with
    windows that nobody asked for the number would be another one.
    """
    H, W = images.shape[-2:]
    passes = len(protocol.passes(H, W))
    band = H if passes == 1 else max(1, BAND // (model.num_classes * W))
    bands = [slice(top, min(top + band, H)) for top in range(0, H, band)]
    try:
        return torch.cat([decide(model, images, protocol, rows) for rows in bands])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        h, w = (max(64, n // 2) for n in protocol.window or (H, W))
        raise UserError(f"out of memory for an image of {H}x{W} ({protocol}): try "
                        f"evaluate.py with --window {h} {w}", code=1) from None


def decide(model: nn.Module, images: Tensor, protocol: Protocol, rows: slice) -> Tensor:
    """Class ids of some rows, from all passes of the protocol."""
    H, W = images.shape[-2:]
    K, passes = model.num_classes, protocol.passes(H, W)
    exp, total = protocol.fuse == "exp", None
    if len(passes) > 1:
        total = images.new_full((K, rows.stop - rows.start, W), -math.inf if exp else 0)
    ids, strip = [], max(1, STRIP // (K * W))
    for size, mirrored in passes:
        view = images if size == (H, W) else resize(images, size)
        scores = Windows(model, view.flip(-1) if mirrored else view, protocol)
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


# --- Class ids are counted -----------------------------------------------------------


def score_dataset(model: nn.Module, dataset, *, device, workers=0, amp="off",
                  protocol=Protocol(), measures=(), upper_bound=False,
                  stopped=lambda: False) -> ConfusionMatrix | None:
    """Confusion matrix of the model on a whole split; train.py uses this too.

    Of several processes each scores the images rank, rank + world, ..: none twice, none
    left out, and no word between them before the sums at the end. `measures` are told
    every image, too; their `sums` are added up as the matrix is. If `stopped()` comes
    true, in any process, there is no result.
    """
    model.eval()
    rank, world = rank_and_world()
    matrix, cut_short = ConfusionMatrix(len(dataset.info.classes)), False
    loader = data.val_loader(dataset, workers=workers, start=rank, step=world,
                             upper_bound=upper_bound)
    with torch.inference_mode(), autocast(device, amp):
        for step, (inputs, labels) in enumerate(loader):
            if stopped():
                cut_short = True
                break
            guess = predict(model, inputs.to(device), protocol).cpu()
            matrix.update(labels[0], guess)
            for measure in measures:
                measure.update(rank + step * world, labels[0], guess)
            progress(step + 1, len(loader))
    if world > 1:
        seen = torch.tensor([matrix.images, cut_short])
        for x in (matrix.counts, seen, *(measure.sums for measure in measures)):
            y = x.to(device)
            dist.all_reduce(y)
            x.copy_(y)
        matrix.images, cut_short = seen.tolist()
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


WIDTHS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40)  # of bands, in pixels


class Bands:
    """mIoU of the pixels near boundaries, in bands of growing width.

    trimap (arXiv:1802.02611, Sec. 4.4): within w pixels of "void", which in PASCAL VOC
    is a strip along every object. Elsewhere void is the ego-vehicle and the like; there
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
        counts = self.sums[1:].cumsum(0)  # (widths, K, K)
        return list(zip(self.widths, mious(counts).tolist(),
                        counts.sum((1, 2)).tolist()))


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
    """DAVIS' F-measure of outlines, per class and image (arXiv:2002.10120, Table 7).

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


def sample_sheet(model, dataset, path: Path, *, device, indices=None, amp="off",
                 protocol=Protocol(), upper_bound=False) -> None:
    """Some images of a split, each as image | truth | prediction | errors."""
    model.eval()
    if indices is None:
        indices = np.linspace(0, len(dataset) - 1, min(4, len(dataset)), dtype=int)
    rows = []
    for index in indices:
        image, truth = dataset.load(index)
        inputs = data.network_input(image, truth, dataset.info, upper_bound)[None]
        with torch.inference_mode(), autocast(device, amp):
            guess = predict(model, inputs.to(device), protocol)
        every = math.ceil(truth.shape[1] / 480)  # a large image: some pixels of it
        thin = lambda x: x[..., ::every, ::every].cpu().numpy()
        rows.append(sample_row(thin(image).transpose(1, 2, 0), thin(truth), thin(guess),
                               dataset.info.palette))
    data.mosaic(rows, dataset.info,
                titles=("image", "truth", "prediction", "errors")).save(path)


def sample_row(picture, truth, guess, palette) -> list[np.ndarray]:
    wrong = (guess != truth) & (truth != IGNORE_INDEX)
    errors = np.where(wrong[..., None], (220, 30, 30), picture // 3 + 150)
    guess = np.where(truth == IGNORE_INDEX, IGNORE_INDEX, guess)
    return [picture, data.colourise(truth, palette), data.colourise(guess, palette),
            errors.astype(np.uint8)]


def confusion_picture(matrix: ConfusionMatrix, classes, path: Path) -> None:
    """Each row: where the pixels of one true class went, in percent.

    Beyond 40 classes the numbers would be too small to read and are left out.
    """
    from matplotlib.figure import Figure
    counts, side = matrix.counts.double(), 2.5 + 0.36 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    shares = (counts / counts.sum(1, keepdim=True)).numpy()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005 and len(classes) <= 40:
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center",
                      fontsize=7, color="white" if share > 0.5 else "black")
    axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set(xlabel="prediction", ylabel="truth",
             title="of each true class, percent of its pixels")
    figure.savefig(path, dpi=80)


def bands_picture(bands: Bands, miou: float, path: Path) -> None:
    """mIoU over the width of the band, as Fig. 5 of arXiv:1802.02611."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    widths, mious, _ = zip(*bands.results())
    axis.plot(widths, mious, "o-", label=bands.name)
    axis.axhline(miou, color="grey", linestyle="--", label="mIoU of all pixels")
    axis.set(xlabel=f"within so many pixels of {bands.near}", ylabel="mIoU")
    axis.legend()
    figure.savefig(path, dpi=100)


# --- score ---------------------------------------------------------------------------


def trained_size(checkpoint: dict) -> tuple[int, int]:
    """The --base-size of the training; (0, 0): images had their own size."""
    return tuple(checkpoint["recipe"].get("base_size", (0, 0)))


def protocol_of(args, checkpoint: dict) -> Protocol:
    """The protocol that the command line asks for, with the base size of training."""
    if len(set(args.scales)) < len(args.scales):
        raise UserError(f"--scales {args.scales}: different ones, please")
    if args.stride and (not args.window or max(
            s - n for s, n in zip(args.stride, args.window)) > 0):
        raise UserError("--stride is the step from window to window, at most their "
                        "size; give --window H W, too")
    pair = lambda x: tuple(x) if x else None
    return Protocol(tuple(args.scales), args.flip, args.fuse, pair(args.window),
                    pair(args.stride), pair(args.base_size) or trained_size(checkpoint),
                    args.max_pixels)


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
    if not dataset.has_labels:
        dataset.labels(0)  # says why, and what to do instead
    return dataset


def command_score(args) -> None:
    """mIoU, accuracies, per-class table and pictures of a checkpoint."""
    device, started = join_processes(args.device), time.time()
    checkpoint = load_checkpoint(args.checkpoint)
    # Not after the scoring: a training that goes on replaces the file.
    sha256 = hashlib.sha256(checkpoint_file(args.checkpoint).read_bytes()).hexdigest()
    protocol = protocol_of(args, checkpoint)
    dataset = open_scored(args, checkpoint)
    folder = Path(args.out or score_folder(args, checkpoint, protocol, dataset))
    if rank_and_world()[0] == 0:
        make_folder(folder)
    model, K = restore(checkpoint, device), len(dataset.info.classes)
    for name in ("model", "optimizer"):  # the model has them by now: half the memory
        checkpoint.pop(name, None)
    upper_bound = checkpoint["backbone"] == LABELS
    measures = {"per_image": PerImage(len(dataset), K)}
    if args.bands:
        trimap = dataset.info.name.startswith("voc")
        measures["bands"] = Bands(K, trimap=trimap)
    if args.boundary_f:
        measures["boundary_f"] = BoundaryF(len(dataset), K)
    matrix = score_dataset(model, dataset, device=device, workers=args.workers,
                           amp=args.amp, protocol=protocol,
                           measures=measures.values(), upper_bound=upper_bound)
    rank, _ = rank_and_world()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    report = make_report(args, checkpoint, dataset, matrix, protocol, measures)
    report["sha256"] = sha256
    report["seconds"] = round(time.time() - started, 1)
    report["peak_gb"] = round(peak_memory(device), 2)
    text = report_text(report, matrix)
    print(text)
    (folder / "score.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "score.json").write_text(json.dumps(report, indent=1) + "\n",
                                       encoding="utf-8")
    confusion_picture(matrix, dataset.info.classes, folder / "confusion.png")
    if args.bands:
        bands_picture(measures["bands"], report["miou"], folder / "bands.png")
    order = measures["per_image"].order()
    for name, indices in (("worst", order[:4]), ("best", order[:-5:-1])):
        sample_sheet(model, dataset, folder / f"{name}.png", device=device,
                     indices=indices, amp=args.amp, protocol=protocol,
                     upper_bound=upper_bound)
    print(f"{folder}: score.json, score.txt, confusion.png, worst.png, best.png"
          f"{', bands.png' if args.bands else ''}")


def score_folder(args, checkpoint: dict, protocol: Protocol, dataset) -> Path:
    """Beside the checkpoint, under a name that no other number would have."""
    file = checkpoint_file(args.checkpoint)
    words = [dataset.info.name, args.split, file.stem, str(checkpoint["iteration"]),
             str(protocol), "" if args.amp == "off" else args.amp,
             "" if args.convention == "ours" else args.convention,
             "bands" * args.bands, "boundary-f" * args.boundary_f]
    if args.data_root:  # another place, perhaps other images
        words.append(Path(args.data_root).absolute().as_posix())
    name = re.sub(r"[^\w.]+", "-", " ".join(filter(None, words))).strip("-")
    return file.parent / f"score-{name}"


def make_report(args, checkpoint, dataset, matrix, protocol, measures) -> dict:
    """All that is known of this score, for score.json; NaN becomes null."""
    null = lambda x: None if x != x else x
    file = checkpoint_file(args.checkpoint)
    absent = 0.0 if args.convention == "encoding" else math.nan
    per_image = measures["per_image"]
    order = per_image.order()
    place = lambda i: {"image": dataset.name(i), "miou": per_image.sums[i].item()}
    columns = zip(dataset.info.classes, matrix.iou().tolist(),
                  matrix.accuracy().tolist(), matrix.counts.sum(1).tolist(),
                  matrix.counts.sum(0).tolist())
    report = {
        "checkpoint": file.name, "method": checkpoint["method"],
        "options": checkpoint["options"], "iteration": checkpoint["iteration"],
        "dataset": dataset.info.name, "split": args.split, "images": matrix.images,
        "protocol": str(protocol), "settings": asdict(protocol) | {"amp": args.amp},
        "convention": args.convention,
        # Two data sets with two numbers, which no formula turns into one another.
        "metric": {"context59": "mIoU59", "context60": "mIoU60"}.get(
            dataset.info.name, "mIoU"),
        "miou": matrix.miou(absent=absent),
        "mean_accuracy": matrix.mean_accuracy(),
        "pixel_accuracy": matrix.pixel_accuracy(),
        "classes": {name: {"iou": null(iou), "accuracy": null(accuracy),
                           "truth_pixels": truth, "predicted_pixels": guess}
                    for name, iou, accuracy, truth, guess in columns},
        "worst": [place(i) for i in order[:4]],
        "best": [place(i) for i in order[:-5:-1]]}
    if "bands" in measures:
        bands = measures["bands"]
        report["bands"] = {
            "name": bands.name, "near": bands.near, "without": int(bands.sums[0, 0, 0]),
            "rows": [[w, null(miou), n] for w, miou, n in bands.results()]}
    if "boundary_f" in measures:
        report["boundary_f"] = measures["boundary_f"].results()
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
        lines.append("boundary F-score, by radius as share of the diagonal: "
                     + "  ".join(f"{share:.3%} {f:.4f}"
                                 for share, f in report["boundary_f"]))
    lines.append(f"{report['seconds']} s, peak {report['peak_gb']} GB")
    how = report["protocol"]
    if report["settings"]["amp"] != "off":
        how += f", {report['settings']['amp']}"
    if report["convention"] == "encoding":
        how += ", absent classes are 0"
    lines.append(matrix.summary(
        protocol=how, expected_images=report["images"],
        name=report["metric"], miou=report["miou"]))
    return "\n".join(lines)


# --- predict -------------------------------------------------------------------------


def photo_model(path: str, device="cpu"):
    """A checkpoint's description, its model, and the normalisation of its images."""
    checkpoint = load_checkpoint(path)
    if checkpoint["backbone"] == LABELS:
        raise UserError(f"this run has --backbone {LABELS}: it reads the ground truth, "
                        f"not pictures, and can only be scored")
    model = restore(checkpoint, device)
    for name in ("model", "optimizer"):
        checkpoint.pop(name, None)
    return checkpoint, model, data.normaliser(checkpoint["mean"], checkpoint["std"])


def command_predict(args) -> None:
    """Index PNG, colour PNG and overlay with legend for any pictures or folders.

    Method, classes, palette and normalisation come from the checkpoint, or from the
    file of `export`.
    """
    load = load_exported if Path(args.checkpoint).suffix == ".pt2" else photo_model
    checkpoint, model, normalise = load(args.checkpoint, usable(args.device))
    protocol = protocol_of(args, checkpoint)

    @torch.inference_mode()
    def label(image: Tensor) -> np.ndarray:
        inputs = normalise(image)[None].to(args.device)
        return predict(model, inputs, protocol).cpu().numpy()

    write = write_submission if args.submission else write_pictures
    write(args, checkpoint, label)


def write_pictures(args, checkpoint: dict, label) -> None:
    """Three pictures for each of args.images, one after the other."""
    paths = []
    for path in map(Path, args.images):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        paths += sorted(data.files_in(path).values()) if path.is_dir() else [path]
    if not paths:
        raise UserError("predict: name pictures or folders, or ask for --submission")
    twice = [stem for stem, n in Counter(path.stem for path in paths).items() if n > 1]
    if twice:
        raise UserError(f"two images have the same name, {twice[0]}; predict them into "
                        f"two folders")
    info = data.Info(checkpoint["dataset"], tuple(checkpoint["classes"]),
                     tuple(map(tuple, checkpoint["palette"])))
    out = make_folder(args.out)
    if out.resolve() in [path.resolve().parent for path in paths]:
        raise UserError(f"--out {out} is where the images are: the next run would take "
                        f"these results for images; give another folder")
    for path in paths:
        image = data.read_image(path)
        ids, picture = label(image), image.permute(1, 2, 0).numpy()
        colours = data.colourise(ids, info.palette)
        overlay = (0.5 * picture + 0.5 * colours).astype(np.uint8)
        Image.fromarray(ids).save(out / f"{path.stem}_ids.png")
        Image.fromarray(colours).save(out / f"{path.stem}_colour.png")
        data.mosaic([[overlay]], info).save(out / f"{path.stem}_overlay.png")
        print(f"{path.stem}: {', '.join(info.classes[i] for i in np.unique(ids))} -> "
              f"{out}/{path.stem}_{{ids,colour,overlay}}.png")


def write_submission(args, checkpoint: dict, label) -> None:
    """PNGs with the data set's own ids under the images' names, then read again.

    Cityscapes: ids 7..33, 8 bit grey; ADE20K: 1..150; VOC: palette PNG, 0..20.
    """
    if args.images:
        raise UserError("--submission labels the test split: name no pictures")
    name = checkpoint["dataset"]
    source = data.SOURCES.get(name)
    if not (source and source.pack):
        servers = [each for each, source in data.SOURCES.items() if source.pack]
        raise UserError(f"{name} has no test server; there is one for "
                        f"{', '.join(servers)}")
    dataset = data.open_dataset(name, args.split, difficulty=0.5,
                                root=args.data_root or checkpoint["data_root"])
    out = make_folder(Path(args.out) / source.inside)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; the archive must hold nothing else")
    raw = data.raw_values(name, len(checkpoint["classes"]))
    written = {}
    for index in range(len(dataset)):
        image = dataset.image(index)
        picture = Image.fromarray(raw[label(image)])
        if source.open is data.open_voc:
            picture.putpalette(np.array(source.palette, np.uint8).tobytes())
        path = out / f"{Path(dataset.name(index)).stem}.png"
        picture.save(path)
        written[path] = tuple(image.shape[1:])
        progress(index + 1, len(dataset))
    for path, size in written.items():
        ids = data.read_mask(path)
        if ids.shape != size or not np.isin(ids, raw).all():
            raise RuntimeError(f"{path} was not written well: {ids.shape}, expected "
                               f"{size} and values of {raw}")
    files = len(list(out.iterdir()))
    if files != len(dataset):
        raise RuntimeError(f"{files} files for {len(dataset)} images")
    print(f"{len(written)} files, read again: sizes and values are right. Pack them:")
    print(source.pack.format(out=args.out))


# --- explain -------------------------------------------------------------------------


def command_explain(args) -> None:
    """The key figure of the checkpoint's paper, drawn from its own tensors."""
    checkpoint, model, normalise = photo_model(args.checkpoint)
    if args.image:
        image = data.read_image(Path(args.image))
    else:
        dataset = data.open_dataset(
            checkpoint["dataset"], "val", root=checkpoint["data_root"],
            difficulty=checkpoint["difficulty"])
        if not 0 <= args.index < len(dataset):
            raise UserError(f"--index {args.index}: val has images 0.."
                            f"{len(dataset) - 1}")
        image = dataset.image(args.index)
    module, _ = load_method(checkpoint["method"])
    if not hasattr(module, "explain"):
        raise UserError(f"{checkpoint['method']} explains nothing yet: "
                        f"{module.__name__}.py has no function explain(model, image, "
                        f"*, palette, classes)")
    if min(image.shape[1:]) < 32:
        raise UserError(f"explain: {' x '.join(map(str, image.shape[1:]))} pixels; it "
                        f"needs 32 x 32, a cell of the encoder")
    with torch.no_grad():
        figure = module.explain(model, normalise(image)[None],
                                palette=checkpoint["palette"],
                                classes=checkpoint["classes"])
    try:
        figure.savefig(args.out, dpi=100)
    except ValueError as error:  # matplotlib knows no format with that ending
        raise UserError(f"--out {args.out}: {error}") from None
    print(f"{checkpoint['method']} explains itself in {args.out}")


# --- export --------------------------------------------------------------------------

TRACED = 2, 97, 161  # batch, H, W while operations are recorded: of no special size
CHECKED = (1, 32, 32), (1, 65, 97), (3, 160, 96)  # what the written file is tried with
TOLERANCE = 1e-3  # of the largest logit
ABOUT = "about.json"  # what else is in the file, under this name
ONNX = "onnx", "onnxscript", "onnxruntime"  # packages that .onnx takes, .pt2 none


class Logits(nn.Module):
    """A model as a function from one tensor to one: images to logits (B, K, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"]


class Exported(nn.Module):
    """A network out of a .pt2 file, as far as `predict` needs a model.

    It has neither parts nor `decode`: a large image takes the memory of its logits.
    """

    def __init__(self, network: nn.Module, num_classes: int):
        super().__init__()
        self.network = network
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> dict:
        return {"out": self.network(images), "aux": []}


class PoolByProducts(nn.Module):
    """What nn.AdaptiveAvgPool2d computes, as two products with matrices of shares.

    ONNX has no such pooling for sizes that are not known before. x (B, C, h, w) ->
    (B, C, *cells).
    """

    def __init__(self, cells: int | tuple[int, int]):
        super().__init__()
        self.cells = cells if isinstance(cells, tuple) else (cells, cells)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        rows = cell_shares(h, self.cells[0]).to(x)  # (cells, h)
        columns = cell_shares(w, self.cells[1]).to(x)  # (cells, w)
        return rows @ x @ columns.T


def cell_shares(size: int, cells: int) -> Tensor:
    """(cells, size): row i averages the positions that cell i touches.

    Those are floor(i size / cells) up to, but without, ceil((i + 1) size / cells).
    """
    cell = torch.arange(cells)[:, None]
    position = torch.arange(size)
    first = cell * size // cells
    end = ((cell + 1) * size + cells - 1) // cells
    inside = ((position >= first) & (position < end)).float()
    return inside / inside.sum(1, keepdim=True)


def pool_by_products(network: nn.Module) -> nn.Module:
    """A copy of it with PoolByProducts in place of each pooling to several cells."""
    network = copy.deepcopy(network)
    for layer in list(network.modules()):
        for name, child in layer.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size != 1:
                setattr(layer, name, PoolByProducts(child.output_size))
    return network


def traced(network: Logits) -> torch.export.ExportedProgram:
    """The operations of the network, recorded once, for any batch and any size from 32.
    """
    config = torch.fx.experimental._config
    if not hasattr(config, "backed_size_oblivious"):
        raise UserError(f"export needs a newer torch than {torch.__version__}; it was "
                        f"run with 2.14")
    any_size = torch.export.Dim.AUTO
    shapes = {0: any_size, 2: any_size(min=32), 3: any_size(min=32)}
    B, H, W = TRACED
    # Without this setting a batch or a map of one would be refused: torch takes sizes
    # of 1 for a case of their own, since they broadcast.
    with config.patch(backed_size_oblivious=True):
        return torch.export.export(network, (torch.zeros(B, 3, H, W),),
                                   dynamic_shapes={"images": shapes})


def write_pt2(network: Logits, about: str, path: Path) -> None:
    torch.export.save(traced(network), path, extra_files={ABOUT: about})


def read_pt2(path: Path):
    """The written network as a function from images to logits."""
    return torch.export.load(path).module()


def write_onnx(network: Logits, about: str, path: Path) -> None:
    written = torch.onnx.export(
        traced(pool_by_products(network)), dynamo=True, verbose=False,
        input_names=["images"], output_names=["logits"])
    images, = written.model.graph.inputs
    logits, = written.model.graph.outputs
    B, _, H, W = images.shape
    logits.shape = type(images.shape)([B, logits.shape[1], H, W])  # not as a formula
    written.model.metadata_props[ABOUT] = about
    written.save(path, external_data=False)


def read_onnx(path: Path):
    """The written network as a function from images to logits, by onnxruntime."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(
        session.run(["logits"], {"images": images.numpy()})[0])


FORMATS = {".pt2": (write_pt2, read_pt2), ".onnx": (write_onnx, read_onnx)}


def about_export(checkpoint: dict) -> dict:
    """What a program that has only the file must know of it."""
    about = {name: checkpoint[name] for name in (
        "method", "options", "backbone", "dataset", "iteration", "classes", "palette",
        "mean", "std")}
    return about | {
        "base_size": trained_size(checkpoint),
        "commit": checkpoint["environment"].get("commit", ""),
        "input": "images (B, 3, H, W), H and W from 32 on: RGB in 0..1, less mean, "
                 "divided by std",
        "output": "logits (B, classes, H, W)"}


def largest_difference(network, reloaded) -> float:
    """Between the logits of both, as a share of the largest logit, over CHECKED."""
    worst = 0.0
    for B, H, W in CHECKED:
        images = torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(0))
        wanted = network(images)
        worst = max(worst, ((reloaded(images) - wanted).abs().max()
                            / wanted.abs().max()).item())
    return worst


@torch.no_grad()
def command_export(args) -> None:
    """The trained network as one file that needs no line of this library to run.

    The file is read again, compared with the checkpoint at sizes at which it was not
    recorded, and only then gets its name.
    """
    out = Path(args.out)
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: must end in {' or '.join(FORMATS)}")
    lacking = [name for name in ONNX if not importlib.util.find_spec(name)]
    if out.suffix == ".onnx" and lacking:
        raise UserError(f"--out {out}: {', '.join(lacking)} not installed; pip install "
                        f"{' '.join(ONNX)}, or give a name with .pt2, which needs none")
    checkpoint, model, _ = photo_model(args.checkpoint)
    for tensor in model.parameters():
        # channels_last, as `restore` has it, is a layout that a batch of one lacks.
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    network = Logits(model).eval()
    about = json.dumps(about_export(checkpoint), indent=1)
    temporary = make_folder(out.parent) / f"{out.stem}.tmp{out.suffix}"
    write, read = FORMATS[out.suffix]
    try:
        write(network, about, temporary)
        difference = largest_difference(network, read(temporary))
        if not difference <= TOLERANCE:  # NaN is none, either
            raise UserError(f"the exported network differs from the checkpoint by "
                            f"{difference:.1e} of the largest logit, more than "
                            f"{TOLERANCE:g}; nothing was kept", code=1)
        os.replace(temporary, out)
    except (OSError, UserError):
        raise
    except Exception as error:  # torch and onnx have kinds of their own for each step
        raise UserError(f"{checkpoint['method']} could not be exported "
                        f"({first_line(error):.300}); nothing was kept, --debug shows "
                        f"more", code=1) from error
    finally:
        temporary.unlink(missing_ok=True)
    sizes = ", ".join("{}x{}x{}".format(*size) for size in CHECKED)
    print(f"{out}: {checkpoint['method']}, iteration {checkpoint['iteration']}; images "
          f"(B, 3, H, W) to logits (B, {len(checkpoint['classes'])}, H, W), any size "
          f"from 32 on; at {sizes} within {difference:.1e} of the largest logit")


def load_exported(path: str, device="cpu"):
    """The three things that `photo_model` gives, of a .pt2 file.

    No module of a method is asked: what the network does stands in the file.
    """
    if not Path(path).is_file():
        raise Damaged(f"no exported network {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            name, = [n for n in archive.namelist() if n.endswith(f"/{ABOUT}")]
            about = json.loads(archive.read(name)) | {"data_root": None}
            if archive.testzip():
                raise ValueError("what is in it does not fit its checksums")
        about["recipe"] = {"base_size": about.get("base_size", (0, 0))}
        normalise = data.normaliser(about["mean"], about["std"])
        program = torch.export.load(path)
    except Exception as error:  # of a damaged file, torch raises a dozen kinds
        raise Damaged(f"{path} is damaged, or not a file of evaluate.py export "
                      f"({first_line(error):.200})") from None
    if torch.device(device).type != "cpu":
        program = torch.export.passes.move_to_device_pass(program, device)
    return about, Exported(program.module(), len(about["classes"])), normalise


# --- cost ----------------------------------------------------------------------------

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
    "2x": "2 per multiply-add",
    "2x+T": "the same, and one multiply-add per element of a division (of logits by T)",
}


def booked(rule: str, layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """Operations that mmcv's or thop's counter books for one call of a layer."""
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


def listen(rule: str, model: nn.Module) -> dict[str, float]:
    """G operations that `rule` books, by part: they come when the model is called."""
    sums = dict.fromkeys([name for name, _ in model.named_children()], 0.0)

    def add(part):
        def hook(layer, inputs, output):
            if isinstance(output, Tensor):
                sums[part] += booked(rule, layer, inputs[0], output) / 1e9
        return hook
    for name, layer in model.named_modules():
        if not list(layer.children()) and name:
            layer.register_forward_hook(add(name.split(".")[0]))
    return sums


@cache  # several tables print one network
def network_cost(spec: str, num_classes: int, size: tuple[int, int], backbone: str,
                 options: str, rule: str) -> tuple[dict, dict]:
    """count_cost of a network, and {part: G operations} as `rule` counts them."""
    more = {key: ast.literal_eval(text) for key, _, text in
            (pair.partition("=") for pair in options.split())}
    model, images = shapes_only(spec, num_classes, size, backbone=backbone, **more)
    sums = listen(rule, model)
    parts = count_cost(model, images)
    if rule == "plain" or rule.startswith("2x"):
        counted = count_cost(model, images, divisions=True) if rule == "2x+T" else parts
        factor = 1 if rule == "plain" else 2
        return parts, {part: factor * cost["gmacs"] for part, cost in counted.items()}
    return parts, sums | {"total": sum(sums.values())}


def cost_row(config: dict, values: dict, rule: str | None) -> dict:
    """Ours beside what a paper prints for one network.

    `config` are the columns of results/published.csv that say which network, `values`
    {quantity: its row}. `compared` is empty for a network that is not built here.
    """
    stated = [row for name, row in values.items() if name in QUANTITIES]
    rule = rule or next((row["rule"] for row in stated), "") or "plain"
    if rule not in RULES:
        raise UserError(f"results/published.csv, {config['method']}: no rule {rule!r}; "
                        f"there are {', '.join(RULES)}")
    result = config | {
        "rule": rule,
        "why": next((row["why"] for row in stated if row["why"]), ""),
        "published": {name: row["value"] for name, row in values.items()},
        "compared": {}, "parts": None}
    method, _, variant = config["method"].partition(":")
    if (variant or "default") not in load_method(method)[0].VARIANTS:
        return result
    size = tuple(map(int, config["size"].split("x")))
    parts, counted = network_cost(config["method"], int(config["classes"]), size,
                                  config["backbone"], config["options"], result["rule"])
    for quantity, row in values.items():
        if quantity not in QUANTITIES:
            continue
        if quantity == "params (M)":
            ours = parts["total"]["params"] + float(row["unused"] or 0)
            if row["aux"] == "no":
                ours -= parts["aux_heads"]["params"]
        else:
            ours = counted[QUANTITIES[quantity]]
        theirs, decimals = float(row["value"]), len(row["value"].partition(".")[2])
        result["compared"][quantity] = {
            "ours": ours, "published": theirs, "difference": ours / theirs - 1,
            "rounds": abs(ours - theirs) <= 0.5001 * 10**-decimals}
    return result | {"parts": parts}


CONFIG = ("paper", "table", "method", "options", "backbone", "size", "classes")
QUANTITIES = {"GMACs": "total", "decoder GMACs": "decoder", "params (M)": "params"}


def cost_rows(names: list[str], *, rule: str | None = None,
              only_published=True) -> list[dict]:
    """Every published cost of the named methods or variants, with ours beside it.

    Unless `only_published`, variants without one are counted, too.
    """
    rows = []
    for name in names:
        method, _, variant = name.partition(":")
        load_method(name)
        configs = {}
        for row in published(method):
            configs.setdefault(tuple(row[key] for key in CONFIG), {})[
                row["quantity"]] = row
        wanted = [(dict(zip(CONFIG, key)), values) for key, values in configs.items()
                  if {"GMACs", "decoder GMACs"} & set(values)]
        if not only_published:
            stated = {config["method"] for config, _ in wanted}
            wanted += [
                ({"paper": "", "table": "", "method": spec, "options": "",
                  "backbone": "resnet50", "size": "1024x2048", "classes": "19"}, {})
                for spec in (method if each == "default" else f"{method}:{each}"
                             for each in load_method(method)[0].VARIANTS)
                if spec not in stated]
        exact = f"{method}:{variant}" if variant not in ("", "default") else method
        rows += [cost_row(config, values, rule) for config, values in wanted
                 if ":" not in name or config["method"] == exact]
    return rows


def cost_line(row: dict) -> str:
    """One row of `cost` for the screen."""
    parts = row["parts"]
    gmacs = f"{'not built':>45}" if not parts else "".join(
        f"{parts[p]['gmacs']:>9.2f}" if p in parts else f"{'-':>9}"
        for p in ("encoder", "context", "decoder", "total")
    ) + f"{parts['total']['params']:>8.2f}M"
    shown = ", ".join(
        f"{key} {c['ours']:.2f}/{c['published']:.4g} ({c['difference']:+.2%})"
        for key, c in row["compared"].items())
    if not shown:
        stated = row["published"].get("GMACs")
        shown = f"GMACs ?/{stated}" if stated else "nothing published"
    return (f"{row['paper'] + ' ' + row['table']:<18}{row['method']:<34}"
            f"{row['backbone']:<19}{row['size']:<10}{row['classes']:>4}{gmacs}  "
            f"{row['rule']}: {shown}{'  ! ' + row['why'] if row['why'] else ''}")


def command_cost(args) -> None:
    """GMACs and parameters by part, and ours beside the papers' by the papers' counter.

    Parameters include the auxiliary heads, GMACs do not: they are gone in evaluation.
    """
    rows = cost_rows(args.methods or methods(), rule=args.rule,
                     only_published=not args.methods)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'table':<18}{'method':<34}{'backbone':<19}{'H x W':<10}{'K':>4}"
          f"{'encoder':>9}{'context':>9}{'decoder':>9}{'total':>9}{'params':>9}"
          "  rule: ours / published (difference)")
    for row in rows:
        print(cost_line(row))
    print("GMACs by part: plain. Rules:")
    for name, text in RULES.items():
        print(f"  {name:<10} {text}")


# --- table ---------------------------------------------------------------------------


def fingerprint(method: str, num_classes: int, backbone: str, options: dict) -> str:
    """Equal for two networks that start with, say, and learn the same.

    All buffers are moved a little before they speak, because some are zero until
    training fills them. Some options act in training alone, as a share of dropout does:
    so it speaks once in training, too.
    """
    torch.manual_seed(0)
    model = build_model(method, num_classes, backbone=backbone, **options).eval()
    channels = num_classes if backbone == LABELS else 3
    images = torch.linspace(-2, 2, 2 * channels * 64 * 64).reshape(2, channels, 64, 64)
    learned = torch.tensor([weight.requires_grad for weight in model.parameters()])
    tensors = [learned, *(x.clone() for x in model.state_dict().values())]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was fitted to labels
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer += 0.01
        tensors.append(model(images)["out"])
        torch.manual_seed(0)
        outputs = model.train()(images)
        tensors += [outputs["out"], *outputs["aux"]]
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()


def used_options(checkpoint: dict) -> dict:
    """The options of a run, without those that its variant does not use."""
    options = checkpoint["options"]
    network = (checkpoint["method"], len(checkpoint["classes"]), checkpoint["backbone"])
    whole = fingerprint(*network, options)

    def matters(name: str) -> bool:
        try:
            return whole != fingerprint(
                *network, {k: v for k, v in options.items() if k != name})
        except (UserError, *MISFITS):  # there is no such network without it
            return True
    return {name: value for name, value in options.items() if matters(name)}


def run_facts(checkpoint: dict, used: dict) -> dict[str, str]:
    """All that makes a run what it is, but for its seed: {name: value} as text.

    Threads and versions are not in it: they change the last bits, not the experiment.
    """
    module, variant = load_method(checkpoint["method"])
    facts = {"method": module.__name__} | variant | used
    facts |= checkpoint["recipe"]
    facts |= {name: checkpoint[name] for name in (
        "dataset", "backbone", "difficulty", "amp", "train_split", "train_images",
        "data_root", "finetune_from")}
    facts |= {name: checkpoint["environment"][name] for name in (
        "device", "processes", "accumulate", "compile", "commit")}
    facts |= {name: checkpoint["args"][name] for name in ("tf32", "deterministic")}
    return {name: str(value) for name, value in facts.items()}


def run_row(checkpoint: dict) -> dict:
    """What one run says of itself: what it is, its cost, mIoU of last.pt, speed."""
    size = checkpoint["recipe"]["crop"]
    cost = count_cost(*shapes_only(
        checkpoint["method"], len(checkpoint["classes"]), tuple(size),
        backbone=checkpoint["backbone"], **checkpoint["options"]))["total"]
    speeds = [float(row["images_per_s"]) for row in checkpoint["log"]
              if row.get("images_per_s")]
    used = used_options(checkpoint)
    return {"facts": run_facts(checkpoint, used), "seed": checkpoint["seed"],
            "name": " ".join([checkpoint["method"], *(
                f"{k}={v}" for k, v in used.items() if k != "channels")]),
            "dataset": checkpoint["dataset"], "backbone": checkpoint["backbone"],
            "gmacs": cost["gmacs"], "steps": checkpoint["evaluated"],
            "params (M)": f"{cost['params']:.2f}",
            "GMACs": "{:.2f} at {}x{}".format(cost["gmacs"], *size),
            "miou": checkpoint["miou"],
            "img/s": float(np.median(speeds)) if speeds else math.nan}


def finished_runs(folders: list[str]) -> list[dict]:
    """The rows of the runs that have ended; of the others a sentence."""
    rows = []
    for folder in folders:
        try:
            checkpoint = load_checkpoint(folder)
            if checkpoint["evaluated"] < checkpoint["steps"]:
                raise UserError(f"{folder} was scored last after "
                                f"{checkpoint['evaluated']} of {checkpoint['steps']} "
                                f"steps")
            rows.append(run_row(checkpoint) | {"folder": folder})
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not rows:
        raise UserError("no finished run among these")
    return rows


def distinguished(groups: list[list[dict]]) -> list[str]:
    """A name for each group, with what tells it from others on its data set."""
    names = []
    for first in (group[0] for group in groups):
        facts = [g[0]["facts"] for g in groups if g[0]["dataset"] == first["dataset"]]
        words = first["name"].split()
        own = first["facts"]
        # Width is not in a run's name, and a paper's recipe does not state it.
        unstated = any("channels" not in other and other["method"] == own["method"]
                       for other in facts)
        words += [f"{key}={value}" for key, value in own.items() if key != "method"
                  and (any(other.get(key, value) != value for other in facts)
                       or key == "channels" and unstated)]
        names.append(" ".join(dict.fromkeys(words)))  # each word once
    return names


def by_configuration(folders: list[str]) -> list[tuple[str, list[dict]]]:
    """[(name, rows of the finished runs that differ in the seed alone, by seed)].

    Two may have the same name if they are of different data sets.
    """
    grouped: dict[str, list[dict]] = {}
    for row in finished_runs(folders):
        grouped.setdefault(json.dumps(row["facts"], sort_keys=True), []).append(row)
    groups = [sorted(g, key=lambda r: r["seed"]) for g in grouped.values()]
    for rows in groups:
        for one, two in zip(rows, rows[1:]):
            if one["seed"] == two["seed"]:
                raise UserError(f"{one['folder']} and {two['folder']} are the same run "
                                f"with the same seed, {one['seed']}: name one of them")
    return list(zip(distinguished(groups), groups))


def command_table(args) -> None:
    """Markdown to the screen, csv with --csv: a line per configuration, over seeds.

    Runs that differ in anything but the seed are different lines.
    """
    table = []
    for name, rows in by_configuration(args.runs):
        scores = [row["miou"] for row in rows]
        spread = f" ± {np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
        table.append({
            "method": name,
            **{key: rows[0][key] for key in ("dataset", "backbone", "steps",
                                             "params (M)", "GMACs")},
            "mIoU": f"{np.mean(scores):.4f}{spread}", "n": len(scores),
            "each seed": " ".join(f"{s:.4f}" for s in scores),
            "img/s": f"{np.median([r['img/s'] for r in rows]):.1f}"})
    print("| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.csv:
        write_csv(args.csv, table)


def write_csv(path: str | Path, table: list[dict]) -> None:
    """A line per row; a row may lack columns that others have."""
    columns = dict.fromkeys(key for row in table for key in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


# --- compare -------------------------------------------------------------------------

DRAWS = 2000  # of the bootstrap
NEAR = 3      # pixels from a class boundary
# Student's t by degrees of freedom: so many standard errors are 95 %. Beyond: 2.2.
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


def mious(counts: Tensor) -> Tensor:
    """mIoU of confusion matrices (.., K, K), over the classes that occur in each."""
    return ious(counts).nanmean(-1)


def bootstrap(counts: Tensor, *, block=1, draws=DRAWS) -> Tensor:
    """How else the mIoU might have come out: (R, N, K, K) of R runs -> (R, draws).

    For each draw, as many images as there are are drawn with replacement, the same ones
    for every run, and their matrices are added up. So the difference of two runs in one
    draw is that on equal images, and over equal classes: one that some image has, but
    no drawn one, is left out for all, though a run may have found it there. One that no
    image has counts as in the mIoU of all: 0 for the runs that have found it.

    Images that are drawn one by one are taken for independent. Neighbouring frames of a
    video are not: they say nearly the same twice, and the interval comes out too
    narrow. With `block`, that many consecutive images are drawn at a time; the first
    follows the last (circular block bootstrap, Politis and Romano 1992).
    """
    R, N, K, _ = counts.shape
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(N, (draws, math.ceil(N / block)), generator=generator)
    picked = (starts[..., None] + torch.arange(block)).flatten(1)[:, :N] % N
    times = torch.zeros(draws, N).scatter_add_(1, picked, torch.ones(draws, N))
    flat = counts.reshape(R, N, K * K).float()
    summed = (torch.cat([part @ run for part in times.split(100)]) for run in flat)
    there = counts.sum((0, 1, 3)) > 0  # (K,)
    scores = []
    for run in summed:
        matrices = run.reshape(draws, K, K)
        missed = there & (matrices.sum(-1) == 0)  # (draws, K)
        scores.append(ious(matrices).masked_fill(missed, math.nan).nanmean(-1))
    return torch.stack(scores)


def interval(values: Tensor) -> tuple[float, float]:
    """From the 2.5th to the 97.5th percentile of the draws that have a valid pixel."""
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return low.item(), high.item()


class Compared:
    """What several runs say of the same images: a matrix per run and image, twice.

    `counts` (R, N, K, K) is over all valid pixels, `near` over those at a boundary of
    two classes. `differ` (N,) is the share of pixels that not all of the `pictured`
    runs call the same.
    """

    def __init__(self, images: int, num_classes: int, *, runs: int,
                 pictured: list[int]):
        self.pictured = pictured
        shape = runs, images, num_classes, num_classes
        self.counts = torch.zeros(shape, dtype=torch.int32)
        self.near = torch.zeros(shape, dtype=torch.int32)
        self.differ = torch.zeros(images)

    def update(self, index: int, labels: Tensor, guesses: list[Tensor]) -> None:
        band = dilate(class_boundary(labels), NEAR)
        at_boundary = torch.where(band, labels, IGNORE_INDEX)
        for run, guess in enumerate(guesses):
            for counts, truth in ((self.counts, labels), (self.near, at_boundary)):
                matrix = ConfusionMatrix(counts.shape[-1])
                matrix.update(truth, guess)
                counts[run, index] = matrix.counts
        shown = [guesses[run] for run in self.pictured]
        self.differ[index] = disagreement(labels, shown).mean()


def disagreement(labels: Tensor, guesses: list[Tensor]) -> Tensor:
    """(H, W) of 0 and 1: the valid pixels that not all runs call the same."""
    guesses = torch.stack(guesses)
    differ = (guesses != guesses[0]).any(0) & (labels != IGNORE_INDEX)
    return differ.float()


def compared_rows(groups: dict[str, list[dict]], seen: Compared,
                  classes: list[str], *, block=1) -> list[dict]:
    """A row per configuration; differences are to the first one, on equal images.

    A configuration's mIoU is the mean over its seeds, in every draw of the bootstrap.
    """
    runs = [row for rows in groups.values() for row in rows]
    drawn = bootstrap(seen.counts, block=block)
    drawn_near = bootstrap(seen.near, block=block)
    per_image, whole = mious(seen.counts), mious(seen.counts.sum(1))
    near = mious(seen.near.sum(1))
    of_classes = ious(seen.counts.sum(1))
    valid = ~per_image[0].isnan()
    table = []
    first = None
    for name, rows in groups.items():
        mine = [i for i, run in enumerate(runs) if run in rows]
        first = first or mine
        beyond = per_image[mine].mean(0) - per_image[first].mean(0)
        low, high = interval(drawn[mine].mean(0))
        gain_low, gain_high = interval(drawn[mine].mean(0) - drawn[first].mean(0))
        near_low, near_high = interval(drawn_near[mine].mean(0)
                                       - drawn_near[first].mean(0))
        row = {"method": name, "n": len(mine), "miou": whole[mine].mean().item(),
               "low": low, "high": high,
               "seeds": whole[mine].std().item() if len(mine) > 1 else math.nan,
               "gmacs": rows[0]["gmacs"],
               "difference": (whole[mine].mean() - whole[first].mean()).item(),
               "difference low": gain_low, "difference high": gain_high,
               "images won": int((beyond > 0).sum()),
               "images lost": int((beyond < 0).sum()), "images": int(valid.sum()),
               f"miou within {NEAR} px": near[mine].mean().item(),
               f"difference within {NEAR} px": (near[mine].mean()
                                                - near[first].mean()).item(),
               f"difference within {NEAR} px low": near_low,
               f"difference within {NEAR} px high": near_high}
        row |= {f"iou {label}": iou for label, iou in
                zip(classes, of_classes[mine].mean(0).tolist())}
        table.append(row)
    return table


def compared_groups(groups: list[tuple[str, list[dict]]]) -> dict[str, list[dict]]:
    """A group per configuration; of a single one each seed is compared with the first.
    """
    sets = {rows[0]["dataset"] for _, rows in groups}
    if len(sets) > 1:
        raise UserError(f"the runs are of several data sets, {', '.join(sorted(sets))}:"
                        f" not comparable")
    if len(dict(groups)) < len(groups):
        raise RuntimeError(f"two configurations have one name: {dict(groups).keys()}")
    if len(groups) > 1:
        return dict(groups)
    name, rows = groups[0]
    if len(rows) == 1:
        raise UserError(f"{rows[0]['folder']} alone: compare needs two finished runs")
    return {f"{name} seed={row['seed']}": [row] for row in rows}


def in_words(row: dict, first_row: dict) -> str:
    """What the interval of a difference, and the spread over seeds, allow to say."""
    name = row["method"]
    first = first_row["method"]
    low = row["difference low"]
    high = row["difference high"]
    between = f"{row['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]"
    if low <= 0 <= high:
        return (f"{name} and {first} are not told apart by these images: {between}. "
                f"Other images of this kind may order them otherwise.")
    order = "ahead of" if row["difference"] > 0 else "behind"
    said = f"{name} is {order} {first} on images of this kind: {between}."
    # Of a difference of two means over seeds; NaN if one of them has one seed.
    error = math.sqrt(sum(each["seeds"]**2 / each["n"] for each in (row, first_row)))
    freedom = row["n"] + first_row["n"] - 2
    needed = STUDENT.get(freedom, 2.2) * error
    if abs(row["difference"]) < needed:
        said += (f" But {row['n']} and {first_row['n']} seeds, as far apart as these "
                 f"are, tell methods apart that differ by {needed:.4f} or more (95 %): "
                 f"other trainings of the two may come out otherwise.")
    return said


def compare_text(table: list[dict], absent: list[str]) -> str:
    """The rows for reading; `absent`: classes of no pixel that some run has found."""
    at = f"within {NEAR} px"
    lines = []
    for row in table:
        spread = ""
        if row["n"] > 1:
            spread = f" ± {row['seeds']:.4f} over {row['n']} seeds"
        lines.append(f"{row['method']}: mIoU {row['miou']:.4f}, 95 % interval "
                     f"[{row['low']:.4f}, {row['high']:.4f}]{spread}; {at} of a class "
                     f"boundary {row[f'miou {at}']:.4f}")
    for row in table[1:]:
        low = row[f"difference {at} low"]
        high = row[f"difference {at} high"]
        lines.append(in_words(row, table[0]))
        lines.append(f"  by each image's own mIoU ahead in {row['images won']}, behind "
                     f"in {row['images lost']} of {row['images']}; {at} of a boundary "
                     f"{row[f'difference {at}']:+.4f} [{low:+.4f}, {high:+.4f}]")
    within = [row["low"] <= row["miou"] <= row["high"] and row["difference low"]
              <= row["difference"] <= row["difference high"] for row in table]
    if not all(within):
        lines.append("An interval without the number that it is of: some class is in "
                     "so few of these images that a bootstrap over them says little.")
    if absent:
        lines.append(f"No pixel is {', '.join(absent)}: for a run that has found it "
                     f"there, its IoU is 0, for the others it is left out.")
    return "\n".join(lines)


def nowhere(counts: Tensor, classes: list[str]) -> list[str]:
    """Classes that some run has found, but no pixel is: counts (R, N, K, K)."""
    found = counts.sum((0, 1, 2)) > 0  # (K,)
    true = counts[0].sum((0, 2)) > 0
    return [name for name, one in zip(classes, found & ~true) if one]


def about_seeds(groups: dict[str, list[dict]]) -> str:
    """What the intervals leave out: they are over images, of trainings as they are."""
    runs = [rows[0] for rows in groups.values()]
    if all(run["facts"] == runs[0]["facts"] for run in runs):
        return ("All are the same experiment: so much the seed alone does. A "
                "difference of two methods means little unless it is larger.")
    if any(len(rows) == 1 for rows in groups.values()):
        return ("The intervals are over images. What another seed would do, a method "
                "with one run does not say.")
    return ("The intervals are over images, of means over seeds; ± is the spread of "
            "the seeds.")


def command_compare(args) -> None:
    """Runs side by side on the same images: intervals, paired differences, a picture.

    The interval is about the images: what other images of the same kind would give. How
    other seeds would come out, the spread over the seeds says, if there are some.
    """
    groups = compared_groups(by_configuration(args.runs))
    runs = [row for rows in groups.values() for row in rows]
    checkpoints = [load_checkpoint(row["folder"]) for row in runs]
    dataset = open_compared(args, runs, checkpoints)
    protocol = protocol_of(args, checkpoints[0])
    models = [restore(checkpoint, usable(args.device)) for checkpoint in checkpoints]
    del checkpoints  # weights and optimizers: the models have what is needed
    every = math.ceil(len(dataset) / args.images) if args.images else 1
    indices = range(0, len(dataset), every)
    if args.block > max(1, len(indices) // 5):
        raise UserError(f"--block {args.block}: {len(indices)} images have fewer than "
                        f"five such blocks, and an interval would say nothing; pass "
                        f"{max(1, len(indices) // 5)} or less")
    loader = data.val_loader(dataset, workers=args.workers, step=every)
    K = len(dataset.info.classes)
    first_seeds = [runs.index(rows[0]) for rows in groups.values()]
    seen = Compared(len(indices), K, runs=len(runs), pictured=first_seeds)

    @torch.inference_mode()
    def guess(inputs: Tensor) -> list[Tensor]:
        return [predict(model, inputs.to(args.device), protocol).cpu()
                for model in models]
    for step, (inputs, labels) in enumerate(loader):
        seen.update(step, labels[0], guess(inputs))
        progress(step + 1, len(loader))
    table = compared_rows(groups, seen, dataset.info.classes, block=args.block)
    print(f"{dataset.info.name} {args.split}, {len(indices)} images, {protocol}; "
          f"differences are to {table[0]['method']}")
    print(compare_text(table, nowhere(seen.counts, dataset.info.classes)))
    print(about_seeds(groups))
    if args.block == 1:
        print("Images count as independent. If they are frames of a video, these "
              "intervals are too narrow: see --block.")
    out = make_folder(args.out)
    nulls = [{key: None if value != value else value for key, value in row.items()}
             for row in table]  # JSON knows no NaN
    report = {"dataset": dataset.info.name, "split": args.split, "images": len(indices),
              "protocol": str(protocol), "draws": DRAWS, "block": args.block,
              "runs": [str(row["folder"]) for row in runs], "rows": nulls}
    (out / "compare.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    write_csv(out / "compare.csv", table)
    shown = [(indices[i], *dataset.load(indices[i])) for i in shown_images(seen.differ)]
    guesses = [guess(data.NORMALISE(image)[None]) for _, image, _ in shown]
    compare_picture(table, shown, [[each[i] for i in first_seeds] for each in guesses],
                    dataset.info, out / "compare.png")
    print(f"{out}: compare.json, compare.csv, compare.png")


def shown_images(differ: Tensor) -> list[int]:
    """Two images with much disagreement; frames of one moment would be one picture."""
    apart = len(differ) // 10
    chosen: list[int] = []
    for i in differ.argsort(descending=True).tolist():
        if all(abs(i - other) > apart for other in chosen):
            chosen.append(i)
    return sorted(chosen[:2])


def open_compared(args, runs: list[dict], checkpoints: list[dict]):
    """The images for all runs, which must have learned the same classes from them."""
    first = checkpoints[0]
    for row, checkpoint in zip(runs, checkpoints):
        for what in ("classes", "train_split", "difficulty", "data_root"):
            if checkpoint[what] == first[what]:
                continue
            if what == "data_root" and args.data_root:  # it may only have been moved
                print(f"warning: {row['folder']} has learned from {checkpoint[what]}, "
                      f"{runs[0]['folder']} from {first[what]}: not comparable if "
                      f"these are other images", file=sys.stderr)
            else:
                raise UserError(
                    f"{row['folder']} has another {what} than {runs[0]['folder']} "
                    f"({checkpoint[what]!r:.60}, {first[what]!r:.60}): not comparable")
        if checkpoint["backbone"] == LABELS:
            raise UserError(f"{row['folder']} reads the ground truth: only `score` "
                            f"takes it")
        sizes = [trained_size(each) for each in (checkpoint, first)]
        if sizes[0] != sizes[1] and not args.base_size:
            raise UserError(f"{row['folder']} resizes images into {sizes[0]}, "
                            f"{runs[0]['folder']} into {sizes[1]} (0: not): pass one "
                            f"--base-size for all")
    args.dataset, args.checkpoint = None, runs[0]["folder"]
    return open_scored(args, first)


def compare_picture(table: list[dict], shown: list, guesses: list, info,
                    path: Path) -> None:
    """The images that the runs disagree on most, whole and where they do; and numbers.

    shown: [(index, image, labels)], guesses: of each one, the ids by each method, from
    its first seed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    columns, rows = 2 + len(table), 2 * len(shown)
    H, W = shown[0][2].shape
    side = max(2.4, 12 / columns)  # inches; the numbers below need 12 in all
    heights = side * rows * H / W + 0.4, max(2.8, 0.4 * len(table) + 1)
    figure = Figure(figsize=(side * columns, sum(heights)), dpi=100,
                    layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    axes = upper.subplots(rows, columns, squeeze=False)
    shared, names = short_names([row["method"] for row in table])
    if shared:
        figure.suptitle(shared, fontsize=9)
    titles = ["image", "truth"]
    for name, row in zip(names, table):
        seeds = f", mean of {row['n']} seeds" if row["n"] > 1 else ""
        titles.append(textwrap.fill(name, 30, break_on_hyphens=False)
                      + f"\n{row['miou']:.3f}{seeds}")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for i, ((index, image, labels), each) in enumerate(zip(shown, guesses)):
        truth = labels.numpy()
        layers = [image.permute(1, 2, 0).numpy(), data.colourise(truth, info.palette)]
        layers += [data.colourise(np.where(truth == IGNORE_INDEX, truth, ids.numpy()),
                                  info.palette) for ids in each]
        top, left, h, w = where_they_differ(labels, each)
        for axis, layer in zip(axes[2 * i], layers):
            axis.imshow(layer, interpolation="nearest")
            axis.add_patch(Rectangle((left, top), w, h, fill=False, edgecolor="white"))
        for axis, layer in zip(axes[2 * i + 1], layers):
            axis.imshow(layer[top:top + h, left:left + w], interpolation="nearest")
        axes[2 * i, 0].set_ylabel(f"image {index}", fontsize=8)
        axes[2 * i + 1, 0].set_ylabel("enlarged", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    forest, cost, key = lower.subplots(1, 3, width_ratios=(3, 3, 1.6))
    draw_numbers(forest, cost, table, names)
    maps = [labels for _, _, labels in shown]
    maps += [ids for each in guesses for ids in each]
    occurring = torch.cat([ids.unique() for ids in maps])
    patches = class_patches(occurring, label_colours(info.palette, len(info.classes)),
                            info.classes)
    if (occurring == IGNORE_INDEX).any():
        colour = np.array(data.ignored_colour(info.palette)) / 255
        patches.append(Patch(color=colour, label="ignored"))
    key.legend(handles=patches, loc="center right", frameon=False, fontsize=8,
               ncols=math.ceil(len(patches) / 12))
    key.axis("off")
    figure.savefig(path)


def short_names(names: list[str]) -> tuple[str, list[str]]:
    """The words that all names have, and each name without them: for a picture.

    If a name has no other words, all names stay whole.
    """
    # A word begins with `name=`, so that "scale=[0.5, 2.0]" is one.
    words = [re.split(r" (?=\w+=)", name) for name in names]
    shared = [word for word in words[0] if all(word in other for other in words)]
    short = [" ".join(word for word in own if word not in shared) for own in words]
    return (" ".join(shared), short) if all(short) else ("", names)


def where_they_differ(labels: Tensor, guesses: list[Tensor]) -> tuple[int, ...]:
    """(top, left, h, w) of the quarter, by side, of an image with most disagreement.

    Only disagreement near class boundaries counts: what decoders are judged by. Large
    regions of a wrong class would draw the frame away from it.
    """
    h, w = (max(1, n // 4) for n in labels.shape)
    differ = disagreement(labels, guesses) * dilate(class_boundary(labels), NEAR)
    # One side after the other: a square kernel would read each pixel h * w times.
    density = F.avg_pool2d(F.avg_pool2d(differ[None], (h, 1), 1), (1, w), 1)[0]
    return *divmod(int(density.argmax()), density.shape[1]), h, w


def draw_numbers(forest, cost, table: list[dict], names: list[str]) -> None:
    """Left the differences to the first method with their intervals, right the cost."""
    for y, row in enumerate(table):
        ends = [100 * row["difference low"], 100 * row["difference high"]]
        forest.plot(ends, [y, y], color="0.5", lw=3)
        forest.plot(100 * row["difference"], y, "o", color="black")
    by_score = sorted(zip(table, names), key=lambda pair: pair[0]["miou"])
    # What a line of text takes of the axis: of two names, the upper one makes room.
    line = 0.08 * (by_score[-1][0]["miou"] - by_score[0][0]["miou"])
    height = -math.inf
    for row, name in by_score:
        height = max(row["miou"], height + line)
        cost.plot(row["gmacs"], row["miou"], "o", color="black")
        cost.text(row["gmacs"], height, f"  {name}", va="center", fontsize=8)
    forest.axvline(0, color="0.7", lw=1)
    forest.set_yticks(range(len(names)), [
        textwrap.fill(name, 45, break_on_hyphens=False) for name in names], fontsize=8)
    forest.invert_yaxis()
    forest.margins(y=0.15)
    forest.set_xlabel(textwrap.fill(f"points of mIoU beyond {names[0]},", 45) +
                      "\n95 % interval over images", fontsize=9)
    cost.margins(y=0.15)
    cost.set(ylabel="mIoU", xlim=(0, 2 * max(row["gmacs"] for row in table)))
    cost.set_xlabel("GMACs of a training crop", fontsize=9)


# --- speed ---------------------------------------------------------------------------

ROUNDS, WARM_UP = 7, 2
PARTS = "encoder", "context", "decoder"


class Stopwatch:
    """Times of each call of a model, and in it of its `parts`.

    A GPU works behind the program's back. There, marks in its own queue are what is
    timed: if the program waited at the end of each part, the GPU would then stand idle
    until the next one is sent. Where it stands idle within a part, that is in the time.
    """

    def __init__(self, model: nn.Module, device, *, parts=PARTS):
        self.on_gpu = torch.device(device).type == "cuda"
        self.begun = {}
        self.spans = {"total": []}  # (start, end) of each call
        for name in parts:
            if hasattr(model, name):
                part = getattr(model, name)
                self.spans[name] = []
                part.register_forward_pre_hook(lambda *_, name=name: self.start(name))
                part.register_forward_hook(lambda *_, name=name: self.stop(name))

    def mark(self):
        """Now: seconds, or a mark that the GPU sets when its queue has come to it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str) -> None:
        if self.on_gpu and name == "total":
            torch.cuda.synchronize()  # what others have left to do is not this one's
        self.begun[name] = self.mark()

    def stop(self, name: str) -> None:
        self.spans[name].append((self.begun[name], self.mark()))

    def seconds(self) -> dict[str, list[float]]:
        """{"total" or the name of a part: seconds of each call}."""
        if self.on_gpu:
            torch.cuda.synchronize()
            length = lambda start, end: start.elapsed_time(end) / 1000
        else:
            length = lambda start, end: end - start
        return {name: [length(*span) for span in spans]
                for name, spans in self.spans.items()}


def speed_subject(args, spec: str, size: tuple[int, int], num_classes: int):
    """A network with random weights and a batch of random images."""
    torch.manual_seed(0)
    model = build_model(spec, num_classes, backbone=args.backbone)
    images = torch.randn(args.batch, 3, *size, device=args.device)
    return (model.to(args.device, memory_format=torch.channels_last),
            images.to(memory_format=torch.channels_last))


def speed_step(model: nn.Module, images: Tensor, args):
    """A function that does once what is timed: inference, or a training step."""
    labels = torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8,
                         device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    run = torch.compile(model) if args.compile else model

    def inference():
        with torch.inference_mode(), autocast(args.device, args.amp):
            run(images)

    def training():
        optimizer.zero_grad(set_to_none=True)
        with autocast(args.device, args.amp):
            outputs = run(images)
        segmentation_loss(outputs, labels)[0].backward()
        optimizer.step()
    model.train(args.train)
    return training if args.train else inference


def take_turns(args, size: tuple[int, int], num_classes: int) -> dict[str, Stopwatch]:
    """{method: its times}; in every round each has its turn, in another order.

    What slows the machine down for a while thus slows all of them.
    """
    timed = {}
    # A clock inside of the network would make torch.compile cut it into pieces.
    parts = () if args.compile else PARTS
    for spec in args.methods:
        model, images = speed_subject(args, spec, size, num_classes)
        timed[spec] = (Stopwatch(model, args.device, parts=parts),
                       speed_step(model, images, args))
    order = list(timed)
    for turn in range(WARM_UP + args.rounds):
        for spec in order[turn % len(order):] + order[:turn % len(order)]:
            watch, step = timed[spec]
            watch.start("total")
            step()
            watch.stop("total")
            progress(turn + 1, WARM_UP + args.rounds)
    return {spec: watch for spec, (watch, _) in timed.items()}


def speed_row(args, spec: str, size: tuple[int, int], num_classes: int,
              watch: Stopwatch) -> dict:
    """Milliseconds (median and quartiles), images and GMACs per second, memory."""
    cost = count_cost(*shapes_only(spec, num_classes, size, backbone=args.backbone))
    quartiles = lambda times: np.percentile(times[WARM_UP:], (50, 25, 75)) * 1000
    seconds = watch.seconds()
    total, low, high = quartiles(seconds["total"])
    gmacs = cost["total"]["gmacs"]
    row = {"method": spec, "size": "{}x{}".format(*size), "classes": num_classes,
           "ms": total, "low": low, "high": high, "n": args.rounds,
           "images/s": 1000 * args.batch / total, "GMACs": gmacs}
    if not args.train:  # GMACs are of a forward pass
        row["GMACs/s"] = 1000 * args.batch * gmacs / total
    part = "forward {} ms" if args.train else "{} ms"
    row |= {part.format(name): quartiles(times)[0] for name, times in seconds.items()
            if name != "total" and len(times) > WARM_UP}
    row["peak GB"] = memory_of(args, spec, size, num_classes)
    return row | {"timed": "training step" if args.train else "inference",
                  "batch": args.batch, "backbone": args.backbone,
                  "device": args.device, "threads": torch.get_num_threads(),
                  "amp": args.amp, "compiled": args.compile}


def memory_of(args, spec: str, size: tuple[int, int], num_classes: int) -> float:
    """Peak memory in GB of inference, or of a training step that has momentum: the 2nd.

    A GPU's is counted by tensors, so that what was there before can be subtracted. A
    process' is not: there the step has a process of its own.
    """
    if torch.device(args.device).type == "cuda":
        gc.collect()  # garbage freed during the step would make the difference small
        before = torch.cuda.memory_allocated(args.device) / 1e9
        torch.cuda.reset_peak_memory_stats(args.device)
        few_steps(args, spec, size, num_classes)
        return peak_memory(args.device) - before
    line = [sys.executable, __file__, "speed", spec, "--size", "{}x{}".format(*size),
            "--classes", str(num_classes), "--backbone", args.backbone, "--batch",
            str(args.batch), "--device", args.device, "--amp", args.amp, "--peak"]
    line += ["--train"] * args.train + ["--compile"] * args.compile
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"warning: memory of {spec} is not known ({why})", file=sys.stderr)
        return math.nan
    return float(done.stdout.split()[-1])


def few_steps(args, spec: str, size: tuple[int, int], num_classes: int) -> None:
    step = speed_step(*speed_subject(args, spec, size, num_classes), args)
    for _ in range(2 if args.train else 1):
        step()


def command_speed(args) -> None:
    """Time, memory and multiply-adds of methods, side by side on this machine.

    The encoder's time is in the total; so is what lies between and behind the parts,
    as the last enlargement. Ratios to the first method are from the same rounds.
    """
    usable(args.device)
    if args.train and args.batch < 2:
        raise UserError("--train: batch norm needs --batch 2 or more")
    if args.peak:  # asked by memory_of
        few_steps(args, args.methods[0], args.size[0], args.classes[0])
        print(peak_memory(args.device))
        return
    table = [speed_row(args, spec, size, classes, watch)
             for size in args.size for classes in args.classes
             for spec, watch in take_turns(args, size, classes).items()]
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print(f"{speed_setting(table[0])}; median of {args.rounds}, quartiles")
        for row in table:
            first = next(r for r in table if all(
                r[key] == row[key] for key in ("size", "classes")))
            parts = " ".join(f"{name.removesuffix(' ms')} {row[name]:.0f}"
                             for name in row if name.endswith(" ms"))
            rate = "" if args.train else f"{row['GMACs/s']:>8.0f}/s"
            print(f"{row['method']:<26}{row['size']:>10}{row['classes']:>5}"
                  f"{row['ms']:>9.1f} ms [{row['low']:.1f}, {row['high']:.1f}]"
                  f"{row['ms'] / first['ms']:>6.2f}x{row['images/s']:>8.1f} img/s"
                  f"{row['GMACs']:>9.1f} GMACs{rate}"
                  f"{row['peak GB']:>7.2f} GB  {parts}")
    if args.out:
        out = make_folder(args.out)
        write_csv(out / "speed.csv", table)
        speed_picture(table, out / "speed.png")
        print(f"{out}: speed.csv, speed.png", file=sys.stderr)  # stdout may be JSON


def speed_setting(row: dict) -> str:
    """What was timed, in words."""
    return (f"{row['timed']}, batch {row['batch']}, {row['backbone']}, "
            f"{row['device']}, {row['threads']} threads, amp {row['amp']}, "
            f"{'' if row['compiled'] else 'not '}compiled")


def speed_picture(table: list[dict], path: Path) -> None:
    """Time, memory and multiply-adds over the pixels of an image, a line per method."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.8), dpi=100, layout="constrained")
    for axis, key in zip(figure.subplots(1, 3), ("ms", "peak GB", "GMACs")):
        for classes in dict.fromkeys(row["classes"] for row in table):
            for spec in dict.fromkeys(row["method"] for row in table):
                rows = [row for row in table if row["method"] == spec
                        and row["classes"] == classes]
                pixels = [math.prod(map(int, row["size"].split("x"))) / 1e6
                          for row in rows]
                axis.plot(pixels, [row[key] for row in rows], "o-",
                          label=f"{spec}, {classes} classes")
        axis.set(xlabel="megapixels", ylabel=key, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.suptitle(speed_setting(table[0]), fontsize=9)
    figure.savefig(path)


# --- Command line --------------------------------------------------------------------


def protocol_options() -> argparse.ArgumentParser:
    """How an image becomes class ids, for score, predict and compare."""
    how = argparse.ArgumentParser(add_help=False)
    group = how.add_argument_group("protocol")
    pixels = number(int, 1)
    group.add_argument("--scales", nargs="+", default=[1.0],
                       type=number(float, ABOVE_ZERO, 16),
                       help="of the image (default 1)")
    group.add_argument("--flip", action="store_true", help="mirrored images, too")
    group.add_argument("--fuse", choices=("mean", "exp"), default="mean",
                       help="mean softmax of the passes, or sum of exp(logits)")
    group.add_argument("--window", nargs=2, type=pixels, metavar=("H", "W"),
                       help="sliding windows of this size (default: whole image)")
    group.add_argument("--stride", nargs=2, type=pixels, metavar=("H", "W"),
                       help="from window to window (default: two thirds of it)")
    group.add_argument("--base-size", nargs=2, type=number(int),
                       metavar=("LONG", "SHORT"),
                       help="make each image fit into it before it is scaled; 0 0: "
                       "its own size (default: as in training)")
    group.add_argument("--max-pixels", type=number(int), default=0, metavar="N",
                       help="leave out scales at which the image has more")
    return how


def score_options(score: argparse.ArgumentParser) -> None:
    score.add_argument("checkpoint", metavar="RUN", help="its folder or a .pt file")
    score.add_argument("--dataset", help="default: the one it was trained on")
    score.add_argument("--data-root", metavar="DIR", help="default: as in training")
    score.add_argument("--split", default="val", help="default val")
    score.add_argument("--workers", type=number(int), default=2,
                       help="loader processes (2)")
    score.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    score.add_argument("--bands", action="store_true",
                       help="mIoU near void (VOC) or near class boundaries")
    score.add_argument("--boundary-f", action="store_true", help="F-score of outlines")
    score.add_argument("--convention", choices=("ours", "encoding"), default="ours",
                       help="encoding: absent classes count as 0, as in "
                       "PyTorch-Encoding")
    score.add_argument("--out", metavar="DIR", help="for score.json and pictures "
                       "(default: in the run folder, named by checkpoint and protocol)")
    score.set_defaults(command=command_score)


def predict_options(shown: argparse.ArgumentParser) -> None:
    shown.add_argument("checkpoint", metavar="RUN", help="or a .pt2 file of export")
    shown.add_argument("images", nargs="*", help="pictures, or folders of them")
    shown.add_argument("--out", required=True, metavar="DIR")
    shown.add_argument("--submission", action="store_true",
                       help="files for the test server of the checkpoint's data set")
    shown.add_argument("--split", default="test", help="of a submission (test)")
    shown.add_argument("--data-root", metavar="DIR", help="of a submission")
    shown.set_defaults(command=command_predict)


def parse(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(
        required=True,
        metavar="score|predict|explain|export|cost|table|compare|speed")
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
    explain.add_argument("checkpoint", metavar="RUN")
    explain.add_argument("image", nargs="?", help="default: one of the val split")
    explain.add_argument("--index", type=int, default=0, help="which of them (0)")
    explain.add_argument("--out", default="explain.png", metavar="FILE")
    explain.set_defaults(command=command_explain)

    export = commands.add_parser("export", help=command_export.__doc__.split("\n")[0])
    export.add_argument("checkpoint", metavar="RUN")
    export.add_argument("--out", required=True, metavar="FILE",
                        help="model.pt2 of torch.export, or model.onnx")
    export.set_defaults(command=command_export)

    cost = commands.add_parser("cost", help="parameters and GMACs beside the papers'")
    cost.add_argument("methods", nargs="*", metavar="METHOD",
                      help=f"of {', '.join(methods())}, or METHOD:VARIANT; "
                      "default: all published rows")
    cost.add_argument("--rule", choices=RULES,
                      help="count all rows by one rule (default: each paper's own)")
    cost.add_argument("--json", action="store_true", help="for machines, every part")
    cost.set_defaults(command=command_cost)

    table = commands.add_parser("table", help="one line per configuration of some runs")
    table.add_argument("runs", nargs="+", metavar="RUN")
    table.add_argument("--csv", metavar="FILE", help="also write it there")
    table.set_defaults(command=command_table)

    compare = commands.add_parser("compare", parents=[common, how],
                                  help="runs side by side on the same images")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.add_argument("--split", default="val", help="default val")
    compare.add_argument("--data-root", metavar="DIR", help="default: as in training")
    compare.add_argument("--images", type=number(int, 1), metavar="N",
                         help="only so many of them at most, evenly spaced (all)")
    compare.add_argument("--block", type=number(int, 1), default=1, metavar="N",
                         help="draw N of these images in a row for the intervals: for "
                         "frames of a video, longer than what one moment lasts (1)")
    compare.add_argument("--workers", type=number(int), default=2,
                         help="loader processes (2)")
    compare.add_argument("--out", default="compare", metavar="DIR",
                         help="for compare.json, .csv and .png (default compare)")
    compare.set_defaults(command=command_compare)
    speed_options(commands.add_parser("speed", parents=[common],
                                      help="time and memory of methods, side by side"))
    return parser.parse_args(argv)


def image_size(text: str) -> tuple[int, int]:
    """For argparse: "512x1024" -> (512, 1024); every side has 32 pixels or more."""
    H, W = map(number(int, 32), text.split("x"))
    return H, W


def speed_options(speed: argparse.ArgumentParser) -> None:
    speed.add_argument("methods", nargs="+", metavar="METHOD",
                       help="or METHOD:VARIANT; the first one is the measure")
    speed.add_argument("--size", nargs="+", type=image_size, default=[(512, 1024)],
                       metavar="HxW", help="of the images (default 512x1024)")
    speed.add_argument("--classes", nargs="+", type=number(int, 1, 255), default=[19],
                       metavar="K", help="default 19")
    speed.add_argument("--backbone", choices=backbones(), default="resnet18",
                       metavar="NAME", help="encoder (resnet18)")
    speed.add_argument("--batch", type=number(int, 1), default=1, help="images (1)")
    speed.add_argument("--rounds", type=number(int, 1), default=ROUNDS, metavar="N",
                       help=f"how often each is timed ({ROUNDS})")
    speed.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    speed.add_argument("--compile", action="store_true", help="torch.compile it first")
    speed.add_argument("--train", action="store_true",
                       help="forward, loss, backward and a step, not inference")
    speed.add_argument("--json", action="store_true", help="for machines")
    speed.add_argument("--out", metavar="DIR", help="for speed.csv and speed.png")
    speed.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    speed.set_defaults(command=command_speed)


def main(argv=None) -> int:
    with show_errors(argv):
        args = parse(argv)
        args.command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
