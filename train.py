"""Train any method on any data set: `python train.py`, `python train.py --help`.

From top to bottom: the recipe (which value, and who says so), the pieces of a run
(model, optimiser, loaders), the loop, checkpoints, and the pictures at the end.

A run is a folder:
    config.json   what was asked for, and the recipe that came of it
    log.csv       one line per --log-every iterations and per evaluation
    curves.png    loss, learning rate, mIoU       samples.png  image|truth|prediction
    last.pt       to resume from                  best.pt      best mIoU on val
"""
from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import data
from common import (BACKBONES, UserError, build_model, load_method, network_input,
                    parse_options, segmentation_loss)
from evaluate import (Protocol, load_checkpoint, sample_sheet, score_dataset,
                      show_errors)

# --- 1. The recipe -------------------------------------------------------------------

# Ours, for every method, where its module has no recipe of its own for the data set.
OURS = {
    "backbone": "resnet18", "weights": "none", "batch": 8, "crop": (256, 352),
    "epochs": 40, "iterations": 0, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
    "power": 0.9, "min_lr": 1e-4, "warmup": 100, "scale": (0.75, 1.5),
    "photometric": True, "aux_weight": 0.4, "ohem": False, "channels": 128,
    "bn_images": 0, "head_lr": 1.0, "pretrain": 0,
}
OUR_RECIPES = {
    "streets": {"crop": (128, 256), "epochs": 6, "scale": (1.0, 1.0),
                "photometric": False},
    "camvid": {"batch": 4, "lr": 0.03, "epochs": 41, "bn_images": 96},
    "folder": {},
}
RECIPE_HELP = {
    "backbone": f"encoder: {', '.join(BACKBONES)}; or labels, the upper bound",
    "weights": "encoder weights: imagenet, none, or a file",
    "batch": "images per step", "crop": "training crop, H W in pixels",
    "epochs": "passes over the training set (ignored if --iterations is given)",
    "iterations": "training steps", "lr": "learning rate after the warm-up",
    "momentum": "SGD momentum", "weight_decay": "SGD weight decay",
    "power": "exponent of the poly schedule", "min_lr": "learning rate at the end",
    "warmup": "steps of linear warm-up", "scale": "random scale, from and to",
    "photometric": "distort colours at random, 0 or 1",
    "aux_weight": "weight of each auxiliary loss",
    "ohem": "online hard example mining, 0 or 1",
    "channels": "width of context and decoder",
    "bn_images": "whole images that give batch norm its statistics, 0: the crops do",
    "head_lr": "learning rate of all but the encoder, as a factor",
    "pretrain": "first steps with the method's own loss, as DUpsampling's Eq. (4)",
}


def make_recipe(args) -> dict[str, tuple]:
    """{name: (value, source)}: command line over the module's recipe over ours."""
    module, _ = load_method(args.method)
    recipe = {name: (value, "ours") for name, value in OURS.items()}
    if recipe_name(args) in module.RECIPES:  # it brings the paper's network too
        recipe.pop("channels")
        recipe |= module.RECIPES[recipe_name(args)]
    else:
        recipe |= {k: (v, "ours") for k, v in OUR_RECIPES.get(args.dataset, {}).items()}
    for name in RECIPE_HELP:
        value = getattr(args, name)
        if value is not None:
            recipe[name] = (tuple(value) if isinstance(value, list) else value,
                            "command line")
    if args.epochs and not args.iterations:
        recipe["iterations"] = (0, "command line")
    return recipe


def recipe_name(args) -> str:
    """Papers that say VOC mean the augmented set; both Contexts are trained alike."""
    name = {"voc-aug": "voc", "context59": "context60"}.get(args.dataset)
    known = load_method(args.method)[0].RECIPES
    return name if name and args.dataset not in known else args.dataset


def print_recipe(recipe: dict[str, tuple]) -> None:
    for name, (value, source) in recipe.items():
        print(f"  {name:<13} {str(value):<14} ({source})")


# --- 2. The pieces of a run ----------------------------------------------------------


