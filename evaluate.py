"""Score a run, predict your own pictures, count the cost, make the table.

    python evaluate.py score runs/nrd-streets-s0
    python evaluate.py predict runs/nrd-streets-s0/best.pt photo.jpg --out predictions
    python evaluate.py explain runs/nrd-streets-s0 --out explain.png
    python evaluate.py cost                       ours beside the published numbers
    python evaluate.py table runs/*               one line per run

Protocol of every number here: whole images at their own size, batch 1, labels never
resized, logits bilinear to the image's size, argmax; one int64 confusion matrix over
all valid pixels of the split; IoU per class; mean over the classes that occur.
"""
from __future__ import annotations

import argparse
import csv
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import data
from common import (IGNORE_INDEX, ConfusionMatrix, UserError, build_model, load_method,
                    methods, network_input)


@contextmanager
def show_errors(debug: bool = False):
    """User errors end in one sentence and exit code 2, without a traceback."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        # An error from a loader process arrives inside that process' traceback.
        print("error:", str(error).rsplit("UserError: ")[-1].strip(), file=sys.stderr)
        sys.exit(2)


# --- Scoring -------------------------------------------------------------------------


def score_dataset(model: nn.Module, dataset, *, device, workers=0,
                  amp="off") -> ConfusionMatrix:
    """Confusion matrix of the model on a whole split; train.py uses this too."""
    model.eval()
    matrix = ConfusionMatrix(len(dataset.info.classes))
    with torch.inference_mode(), torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=amp == "bf16"):
        for images, labels in data.val_loader(dataset, workers=workers):
            inputs = network_input(model, images, labels)
            matrix.update(labels[0], predict(model, inputs.to(device)))
    return matrix


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Class ids (H, W) of one normalised image (1, 3, H, W), at least 32x32 inside."""
    H, W = images.shape[-2:]
    if min(H, W) < 32:  # the encoder's smallest cell; repeat the border, cut it after
        images = nn.functional.pad(images, (0, max(0, 32 - W), 0, max(0, 32 - H)),
                                   mode="replicate")
    return model(images)["out"][0, :, :H, :W].argmax(0)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content; a run folder stands for its best.pt."""
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint {path}; give a run folder or a .pt file of it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise UserError(f"{path} is damaged or not a checkpoint "
                        f"({str(error).splitlines()[0] if str(error) else type(error)})"
                        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != 1:
        raise UserError(f"{path} is not a checkpoint of this train.py (format 1)")
    return checkpoint


def restore(checkpoint: dict, device="cpu", *, reads_images=False) -> nn.Module:
    """The trained model, in eval mode; strict: every tensor must fit."""
    if reads_images and checkpoint["backbone"] == "labels":
        raise UserError("this run has --backbone labels: it reads the ground truth, "
                        "not pictures, and can only be scored")
    model = build_model(checkpoint["method"], len(checkpoint["classes"]),
                        backbone=checkpoint["backbone"], **checkpoint["options"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last).eval()


# --- Pictures ------------------------------------------------------------------------


def colourise(labels: np.ndarray, palette) -> np.ndarray:
    """Class ids (H, W) to RGB (H, W, 3); ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table[labels]