def make_model(args, values: dict, num_classes: int, *, fresh: bool):
    """The model; encoder weights are read for a fresh run only, never on resume."""
    module, options = load_method(args.method)[0], parse_options(args.method, args.set)
    if "channels" in values:
        options = {"channels": values["channels"]} | options
    if recipe_name(args) not in module.RECIPES:
        options = module.FROM_SCRATCH | options
    weights = values["weights"] if fresh else "none"
    model = build_model(args.method, num_classes, backbone=values["backbone"],
                        weights=weights, **options)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.method}: {millions:.2f} M parameters, {values['backbone']}: "
          f"{model.encoder.loaded if fresh else 'resumed'}")
    return model.to(memory_format=torch.channels_last), options


def prepare_model(method: str, model, train_set, workers: int) -> None:
    """What a method learns of the labels before its first step, if it does."""
    prepare = getattr(load_method(method)[0], "prepare", None)
    if prepare:
        def say(step, steps, done):
            if sys.stdout.isatty():  # in a file it would be one endless line
                print(f"\rlabels, pass {step + 1} of {steps}: {done}/{len(train_set)} ",
                      end="", flush=True)
        started = time.time()
        line = prepare(model, data.LabelMaps(train_set, workers), progress=say)
        print(f"{line} ({time.time() - started:.0f} s)")


def make_optimizer(model, values: dict) -> torch.optim.Optimizer:
    """SGD; the encoder and the rest are groups of their own, with a factor for each."""
    encoder = list(model.encoder.parameters())
    known = {id(p) for p in encoder}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": encoder, "factor": 1.0},
              {"params": rest, "factor": values["head_lr"]}]
    return torch.optim.SGD(groups, lr=values["lr"], momentum=values["momentum"],
                           weight_decay=values["weight_decay"])


def learning_rate(iteration: int, values: dict, total: int) -> float:
    """Linear warm-up times poly decay to min_lr; a function of its arguments only."""
    poly = (1 - iteration / total) ** values["power"]
    rate = (values["lr"] - values["min_lr"]) * poly + values["min_lr"]
    return rate * min(1.0, (iteration + 1) / max(values["warmup"], 1))


def prepare_data(args, values: dict):
    """Both splits, opened and spot-checked, so that bad files fail before step one."""
    split = {"root": args.data_root, "difficulty": args.difficulty}
    train, val = (data.open_dataset(args.dataset, name, **split)
                  for name in (args.train_split, "val"))
    if args.dataset != "streets":
        for part in (train, val):
            data.check_some(part)
    if values["batch"] < 2:
        raise UserError("--batch 1: batch norm on the pooled 1x1 map of ASPP needs at "
                        "least two images; pass --batch 2 or more")
    data.Batches(len(train), values["batch"], start=0, stop=0, seed=0)  # enough images?
    if 0 < values["bn_images"] < values["batch"]:
        raise UserError(f"--bn-images {values['bn_images']}: fewer than one batch of "
                        f"{values['batch']}")
    if values["pretrain"] and not hasattr(load_method(args.method)[0], "pretrain_loss"):
        raise UserError(f"--pretrain: {args.method} has no loss of its own; drop it")
    return train, val


def run_folder(args) -> Path:
    """A new folder for the run; a default name gets a number if it is taken."""
    if args.out:
        folder = Path(args.out)
        if (folder / "last.pt").exists():
            raise UserError(f"{folder} holds a run; continue it with --resume "
                            f"{folder}, or give another --out")
    else:
        name = f"{args.method.replace(':', '-')}-{args.dataset}-s{args.seed}"
        taken = 1
        folder = Path("runs") / name
        while folder.exists():
            taken += 1
            folder = Path("runs") / f"{name}-{taken}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass
class Run:
    """Everything that a run carries along."""

    args: argparse.Namespace
    values: dict  # the recipe without its sources
    device: torch.device
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train_set: object
    val_set: object
    folder: Path
    meta: dict  # what every checkpoint says of the run
    first: int  # iteration to start from, not 0 after --resume
    total: int
    best: float