def legend(info, width: int) -> np.ndarray:
    """A strip of colour squares with class names, as wide as the picture."""
    font = ImageFont.load_default(size=13)
    entries = list(zip(info.classes, info.palette)) + [("ignored", (0, 0, 0))]
    column = 26 + max(int(font.getlength(name)) for name, _ in entries)
    columns = max(1, width // column)
    strip = Image.new("RGB", (width, 20 * -(-len(entries) // columns) + 4), "white")
    pen = ImageDraw.Draw(strip)
    for i, (name, colour) in enumerate(entries):
        x, y = i % columns * column + 4, i // columns * 20 + 4
        pen.rectangle((x, y, x + 13, y + 13), fill=tuple(colour), outline="grey")
        pen.text((x + 18, y - 1), name, fill="black", font=font)
    return np.array(strip)


def sample_sheet(model, dataset, path: Path, *, device, count=4) -> None:
    """`count` images of a split, each as image | truth | prediction | errors."""
    model.eval()
    rows = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int):
        image, truth = dataset.load(index)
        with torch.inference_mode():
            inputs = network_input(model, data.NORMALISE(image)[None], truth[None])
            guess = predict(model, inputs.to(device)).cpu()
        truth, guess = truth.numpy(), guess.numpy()
        picture = image.permute(1, 2, 0).numpy()
        wrong = (guess != truth) & (truth != IGNORE_INDEX)
        errors = np.where(wrong[..., None], (220, 30, 30), picture // 3 + 150)
        guess = np.where(truth == IGNORE_INDEX, IGNORE_INDEX, guess)
        tiles = [picture, colourise(truth, dataset.info.palette),
                 colourise(guess, dataset.info.palette), errors.astype(np.uint8)]
        rim = ((2, 2), (2, 2), (0, 0))
        tiles = [np.pad(tile, rim, constant_values=255) for tile in tiles]
        rows.append(np.concatenate(tiles, axis=1))
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255)
            for r in rows]
    titles = Image.new("RGB", (width, 20), "white")
    for i, word in enumerate(("image", "truth", "prediction", "errors")):
        ImageDraw.Draw(titles).text((i * width // 4 + 4, 2), word, fill="black",
                                    font=ImageFont.load_default(size=13))
    sheet = np.concatenate([np.array(titles), *rows, legend(dataset.info, width)])
    Image.fromarray(sheet).save(path)


# --- score ---------------------------------------------------------------------------


def command_score(args) -> None:
    """mIoU, pixel accuracy and the per-class table of a checkpoint."""
    checkpoint = load_checkpoint(args.checkpoint)
    dataset = data.open_dataset(
        args.dataset or checkpoint["dataset"], args.split,
        root=args.data_root or checkpoint["data_root"],
        difficulty=checkpoint["difficulty"])
    if list(dataset.info.classes) != checkpoint["classes"]:
        raise UserError(
            f"{args.checkpoint} knows the {len(checkpoint['classes'])} classes of "
            f"{checkpoint['dataset']}, but {dataset.info.name} has other "
            f"{len(dataset.info.classes)}; score it on its own data set")
    matrix = score_dataset(restore(checkpoint, args.device), dataset, amp=args.amp,
                           device=args.device, workers=args.workers)
    print(f"{checkpoint['method']} on {dataset.info.name} {args.split}, "
          f"iteration {checkpoint['iteration']}")
    truth, guess = matrix.counts.sum(1), matrix.counts.sum(0)
    print(f"{'class':<16}{'IoU':>8}{'truth px':>12}{'predicted':>12}")
    for name, iou, t, g in zip(dataset.info.classes, matrix.iou().tolist(), truth,
                               guess):
        shown = "-" if iou != iou else f"{iou:.4f}"  # NaN: the class never occurs
        print(f"{name:<16}{shown:>8}{t:>12}{g:>12}")
    print(matrix.summary(protocol="whole image, single scale",
                         expected_images=len(dataset)))


# --- predict -------------------------------------------------------------------------


def command_predict(args) -> None:
    """Index PNG, colour PNG and overlay with legend for any pictures.

    Method, classes, palette and normalisation come from the checkpoint.
    """
    checkpoint = load_checkpoint(args.checkpoint)
    model = restore(checkpoint, args.device, reads_images=True)
    info = data.Info(checkpoint["dataset"], tuple(checkpoint["classes"]),
                     tuple(map(tuple, checkpoint["palette"])))
    out = Path(args.out)
    stems = [Path(p).stem for p in args.images]
    if len(set(stems)) < len(stems):
        raise UserError("two images have the same name; predict them into two folders")
    images = [data.read_image(Path(p)) for p in args.images]  # all of them, or none
    out.mkdir(parents=True, exist_ok=True)
    normalise = data.normaliser(checkpoint["mean"], checkpoint["std"])
    for stem, image in zip(stems, images):
        with torch.inference_mode():
            ids = predict(model, normalise(image)[None].to(args.device))
        ids, picture = ids.byte().cpu().numpy(), image.permute(1, 2, 0).numpy()
        colours = colourise(ids, info.palette)
        overlay = (0.5 * picture + 0.5 * colours).astype(np.uint8)
        Image.fromarray(ids).save(out / f"{stem}_ids.png")
        Image.fromarray(colours).save(out / f"{stem}_colour.png")
        width = max(overlay.shape[1], 200)  # a legend needs some room
        overlay = np.pad(overlay, ((0, 0), (0, width - overlay.shape[1]), (0, 0)),
                         constant_values=255)
        Image.fromarray(np.concatenate([overlay, legend(info, width)])
                        ).save(out / f"{stem}_overlay.png")
        print(f"{stem}: {', '.join(info.classes[i] for i in np.unique(ids))} -> "
              f"{out}/{stem}_{{ids,colour,overlay}}.png")


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
                "method", "options", "dataset", "difficulty", "recipe", "iteration")]),
            "set": " ".join(f"{k}={v}" for k, v in checkpoint["options"].items()
                            if k != "channels"),
            "iterations": checkpoint["iteration"],
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


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True,
                                     metavar="score|predict|explain|cost|table")
    common = argparse.ArgumentParser(add_help=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common.add_argument("--device", default=device, help=f"default {device}")

    score = commands.add_parser("score", parents=[common], help=command_score.__doc__)
    score.add_argument("checkpoint", help="a run folder (its best.pt) or a .pt file")
    score.add_argument("--dataset", help="default: the one it was trained on")
    score.add_argument("--data-root", metavar="DIR", help="default: as in training")
    score.add_argument("--split", default="val", help="default val")
    score.add_argument("--workers", type=int, default=2, help="loader processes (2)")
    score.add_argument("--amp", choices=("off", "bf16"), default="off")
    score.set_defaults(command=command_score)

    shown = commands.add_parser("predict", parents=[common],
                                help="label your own pictures")
    shown.add_argument("checkpoint")
    shown.add_argument("images", nargs="+")
    shown.add_argument("--out", required=True, metavar="DIR")
    shown.set_defaults(command=command_predict)

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

    table = commands.add_parser("table", help="one line per configuration of some runs")
    table.add_argument("runs", nargs="+")
    table.add_argument("--csv", metavar="FILE", help="also write it there")
    table.set_defaults(command=command_table)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    with show_errors(args.debug):
        args.command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