def start_run(args) -> Run:
    """Check everything, build everything, restore a checkpoint if there is one."""
    checkpoint = resume_point(args)
    recipe = make_recipe(args)
    values = {name: value for name, (value, _) in recipe.items()}
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(args.device or default)
    torch.manual_seed(args.seed)
    train_set, val_set = prepare_data(args, values)
    model, options = make_model(args, values, len(val_set.info.classes),
                                fresh=checkpoint is None)
    if not checkpoint:
        prepare_model(args.method, model, train_set, args.workers)
    model.to(device)
    optimizer = make_optimizer(model, values)
    steps_per_epoch = len(train_set) // values["batch"]
    total = values["iterations"] or values["epochs"] * steps_per_epoch
    first, best = 0, -1.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, best = checkpoint["iteration"], checkpoint["best_miou"]
    folder = Path(args.resume) if checkpoint else run_folder(args)
    describe(folder, args, recipe, device, total, len(train_set), len(val_set))
    meta = {"format": 1, "method": args.method, "options": options,
            "backbone": values["backbone"], "dataset": args.dataset,
            "train_split": args.train_split, "data_root": args.data_root,
            "difficulty": args.difficulty,
            "classes": list(val_set.info.classes),
            "palette": [list(c) for c in val_set.info.palette],
            "mean": list(data.MEAN), "std": list(data.STD), "seed": args.seed,
            "recipe": {name: list(value) if isinstance(value, tuple) else value
                       for name, value in values.items()},
            "versions": versions()}
    return Run(args, values, device, model, optimizer, train_set, val_set, folder, meta,
               first, total, best)


# --- 3. The loop ---------------------------------------------------------------------


def train(args) -> float:
    """One run from its first, or its resumed, step to its last; the last mIoU."""
    started = time.time()
    run = start_run(args)
    values, first, total = run.values, run.first, run.total
    log = Log(run.folder / "log.csv", first)
    batches = data.Batches(len(run.train_set), values["batch"], start=first, stop=total,
                           seed=args.seed)
    loader = data.train_loader(run.train_set, batches, workers=args.workers,
                               crop=values["crop"], scale=values["scale"],
                               photometric=values["photometric"])
    every = args.eval_every or -(-total // 5)
    matrix, clock, since = None, time.time(), first
    for done, (images, labels) in enumerate(loader, start=first + 1):
        loss, terms, rate = train_step(run, done - 1, images, labels)
        if done % args.log_every == 0 or done == total:
            speed = (done - since) * values["batch"] / (time.time() - clock)
            left = (total - done) * values["batch"] / speed
            log.progress(done, total, rate, loss.item(), terms, speed,
                         memory(run.device), eta=left)
            clock, since = time.time(), done
        if done % every == 0 or done == total:
            matrix = evaluate_and_save(run, done, log)
            clock, since = time.time(), done
    if matrix is None:
        raise UserError(f"{run.folder} is finished ({first} of {total} steps are done)")
    sample_sheet(run.model, run.val_set, run.folder / "samples.png", device=run.device)
    print(matrix.summary(protocol=str(Protocol()),
                         expected_images=len(run.val_set)))
    print(f"best mIoU on val {run.best:.4f}; {time.time() - started:.0f} s; "
          f"see {run.folder}/samples.png and curves.png")
    return matrix.miou()


def train_step(run: Run, iteration: int, images: Tensor, labels: Tensor):
    """One optimiser step; returns the loss, its terms and the learning rate."""
    # Seeding every step makes dropout independent of history: resume is exact.
    torch.manual_seed(data.mix_seeds(run.args.seed, iteration))
    rate = learning_rate(iteration, run.values, run.total)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    images = images.to(run.device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(run.device, non_blocking=True)
    inputs = network_input(run.model, images, labels)
    run.model.train()
    if iteration < run.values["pretrain"]:
        with autocast(run):
            module, _ = load_method(run.args.method)
            loss = module.pretrain_loss(run.model, inputs, labels)
        terms = {"out": loss.detach()}
    else:
        with autocast(run):
            outputs = run.model(inputs)
        loss, terms = segmentation_loss(outputs, labels, ohem=run.values["ohem"],
                                        aux_weight=run.values["aux_weight"])
    if not torch.isfinite(loss):
        parts = ", ".join(f"{name} {term.item():.3g}" for name, term in terms.items())
        raise UserError(
            f"loss is {loss.item()} at iteration {iteration}, learning rate {rate:.2g} "
            f"({parts}); try a lower --lr or a longer --warmup")
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    return loss.detach(), terms, rate


def autocast(run: Run):
    """--amp bf16: matrix products and convolutions in bfloat16, weights in float32."""
    return torch.autocast(run.device.type, torch.bfloat16,
                          enabled=run.args.amp == "bf16")


def evaluate_and_save(run: Run, done: int, log: Log):
    """Score the whole validation split, then write best.pt, if it is, and last.pt."""
    if run.values["bn_images"]:
        refresh_batch_norm(run)
    matrix = score_dataset(run.model, run.val_set, device=run.device,
                           workers=run.args.workers, amp=run.args.amp)
    miou = matrix.miou()
    log.evaluation(done, miou, matrix.pixel_accuracy())
    is_best, run.best = miou > run.best, max(run.best, miou)
    state = run.meta | {"iteration": done, "miou": miou, "best_miou": run.best,
                        "model": run.model.state_dict(),
                        "optimizer": run.optimizer.state_dict()}
    if is_best:  # before last.pt: a kill in between is made good by the resumed run
        save_checkpoint(state, run.folder / "best.pt")
    save_checkpoint(state, run.folder / "last.pt")
    log.curves(run.folder / "curves.png", run.args.method)
    return matrix


def refresh_batch_norm(run: Run) -> None:
    """Take batch norm's running statistics anew, from whole training images.

    Training sees crops, evaluation sees whole images, and the two differ: in a map of
    7x9 cells a 3x3 convolution of dilation 9 reads little but zero padding, in one of
    12x15 it reads features. On CamVid, with such crops: 13 to 19 points of mIoU.
    """
    count, length = run.values["bn_images"], len(run.train_set)
    picked = [i * length // count for i in range(min(count, length))]
    loader = data.whole_loader(run.train_set, picked, run.values["batch"],
                               workers=run.args.workers)
    inputs = (network_input(run.model, *batch) for batch in loader)
    with autocast(run):
        torch.optim.swa_utils.update_bn(inputs, run.model, device=run.device)


def describe(folder: Path, args, recipe, device, total, n_train, n_val) -> None:
    """Say and store what is about to happen, each value with where it comes from."""
    print(f"{args.dataset}: {n_train} training ({args.train_split}), {n_val} "
          f"validation images; {device}, {torch.get_num_threads()} threads, "
          f"{args.workers} workers, amp {args.amp}")
    print_recipe(recipe)
    batch = recipe["batch"][0]
    print(f"{total} steps of {batch} images = {total * batch / n_train:.1f} epochs "
          f"-> {folder}")
    asked = {k: v for k, v in vars(args).items() if k not in ("resume", "given")}
    config = {"args": asked,
              "recipe": {k: {"value": v, "source": s} for k, (v, s) in recipe.items()},
              "command": " ".join(sys.argv), "versions": versions()}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__)}


def memory(device) -> float:
    """Peak memory in GB: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kB on Linux


# --- 4. Checkpoints ------------------------------------------------------------------


def save_checkpoint(state: dict, path: Path) -> None:
    """Write beside, flush to disk, rename: `path` is the old or the new, never half."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resume_point(args) -> dict | None:
    """The checkpoint to go on from; the run's own arguments replace the defaults."""
    if not args.resume:
        return None
    folder = Path(args.resume)
    checkpoint = load_checkpoint(folder / "last.pt")
    saved = json.loads((folder / "config.json").read_text())["args"]
    free = ("out", "resume", "workers", "device", "log_every", "debug")
    given = {k: v for k, v in vars(args).items() if k in args.given and k not in free}
    changed = [f"{k}: {saved[k]} -> {v}" for k, v in given.items() if saved[k] != v]
    if changed:
        raise UserError(f"--resume continues a run as it was; changed: "
                        f"{'; '.join(changed)}. Leave these out, or start a new run")
    for key, value in saved.items():
        if key not in args.given or key not in free:
            setattr(args, key, value)
    print(f"resuming {folder} at iteration {checkpoint['iteration']}")
    return checkpoint


# --- 5. The log and its picture ------------------------------------------------------


class Log:
    """log.csv, the progress line, and curves.png."""

    columns = ("iteration", "lr", "loss", "out", "aux", "images_per_s", "memory_gb",
               "miou", "pixel_accuracy")

    def __init__(self, path: Path, first: int):
        """Open for appending; rows after iteration `first` are from a lost stretch."""
        self.rows = []
        if path.exists() and first:
            with open(path) as file:
                self.rows = [row for row in csv.DictReader(file)
                             if int(row["iteration"]) <= first]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, self.columns, restval="")
        self.writer.writeheader()
        self.writer.writerows(self.rows)

    def write(self, **row) -> None:
        self.rows.append({k: str(v) for k, v in row.items()})
        self.writer.writerow(row)
        self.file.flush()

    def progress(self, done, total, rate, loss, terms, speed, gigabytes, *, eta):
        aux = sum(v.item() for k, v in terms.items() if k != "out")
        self.write(iteration=done, lr=f"{rate:.6g}", loss=f"{loss:.5f}",
                   out=f"{terms['out'].item():.5f}", aux=f"{aux:.5f}",
                   images_per_s=f"{speed:.1f}", memory_gb=f"{gigabytes:.2f}")
        print(f"{done:>6}/{total}  loss {loss:.3f}  lr {rate:.4f}  {speed:.1f} img/s  "
              f"{gigabytes:.1f} GB  ETA {int(eta // 60)}:{int(eta % 60):02d}",
              flush=True)

    def evaluation(self, done, miou, accuracy) -> None:
        self.write(iteration=done, miou=f"{miou:.5f}", pixel_accuracy=f"{accuracy:.5f}")
        print(f"{done:>6}  val mIoU {miou:.4f}  pixel accuracy {accuracy:.4f}",
              flush=True)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        rows = [r for r in self.rows if r.get(name)]
        return [int(r["iteration"]) for r in rows], [float(r[name]) for r in rows]

    def curves(self, path: Path, title: str) -> None:
        """Loss and learning rate on the left, validation mIoU on the right."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
        left.plot(*self.series("loss"), color="tab:blue", label="training loss")
        left.set(xlabel="iteration", ylabel="loss", ylim=(0, None), title=title)
        rate = left.twinx()
        rate.plot(*self.series("lr"), color="0.6", lw=1)
        rate.set_ylabel("learning rate", color="0.5")
        right.plot(*self.series("miou"), "o-", color="tab:green", label="mIoU")
        right.plot(*self.series("pixel_accuracy"), "o-", color="0.6",
                   label="pixel accuracy")
        right.set(xlabel="iteration", ylim=(0, 1), title="validation")
        right.grid(alpha=0.3)
        right.legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


# --- 6. The command line -------------------------------------------------------------


class Given(argparse.Action):
    """Store a value and remember that it was given, for --resume and for sources."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, values)
        namespace.given = namespace.given | {self.dest}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a method of this library. Without arguments: NRD on "
        "procedural streets, a few minutes on two CPU cores, nothing to download.",
        epilog="Recipe values that are not given come from the module's RECIPES where "
        "its paper states them for the data set, else from train.py; each is printed "
        "with its source. Ctrl-C loses the steps since the last evaluation; --resume "
        "goes on.")
    parser.set_defaults(given=frozenset())
    add = lambda *names, **kw: parser.add_argument(*names, action=Given, **kw)
    add("--method", default="nrd", metavar="M[:VARIANT]",
        help="paper module and row of its tables, as nrd or nrd:bilinear (default nrd)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE",
        help="options of the method, as hidden_channels=32; a wrong key lists all")
    add("--dataset", default="streets",
        help=f"{', '.join(data.DATASETS)} (default streets, which is drawn)")
    add("--train-split", default="train", metavar="SPLIT",
        help="as trainval, after which the mIoU on val says nothing (default train)")
    add("--data-root", metavar="DIR", help="folder of the data set, as distributed")
    add("--difficulty", type=float, default=0.5,
        help="of streets: 0 clean .. 1 noisy, dark, colours alike (default 0.5)")
    add("--out", metavar="DIR", help="run folder (default runs/METHOD-DATASET-sSEED)")
    add("--resume", metavar="DIR", help="go on with an interrupted run")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (0)")
    add("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="loader processes (default: the cores, at most 8)")
    add("--amp", choices=("off", "bf16"), default="off",
        help="bf16: convolutions in bfloat16, the rest in float32 (default off)")
    add("--eval-every", type=int, default=0, metavar="STEPS",
        help="evaluate and save every so many steps (default a fifth of the run)")
    add("--log-every", type=int, default=20, metavar="STEPS", help="progress line (20)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    group = parser.add_argument_group("recipe (default: the method's for the data set)")
    for name, text in RECIPE_HELP.items():
        kind = type(OURS[name])
        many = {"nargs": 2, "type": type(OURS[name][0])} if kind is tuple else {
            "type": int if kind is bool else kind}
        group.add_argument("--" + name.replace("_", "-"), action=Given, help=text,
                           metavar=name.split("_")[-1].upper(), **many)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    with show_errors(args.debug):
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
