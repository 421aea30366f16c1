"""Train any method on any data set: `python train.py`, `python train.py --help`.

Part 1 is the lesson: the loop, a step, the loss, the schedule, the optimiser, the
evaluation. Part 2 is what a run is made of: recipe, model, data, command line. Then a
banner says that the rest keeps a run alive on real machines.

A run is a folder:
    config.json   what was asked for, and the recipe that came of it
    log.csv       one line per --log-every iterations and per evaluation
    curves.png    loss, learning rate, mIoU       samples.png  image|truth|prediction
    last.pt       the run: to resume, to score    prev.pt      the one before it
    best.pt       best mIoU on val

Several processes, one per GPU, are started by torchrun; nothing else has to be set:
    torchrun --standalone --nproc_per_node 4 train.py --dataset cityscapes ..

Exit codes: 0 done; 1 a fault of this program or machine; 2 a mistake in what was asked
for or in the data; 3 the loss diverged; 4 storage; 128 + n stopped by signal n.
"""
from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import data
from common import (ABOVE_ZERO, FORMAT, IGNORE_INDEX, LABELS, MISFITS, PATIENCE,
                    Damaged, Parser, UserError, autocast, backbones, build_model,
                    check_option, did_you_mean, first_line, join_processes,
                    load_checkpoint, load_method, make_folder, method_options,
                    methods, number, out_of_memory, peak_memory, progress,
                    rank_and_world, save_checkpoint, segmentation_loss, show_errors,
                    told_rank)
from evaluate import Protocol, sample_sheet, score_dataset

# --- Part 1. The lesson --------------------------------------------------------------


def train(args) -> float:
    """One run, from its first or resumed step to its last; returns the last mIoU."""
    started = time.monotonic()
    run = start_run(args)  # the model, its optimiser, the data: Part 2
    with kept_alive(run) as asked, Feed(training_loader(run)) as feed:
        while True:
            # What is due depends on the state alone, so that a run which was stopped
            # anywhere and resumed does what it would have done without a stop.
            if evaluation_is_due(run):
                evaluate(run, asked)
                feed.restart()
            stop = agree(run, asked.signal)
            if stop or save_is_due(run):
                save(run)
            if run.evaluated == run.total:
                break
            if stop:
                raise Stopped(stop, run)
            images, labels = feed.next()
            losses, rate = train_step(run, images, labels)
            if run.done % args.log_every == 0 or run.done == run.total:
                run.log.progress(run, rate, losses, feed)
                feed.restart()
    finish(run, time.monotonic() - started)
    return run.miou


def train_step(run: Run, images: Tensor, labels: Tensor) -> tuple[dict, float]:
    """One step of gradient descent; returns its losses by name, and its rate."""
    # Each step seeds the random numbers of dropout anew: they depend on no history.
    torch.manual_seed(data.mix_seeds(run.args.seed, run.done, run.rank))
    rate = learning_rate(run.done, run.values, run.total)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    run.model.train()
    buffers = [buffer.clone() for buffer in run.model.buffers()]

    run.optimizer.zero_grad(set_to_none=True)
    losses = backward(run, images, labels)
    run.scaler.unscale_(run.optimizer)  # fp16 scales its loss; else without effect
    # One number for all gradients and all processes: finite only if each of them is.
    norm = nn.utils.clip_grad_norm_(run.model.parameters(),
                                    run.values["clip"] or math.inf).item()
    if math.isfinite(losses["loss"]) and math.isfinite(norm):
        run.scaler.step(run.optimizer)
        run.bad_steps = 0
    else:
        skip(run, buffers, losses["loss"], norm, rate)
    run.scaler.update()
    run.done += 1
    return losses, rate


def backward(run: Run, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Forward pass, loss and gradients of a batch, in as many parts as were asked for.

    A mean over the means of parts would let a pixel weigh more where many around it
    are void. So each part counts by its share of the valid pixels of all processes,
    and the gradient is that of the undivided batch, but for batch norm, which sees one
    part at a time.
    """
    pretrain = run.done < run.values["pretrain"]
    sums = {}
    for inputs, truth, share, is_last in parts(run, images, labels, pretrain):
        # Until the last part the processes have nothing to tell each other.
        with nullcontext() if is_last or run.world == 1 else run.network.no_sync():
            loss, terms = run.network(inputs, truth, pretrain)
            # DDP takes the mean over processes; this is a share of a sum.
            run.scaler.scale(loss * share * run.world).backward()
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, 0) + share * value
    return total_over_processes(run, sums)


class Objective(nn.Module):
    """Network and loss in one module, because DDP wraps one forward pass."""

    def __init__(self, model: nn.Module, args, values: dict):
        super().__init__()
        self.model, self.amp = model, args.amp
        self.forward_pass = torch.compile(model) if args.compile else model
        self.method = load_method(args.method)[0]
        self.loss_options = {name: values[name]
                             for name in ("aux_weight", "ohem", "ohem_threshold")}

    def forward(self, inputs: Tensor, labels: Tensor, pretrain: bool):
        """The loss, and its terms by name, without a gradient, for the log."""
        with autocast(inputs.device, self.amp):
            if pretrain:
                loss = self.method.pretrain_loss(self.model, inputs, labels)
                return loss, {"out": loss.detach()}
            outputs = self.forward_pass(inputs)  # {"out": logits, "aux": [logits, ..]}
        return segmentation_loss(outputs, labels, **self.loss_options)  # in float32


def parts(run: Run, images: Tensor, labels: Tensor, pretrain: bool) -> list[tuple]:
    """[(inputs, labels, share of the valid pixels, is it the last part)]."""
    # A method's own first loss is a mean over all pixels, void ones too.
    counts = [truth.numel() if pretrain else (truth != IGNORE_INDEX).sum().item()
              for truth in labels.chunk(run.args.accumulate)]
    images = images.to(run.device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(run.device, non_blocking=True)
    inputs, truths = (x.chunk(run.args.accumulate) for x in (images, labels))
    everywhere = total_over_processes(run, {"valid": sum(counts)})["valid"]
    shares = (torch.tensor(counts) / max(everywhere, 1)).to(run.device)
    is_last = [i + 1 == len(counts) for i in range(len(counts))]
    return list(zip(inputs, truths, shares, is_last))


def learning_rate(iteration: int, values: dict, total: int) -> float:
    """Linear warm-up times poly decay to min_lr; a function of its arguments only.

    The warm-up begins at `warmup_from` times the rate, as mmcv's does at 0.01; where
    that is 0, at one step's share of it.
    """
    poly = (1 - iteration / total) ** values["power"]
    rate = (values["lr"] - values["min_lr"]) * poly + values["min_lr"]
    start = values["warmup_from"]
    warmup = values["warmup"]
    if iteration >= warmup:
        return rate
    if start:
        return rate * (start + (1 - start) * iteration / warmup)
    return rate * (iteration + 1) / warmup


def make_optimizer(model: nn.Module, values: dict) -> torch.optim.Optimizer:
    """SGD. A pretrained encoder and a fresh decoder may want different rates."""
    if hasattr(model, "encoder"):
        encoder = list(model.encoder.parameters())
        known = {id(p) for p in encoder}
        rest = [p for p in model.parameters() if id(p) not in known]
        groups = [{"params": encoder, "factor": 1.0},
                  {"params": rest, "factor": values["head_lr"]}]
    else:
        groups = [{"params": list(model.parameters()), "factor": 1.0}]
    return torch.optim.SGD(groups, lr=values["lr"], momentum=values["momentum"],
                           weight_decay=values["weight_decay"])


def evaluate(run: Run, asked: Signals) -> None:
    """Score the validation split and keep the best, unless a signal cuts it short.

    The run is saved before, so that a fault here costs no step.
    """
    if not run.bad_steps:  # see save_is_due
        save(run)
    if run.world > 1:
        same_buffers(run.model)
    if run.values["bn_images"]:
        refresh_batch_norm(run)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # it would search anew for each image size
    matrix = score_dataset(run.model, run.val_set, device=run.device,
                           protocol=protocol_of(run),
                           workers=run.args.workers, amp=run.args.amp,
                           upper_bound=run.upper_bound, stopped=lambda: asked.signal)
    torch.backends.cudnn.benchmark = benchmark
    if matrix is None:
        return
    run.evaluated, run.miou, run.matrix = run.done, matrix.miou(), matrix
    run.log.evaluation(run, matrix.pixel_accuracy())
    if run.miou > run.best:
        # Before last.pt: a kill in between is made good by the resumed run.
        run.best = run.miou
        save(run, "best.pt")


def refresh_batch_norm(run: Run) -> None:
    """Take batch norm's running statistics anew, from whole training images.

    Training sees crops, evaluation sees whole images, and the two differ: in a map of
    7x9 cells a 3x3 convolution of dilation 9 reads little but zero padding, in one of
    12x15 it reads features. On CamVid, with such crops: 13 to 19 points of mIoU.
    The images are shuffled, because the variance is a mean over those of the batches:
    in a batch of images that follow each other it is too small (0 to 2.5 points of mIoU
    on a drive of CamVid, see results/README.md).
    Of several processes, all do the same work here.
    """
    picked = statistics_images(run.args, run.values, len(run.train_set))
    # --accumulate was asked for because more images at once do not fit into memory.
    batch = run.values["batch"] // run.args.accumulate
    loader = data.whole_loader(run.train_set, picked, batch, workers=run.args.workers,
                               upper_bound=run.upper_bound)
    with autocast(run.device, run.args.amp):
        torch.optim.swa_utils.update_bn(loader, run.model, device=run.device)
    if len(picked) % batch or len(picked) < run.values["bn_images"]:
        print(f"  batch norm's statistics are of {len(loader) * batch} images: full "
              f"batches of {batch}, of {len(picked)}")


def statistics_images(args, values: dict, images: int) -> list[int]:
    """Indices of the training images that give batch norm its statistics.

    The same ones at every evaluation of a run. It seeds torch as well, because dropout
    draws random numbers while these images go through the network.
    """
    torch.manual_seed(args.seed)
    return torch.randperm(images)[:values["bn_images"]].tolist()


def protocol_of(run: Run) -> Protocol:
    """Whole images, single scale, resized as in training if they are there."""
    return Protocol(base_size=run.values["base_size"])


def finish(run: Run, seconds: float) -> None:
    """The picture and the last lines of a run."""
    if run.rank == 0:
        with not_vital("samples.png"):
            sample_sheet(run.model, run.val_set, run.folder / "samples.png",
                         device=run.device, amp=run.args.amp,
                         upper_bound=run.upper_bound,
                         protocol=protocol_of(run))
    print(run.matrix.summary(protocol=str(protocol_of(run)),
                             expected_images=len(run.val_set)))
    print(f"best mIoU on val {run.best:.4f}; {seconds:.0f} s; "
          f"see {run.folder}/samples.png and curves.png")


# --- Part 2. What a run is made of ---------------------------------------------------


@dataclass
class Run:
    """Everything that a run carries along.

    What was asked for goes by several names. `args` is the command line. A recipe is
    {name: (value, who says so)} and `values` the same without the sources. `meta` is
    what every checkpoint says of the run: all of these.
    """

    args: argparse.Namespace
    values: dict
    device: torch.device
    rank: int  # which of the `world` processes this is; only rank 0 writes
    world: int
    model: nn.Module
    network: nn.Module  # the Objective with the model in it, within DDP if there is any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # fp16's, without effect otherwise
    train_set: object
    val_set: object
    meta: dict
    total: int  # steps
    upper_bound: bool  # the encoder reads the ground truth
    lock: object = None  # an open file, while no other process may write to the folder
    folder: Path = Path()
    log: Log = None
    done: int = 0
    evaluated: int = 0  # the step at which val was last scored
    saved: tuple = ()  # (done, evaluated) in last.pt
    matrix: object = None  # of the last evaluation
    miou: float = math.nan  # of the last evaluation
    best: float = -1.0
    bad_steps: int = 0  # skipped for a loss that is not finite, in a row
    rows: list[dict] = field(default_factory=list)  # of the log


@dataclass(frozen=True)
class Option:
    """An option: its default, a sentence for --help, the numbers that are legal."""

    default: object
    help: str
    least: float = 0
    most: float = 2**31
    metavar: str = ""  # else the last word of its name
    choices: tuple = ()
    flag: bool = False  # given or not, without a value


# Ours, for every method, where its module has no recipe of its own for the data set.
RECIPE = {
    "backbone": Option("resnet18", f"encoder: {', '.join(backbones())}; or {LABELS}, "
                                   f"the upper bound"),
    "weights": Option("none", "encoder weights: imagenet, none, or a file"),
    "batch": Option(8, "images per step", 1),
    "crop": Option((256, 352), "training crop, H W in pixels", 32),
    "epochs": Option(40, "passes over the training set, unless --iterations is given"),
    "iterations": Option(0, "training steps"),
    "lr": Option(0.05, "learning rate after the warm-up", ABOVE_ZERO),
    "momentum": Option(0.9, "SGD momentum", most=1),
    "weight_decay": Option(5e-4, "SGD weight decay"),
    "power": Option(0.9, "exponent of the poly schedule"),
    "min_lr": Option(1e-4, "learning rate at the end"),
    "warmup": Option(100, "steps of linear warm-up"),
    "warmup_from": Option(0.0, "where it begins, as a share of the rate; 0: a step's",
                          most=1),
    "base_size": Option((0, 0), "before the random scale, images are resized to fit "
                                "into LONG SHORT pixels; 0 0: they are not"),
    "scale": Option((0.75, 1.5), "random scale, from and to", ABOVE_ZERO),
    "photometric": Option(True, "distort colours at random, 0 or 1", most=1),
    "aux_weight": Option(0.4, "weight of each auxiliary loss"),
    "ohem": Option(0.0, "hard example mining: the share of each image's hardest pixels "
                        "that counts; 0: all do", most=1),
    "ohem_threshold": Option(0.0, "with --ohem: so does each pixel whose true class "
                                  "has a lower probability", most=1),
    "channels": Option(128, "width of context and decoder", 1),
    "bn_images": Option(0, "whole images that give batch norm its statistics, 0: the "
                           "crops do"),
    "head_lr": Option(1.0, "learning rate of all but the encoder, as a factor",
                      ABOVE_ZERO),
    "pretrain": Option(0, "first steps with the method's own loss, if it has one"),
    "clip": Option(0.0, "largest norm that the gradient may have, 0: any"),
}
# What a paper that does not speak of it has not done.
LEFT_OUT = ("iterations", "warmup_from", "base_size", "ohem", "ohem_threshold",
            "bn_images", "head_lr", "pretrain", "clip")
OUR_DATASETS = {
    "streets": {"crop": (128, 256), "epochs": 6, "scale": (1.0, 1.0),
                "photometric": False},
    "camvid": {"batch": 4, "lr": 0.03, "epochs": 41, "bn_images": 96},
    "mapillary": {"base_size": (2048, 2048)},  # its images have up to 6000 columns
}


def papers_recipe(args) -> dict:
    """What the method's paper states for the data set; {} if nothing, or not wanted.

    A key of RECIPES is a data set, or `data set:backbone` before that. The augmented
    VOC is trained on as VOC is, both Contexts are trained on alike. A run that begins
    with the weights of another first looks for `finetuned data set`, which a paper has
    that trains on several data sets in turn.
    """
    if args.recipe == "ours":
        return {}
    other = {"voc-aug": "voc", "context59": "context60"}.get(args.dataset)
    keys = [key for name in filter(None, (args.dataset, other))
            for key in (f"{name}:{getattr(args, 'backbone', None)}", name)]
    if args.finetune_from:
        keys = [f"finetuned {key}" for key in keys] + keys
    recipes = getattr(load_method(args.method)[0], "RECIPES", {})
    key = next((key for key in keys if key in recipes), None)
    recipe = recipes.get(key, {})
    for name, value in recipe.items():
        if name not in RECIPE:
            raise UserError(f"RECIPES[{key!r}] of {args.method}: no recipe has a "
                            f"{name!r}{did_you_mean(name, RECIPE)}")
        if not isinstance(value, tuple) or len(value) != 2:
            raise UserError(f"RECIPES[{key!r}] of {args.method}: {name} must be a "
                            f"value and its source, (0.01, 'paper, Sec. 4'), not "
                            f"{value!r}")
    return recipe


def make_recipe(args) -> dict[str, tuple]:
    """{name: (value, source)}: command line over the module's recipe over ours."""
    recipe = {name: (option.default, "ours") for name, option in RECIPE.items()}
    papers = papers_recipe(args)
    if papers:  # it brings the paper's network, too
        recipe.pop("channels")
        recipe |= {name: (RECIPE[name].default, "not done in the paper")
                   for name in LEFT_OUT} | {"epochs": (0, "steps are stated")} | papers
    else:
        recipe |= {name: (value, "ours")
                   for name, value in OUR_DATASETS.get(args.dataset, {}).items()}
        if "channels" not in method_options(args.method) or sets_channels(args):
            recipe.pop("channels")
    for name in RECIPE:
        if name in args.given:
            recipe[name] = (getattr(args, name), "command line")
    if "epochs" in args.given and "iterations" not in args.given:
        recipe["iterations"] = (0, "command line")
    if args.finetune_from:
        recipe["weights"] = ("none", "--finetune-from brings its own")
    if recipe["backbone"][0] == LABELS:
        recipe["weights"] = ("none", "labels need no encoder")
    return recipe


def check_values(args, values: dict) -> None:
    """Numbers that make no run together, before anything is opened."""
    if values["min_lr"] > values["lr"]:
        raise UserError(f"--min-lr {values['min_lr']}: above --lr {values['lr']}")
    if values["scale"][0] > values["scale"][1]:
        raise UserError(f"--scale {values['scale'][0]} {values['scale'][1]}: from the "
                        f"smaller to the larger, please")
    if values["pretrain"] and not hasattr(load_method(args.method)[0], "pretrain_loss"):
        raise UserError(f"--pretrain: {args.method} has no loss of its own; drop it")
    if 0 < values["bn_images"] < values["batch"]:
        raise UserError(f"--bn-images {values['bn_images']}: fewer than one batch of "
                        f"{values['batch']}")
    if any(values["base_size"]) and not all(values["base_size"]):
        raise UserError("--base-size: two sides, or 0 0 for each image's own size")
    if any(values["base_size"]) and values["bn_images"]:
        raise UserError("--bn-images reads images at their own size, --base-size "
                        "scores others: pass --bn-images 0 or --base-size 0 0")
    if "channels" in args.given:
        check_option(args.method, "channels")
    if not args.resume:  # there check_same lists what has changed
        check_given(args, values)


def check_given(args, values: dict) -> None:
    """What was asked for on the command line, and would not act."""
    given = set(args.given)
    if {"epochs", "iterations"} <= given and values["epochs"] and values["iterations"]:
        raise UserError("--epochs and --iterations: give one of them")
    if "ohem_threshold" in given and values["ohem_threshold"] and not values["ohem"]:
        raise UserError("--ohem-threshold: needs --ohem, the least share that counts")
    if args.dataset == "streets" and args.data_root:
        raise UserError("--data-root: streets is drawn and has no folder; name the "
                        "--dataset that is there")
    if args.dataset != "streets" and "difficulty" in given:
        raise UserError(f"--difficulty: is one of streets, not of {args.dataset}")
    if "weights" in given and args.weights != "none" and args.finetune_from:
        raise UserError("--weights and --finetune-from: give one of them")
    if "weights" in given and args.weights != "none" and values["backbone"] == LABELS:
        raise UserError(f"--weights: --backbone {LABELS} is no network that has some")
    if "channels" in given and sets_channels(args):
        raise UserError("--channels and --set channels=..: give one of them")


def sets_channels(args) -> bool:
    """Is the width an option of --set, and so none of the recipe?"""
    return any(pair.partition("=")[0] == "channels" for pair in args.set)


def parse_options(spec: str, pairs: list[str]) -> dict:
    """['hidden_channels=32'] -> {'hidden_channels': 32}, names and types checked."""
    known, options = method_options(spec), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: give KEY=VALUE")
        check_option(spec, key)
        if key in options:
            raise UserError(f"--set {pair}: {key} is given twice")
        try:
            value = ast.literal_eval(text)
            json.dumps(value)  # a checkpoint and config.json will have to hold it
        except (ValueError, SyntaxError):
            value = text
        except TypeError:
            raise UserError(f"--set {pair}: give a number, a word, True, False, None, "
                            f"or a tuple of them") from None
        if type(known[key]) is float and type(value) is int:
            value = float(value)
        if known[key] is not None and type(value) is not type(known[key]):
            raise UserError(f"--set {pair}: {key} is a {type(known[key]).__name__} "
                            f"(default {known[key]!r}), got {text!r}")
        options[key] = value
    return options


def make_model(args, values: dict, num_classes: int, *, fresh: bool):
    """The model; encoder weights are read for a fresh run only, never on resume."""
    asked = parse_options(args.method, args.set)
    options = asked
    if "channels" in values:
        options = {"channels": values["channels"]} | options
    if not papers_recipe(args):
        options = getattr(load_method(args.method)[0], "FROM_SCRATCH", {}) | options
    try:
        model = build_model(args.method, num_classes, backbone=values["backbone"],
                            weights=values["weights"] if fresh else "none", **options)
    except MISFITS as error:
        if not args.set:  # then it is no mistake of the command line
            raise
        raise UserError(f"--set {' '.join(args.set)}: {args.method} cannot be built so "
                        f"({first_line(error)})") from error
    if values["head_lr"] != 1.0 and not hasattr(model, "encoder"):
        raise UserError(f"--head-lr: {args.method} does not say which of its parts is "
                        f"the encoder, so all of it has one learning rate; drop it")
    loaded = next((part.loaded for part in model.modules() if hasattr(part, "loaded")),
                  "its own weights")
    print(f"{args.method}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
          f"parameters, {values['backbone']}: "
          f"{loaded if fresh else 'weights of another checkpoint'}")
    for name, value in load_method(args.method)[1].items():
        if options.get(name, value) != value and name not in asked:
            print(f"  {args.method} has {name}={value!r}, this recipe "
                  f"{options[name]!r}: --set {name}={value} keeps it")
    # channels_last: convolutions read all channels of a pixel at once, and are faster.
    return model.to(memory_format=torch.channels_last), options


def prepare_model(method: str, model, train_set, workers: int) -> None:
    """What a method learns of the labels before its first step, if it does."""
    prepare = getattr(load_method(method)[0], "prepare", None)
    if prepare:
        def say(step, steps, done):
            progress(done, len(train_set), f"labels, pass {step + 1} of {steps}:")
        started = time.monotonic()
        line = prepare(model, data.LabelMaps(train_set, workers), progress=say)
        print(f"{line} ({time.monotonic() - started:.0f} s)")


def finetune_from(args, model: nn.Module, backbone: str, options: dict,
                  classes: tuple[str, ...]) -> bool:
    """Take over what fits by name and shape from another run; list what does not.

    Other classes of the same number have the same shapes, but no weight in common: what
    depends on the number of classes is dropped then. Returns whether all of it came
    along, and with it what a method had learned of the labels.
    """
    path = args.finetune_from
    checkpoint, own = load_checkpoint(path), model.state_dict()
    if checkpoint["backbone"] != backbone:  # some shapes would agree, by chance
        raise UserError(f"--finetune-from {path}: it has --backbone "
                        f"{checkpoint['backbone']}, this run {backbone}")
    theirs = checkpoint["model"]
    of_classes = tensors_of_classes(args.method, len(classes), backbone, options)
    wrong = of_classes if checkpoint["classes"] != list(classes) else set()
    fits = {name: tensor for name, tensor in theirs.items()
            if name in own and own[name].shape == tensor.shape and name not in wrong}
    model.load_state_dict(fits, strict=False)
    print(f"{len(fits)} of {len(own)} tensors taken over from {path}")
    for name, tensor in theirs.items():
        if name in fits:
            continue
        here = "not in here"
        if name in own:
            here = f"{tuple(own[name].shape)} here"
        if name in wrong and own[name].shape == tensor.shape:
            here = "of other classes"
        print(f"  dropped: {name} {tuple(tensor.shape)}, {here}")
    for name in own:
        if name not in theirs:
            print(f"  not in it, as at the start: {name}")
    return of_classes <= set(fits)


def tensors_of_classes(method: str, num_classes: int, backbone: str,
                       options: dict) -> set[str]:
    """Names of the tensors that would have another shape with one class more.

    Or with one class, if there are as many as there can be.
    """
    shapes, others = (
        {name: tensor.shape for name, tensor in build_model(
            method, K, backbone=backbone, **options).state_dict().items()}
        for K in (num_classes, num_classes % IGNORE_INDEX + 1))
    return {name for name in shapes if shapes[name] != others[name]}


def prepare_data(args, values: dict):
    """Both splits, opened and spot-checked, so that bad files fail before step one."""
    train_set, val_set = (
        data.open_dataset(args.dataset, split, root=args.data_root,
                          difficulty=args.difficulty)
        for split in (args.train_split, "val"))
    if args.dataset != "streets":
        data.check_some(train_set)
        data.check_some(val_set)
        picked = statistics_images(args, values, len(train_set))
        data.check_one_size({tuple(train_set.labels(i).shape) for i in picked})
    data.Batches(len(train_set), values["batch"], start=0, stop=0, seed=0)  # enough?
    return train_set, val_set


def training_loader(run: Run):
    """This process' share of every batch, from the step that is next."""
    values = run.values
    batches = data.Batches(len(run.train_set), values["batch"], start=run.done,
                           stop=run.total, seed=run.args.seed, rank=run.rank,
                           world=run.world)
    return data.train_loader(run.train_set, batches, workers=run.args.workers,
                             pin_memory=run.device.type == "cuda",
                             crop=values["crop"], scale=values["scale"],
                             base_size=values["base_size"],
                             photometric=values["photometric"],
                             upper_bound=run.upper_bound)


def total_steps(values: dict, images: int) -> int:
    total = values["iterations"] or values["epochs"] * (images // values["batch"])
    if not total:
        raise UserError("--iterations 0 and --epochs 0: no step at all")
    if values["warmup"] >= total:
        raise UserError(f"a warm-up of {values['warmup']} steps in a run of {total}: "
                        f"pass --warmup {total // 10}, or more --iterations")
    return total


def evaluation_is_due(run: Run) -> bool:
    every = run.args.eval_every or math.ceil(run.total / 5)
    last = run.done == run.total
    return run.done > run.evaluated and (last or run.done % every == 0)


def save_is_due(run: Run) -> bool:
    """Not amid steps that are skipped: who resumes wants a way back before them."""
    if run.bad_steps and run.done < run.total:
        return False
    return (run.done in (run.evaluated, run.total)
            or run.done % run.args.save_every == 0)


def start_run(args) -> Run:
    """Check everything, build everything, restore a checkpoint if there is one."""
    checkpoint, held = resume_point(args)
    recipe = make_recipe(args)
    values = {name: value for name, (value, _) in recipe.items()}
    check_values(args, values)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(join_processes(args.device or default))
    rank, world = rank_and_world()
    check_processes(args, values, device)
    set_up(device, args)
    train_set, val_set = prepare_data(args, values)
    total = total_steps(values, len(train_set))
    torch.manual_seed(args.seed)
    model, options = make_model(args, values, len(val_set.info.classes),
                                fresh=not (checkpoint or args.finetune_from))
    meta = identity(args, values, options, device, train_set, val_set)
    if checkpoint:
        check_same(checkpoint, meta)
    else:
        learned = args.finetune_from and finetune_from(
            args, model, values["backbone"], options, val_set.info.classes)
        if not learned:
            prepare_model(args.method, model, train_set, args.workers)
    model.to(device)
    run = Run(args=args, values=values, device=device, rank=rank, world=world,
              model=model, network=Objective(model, args, values),
              optimizer=make_optimizer(model, values),
              scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
              train_set=train_set, val_set=val_set, meta=meta, total=total, lock=held,
              upper_bound=values["backbone"] == LABELS)
    if checkpoint:
        go_on_from(checkpoint, run)
    if dist.is_initialized():
        distribute(run)
    run.folder = own_folder(run)
    run.log = Log(run)
    describe(run, recipe)
    return run


def describe(run: Run, recipe: dict[str, tuple]) -> None:
    """Say and store what is about to happen, each value with where it comes from."""
    args, batch = run.args, run.values["batch"]
    print(f"{args.dataset}: {len(run.train_set)} training ({args.train_split}), "
          f"{len(run.val_set)} validation images; {run.device}, "
          f"{torch.get_num_threads()} threads, {args.workers} workers, amp {args.amp}")
    for name, (value, source) in recipe.items():
        print(f"  {name:<13} {str(value):<14} ({source})")
    asked = parse_options(args.method, args.set)
    for name, value in run.meta["options"].items():
        if name not in recipe:
            source = "command line" if name in asked else "ours, from scratch"
            print(f"  {name:<13} {str(value):<14} ({source})")
    share = batch // (run.world * args.accumulate)
    print(f"{batch} images per step ({recipe['batch'][1]}) = {run.world} processes x "
          f"{args.accumulate} parts x {share} images")
    paper = papers_recipe(args).get("batch")
    if paper and paper[0] != batch:
        print(f"  the paper's {paper[0]} images per step belong to its learning rate; "
              f"in proportion, {batch} would have {batch / paper[0]:.3g} times that")
    epochs = run.total * batch / len(run.train_set)
    print(f"{run.total} steps of {batch} images = {epochs:.1f} epochs -> {run.folder}")
    if math.isnan(peak_memory("cpu")):
        print("this system does not count a process' memory: done without")
    if run.rank > 0 or args.resume:
        return
    sources = {name: {"value": value, "source": source}
               for name, (value, source) in recipe.items()}
    config = run.meta | {"recipe": sources, "command": " ".join(sys.argv)}
    with not_vital("config.json"):
        (run.folder / "config.json").write_text(json.dumps(config, indent=1),
                                                encoding="utf-8")


def identity(args, values: dict, options: dict, device, train_set, val_set) -> dict:
    """What makes a run this one, for its checkpoints, config.json and the table."""
    info = val_set.info
    return {"format": FORMAT, "method": args.method, "options": options,
            "backbone": values["backbone"], "dataset": args.dataset,
            "train_split": args.train_split, "data_root": args.data_root,
            "difficulty": args.difficulty, "train_images": len(train_set),
            "classes": list(info.classes), "palette": [list(c) for c in info.palette],
            "mean": list(data.MEAN), "std": list(data.STD), "seed": args.seed,
            "amp": args.amp, "eval_every": args.eval_every,
            "finetune_from": args.finetune_from,
            "recipe": {name: list(value) if isinstance(value, tuple) else value
                       for name, value in values.items()},
            "args": {name: value for name, value in vars(args).items()
                     if name not in ("given", "resume")},
            "environment": environment(device, args)}


def environment(device: torch.device, args) -> dict:
    """On what a result depends besides the recipe, often only in its last bits."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "device": device.type, "gpu": gpu,
            "threads": torch.get_num_threads(), "processes": rank_and_world()[1],
            "accumulate": args.accumulate, "compile": args.compile,
            "tf32": args.tf32, "deterministic": args.deterministic,
            "commit": source_version()}


def source_version() -> str:
    """The git commit of this library and a hash of its source, which may differ."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), *here.glob("results/classes.csv")]
    source = b"".join(path.read_bytes() for path in files)
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return f"{commit or 'no commit'}, source {hashlib.sha256(source).hexdigest()[:8]}"


def set_up(device: torch.device, args) -> None:
    """How the arithmetic is done, where torch leaves a choice."""
    if args.deterministic:  # torch warns of each operation that has no such variant
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.deterministic
        # TF32: the factors of a convolution are rounded to 10 bits, its sums are not.
        # Products of matrices keep float32, for which full_precision is there; a
        # convolution within it is rounded, too, unless --tf32 0 is given.
        torch.backends.cudnn.allow_tf32 = bool(args.tf32)


# --- The command line ----------------------------------------------------------------

OPTIONS = {  # all that is not in the recipe
    "method": Option("nrd", f"paper module, of {', '.join(methods())}, and row of its "
                            f"tables, as nrd:bilinear (default nrd)",
                     metavar="M[:VARIANT]"),
    "set": Option([], "options of the method, as hidden_channels=32; a wrong key lists "
                      "all", metavar="KEY=VALUE"),
    "dataset": Option("streets", f"{', '.join(data.DATASETS)} (default streets, which "
                                 f"is drawn)"),
    "recipe": Option("paper", "paper: what the method's paper states for the data set, "
                              "if it does; ours: the same for every method (paper)",
                     choices=("paper", "ours")),
    "train_split": Option("train", "as trainval, after which the mIoU on val says "
                                   "nothing (default train)"),
    "data_root": Option(None, "folder of the data set, as distributed", metavar="DIR"),
    "difficulty": Option(0.5, "of streets: 0 clean .. 1 noisy, dark, alike (0.5)",
                         most=1),
    "out": Option(None, "run folder (default runs/METHOD-DATASET-sSEED)",
                  metavar="DIR"),
    "resume": Option(None, "go on with an interrupted run", metavar="DIR"),
    "finetune_from": Option(None, "begin with the weights of another run",
                            metavar="PATH"),
    "seed": Option(0, "of weights, order and augmentation (0)"),
    "eval_every": Option(0, "evaluate and save every so many steps (default a fifth of "
                            "the run)", metavar="STEPS"),
    "save_every": Option(500, "save between evaluations, too (500)", 1,
                         metavar="STEPS"),
    "log_every": Option(20, "progress line (20)", 1, metavar="STEPS"),
    # What changes how fast a run is, not what it is (but for 16 bits).
    "device": Option(None, "cpu, cuda or cuda:1 (default: cuda if there is one)"),
    "workers": Option(min(8, os.cpu_count() or 1),
                      "loader processes (default: the cores, at most 8)"),
    "amp": Option("off", "convolutions in 16 bits, the rest in float32 (default off)",
                  choices=("off", "bf16", "fp16")),
    "accumulate": Option(1, "a process' images go through the network in so many parts "
                            "(1)", 1, metavar="PARTS"),
    "compile": Option(False, "torch.compile the network", flag=True),
    "tf32": Option(1, "on a GPU round the factors of convolutions to 10 bits (1)",
                   choices=(0, 1)),
    "deterministic": Option(False, "repeatable algorithms on a GPU; torch warns of "
                                   "operations without one", flag=True),
}


def add_option(group, name: str, option: Option) -> None:
    how, default = {"help": option.help}, option.default
    first = default[0] if isinstance(default, tuple) else default
    if option.flag:
        how["action"] = "store_true"
    else:
        how["metavar"] = option.metavar or name.split("_")[-1].upper()
        if isinstance(first, (int, float)):  # bool, too
            how["type"] = number(type(first), option.least, option.most)
        if option.choices:
            how |= {"choices": option.choices, "metavar": None}
        if isinstance(default, (tuple, list)):
            how["nargs"] = 2 if isinstance(default, tuple) else "+"
        if isinstance(default, list):  # --set twice is one longer --set
            how["action"] = "extend"
    group.add_argument("--" + name.replace("_", "-"), **how)


def parse(argv=None) -> argparse.Namespace:
    """All options with their values; `given` names those of the command line."""
    parser = Parser(
        argument_default=argparse.SUPPRESS,
        description="Train a method of this library. Without arguments: on "
        "procedural streets, a few minutes on two CPU cores, nothing to download.",
        epilog="Recipe values that are not given come from the module's RECIPES where "
        "its paper states them for the data set, else from train.py; each is printed "
        "with its source. Ctrl-C and SIGTERM save first; --resume goes on.")
    for name, option in OPTIONS.items():
        add_option(parser, name, option)
    group = parser.add_argument_group("recipe (default: the method's for the data set)")
    for name, option in RECIPE.items():
        add_option(group, name, option)
    given = vars(parser.parse_args(argv))
    given.pop("debug", None)  # which show_errors reads
    for name, value in given.items():
        if value == "":  # a script's variable that is not set
            raise UserError(f"--{name.replace('_', '-')} is empty")
    for name in ("crop", "scale", "base_size"):
        if name in given:
            given[name] = tuple(given[name])
    if "data_root" in given:  # the run may be resumed from elsewhere
        given["data_root"] = str(Path(given["data_root"]).absolute())
    defaults = {name: option.default for name, option in OPTIONS.items()}
    return argparse.Namespace(**defaults | given, given=sorted(given))


def main(argv=None) -> int:
    quiet = told_rank() > 0  # of several processes one talks
    with show_errors(argv), open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere) if quiet else nullcontext():
            try:
                train(parse(argv))
                code = 0
            except Stopped as stop:
                print(stop)
                code = stop.code
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


# =====================================================================================
# Part 3. What follows keeps a run alive on real machines: several processes,
# checkpoints that survive, signals, full disks, a log. You may stop reading here.
# =====================================================================================

# --- Several processes ---------------------------------------------------------------

# What each process may be told otherwise: where it works, not what it does.
MAY_DIFFER = ("given", "device", "workers", "data_root", "out", "log_every")


def check_processes(args, values: dict, device: torch.device) -> None:
    """All processes must have been asked for one run, and be able to share a batch."""
    rank, world = rank_and_world()
    if world > 1:
        asked, mine = [None] * world, {**vars(args), **values}
        dist.all_gather_object(asked, {name: value for name, value in mine.items()
                                       if name not in MAY_DIFFER})
        differ = [f"  {name}: {asked[0].get(name)!r} in process 0, "
                  f"{other.get(name)!r} in process {i}"
                  for i, other in enumerate(asked) for name in asked[0] | other
                  if other.get(name) != asked[0].get(name)]
        if differ:
            raise UserError("\n".join(["the processes of this run were started with "
                                       "different arguments:", *differ]))
    check_split(values["batch"], world, args.accumulate, device)


def check_split(batch: int, world: int, parts: int, device: torch.device) -> None:
    """The images of a step must divide evenly, and batch norm needs two at a time.

    (Else it would normalise the pooled 1x1 map of a context module to zero.) On GPUs
    the processes normalise together.
    """
    pieces = world * parts
    together = world if device.type == "cuda" else 1
    least = pieces * math.ceil(2 / together)
    if batch % pieces or batch < least:
        raise UserError(f"--batch {batch} does not do for {world} processes x {parts} "
                        f"parts: pass a multiple of {pieces}, {least} or more, because "
                        f"batch norm needs two images (--accumulate does not help)")


def distribute(run: Run) -> None:
    """Make this run one of several processes' that hold the same model."""
    if run.device.type == "cuda" and run.world > 1:
        # Each process sees a fraction of the batch, and batch norm needs all of it.
        # (On CPUs torch has no such layer: there each process normalises its own.)
        run.network = nn.SyncBatchNorm.convert_sync_batchnorm(run.network)
        run.model = run.network.model
    run.network = nn.parallel.DistributedDataParallel(  # the mean of their gradients
        run.network,
        device_ids=[run.device.index] if run.device.type == "cuda" else None,
        # Every parameter has a gradient in every step, unless a method begins with a
        # loss of its own, which need not ask all of them. On CPUs this option has
        # another use: without it DDP sorts its gradients anew after the first step, and
        # a resumed run of three processes would add them up in another order.
        find_unused_parameters=run.device.type == "cpu" or run.values["pretrain"] > 0)


def same_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's running statistics: they will score one model.

    DDP does so before each forward pass, and each has seen other images since.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def total_over_processes(run: Run, values: dict) -> dict[str, float]:
    """The sum of each value over all processes, as numbers."""
    x = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=run.device)
                     for value in values.values()])
    if run.world > 1:
        dist.all_reduce(x)
    return dict(zip(values, x.tolist()))


def agree(run: Run, number: int) -> int:
    """The largest number of any process: a signal that one got stops all, together."""
    x = torch.tensor(number, device=run.device)
    if run.world > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


# --- The folder ----------------------------------------------------------------------

CHECKPOINTS = ("last.pt", "prev.pt", "best.pt")


def own_folder(run: Run) -> Path:
    """The run's folder, made and locked by rank 0; all know it, or why there is none.
    """
    told = [None, None]
    if run.rank == 0:
        try:
            path = Path(run.args.resume) if run.args.resume else new_folder(run.args)
            run.lock = run.lock or lock(path)
            told = [str(path), None]
        except UserError as error:
            told = [None, str(error)]
    if run.world > 1:
        dist.broadcast_object_list(told, 0)
    folder, refused = told
    if refused:
        raise UserError(refused)
    if run.rank == 0:
        for name in ("last.tmp", "best.tmp", "log.tmp"):  # of a process that was killed
            (Path(folder) / name).unlink(missing_ok=True)
    return Path(folder)


def new_folder(args) -> Path:
    """A new folder for the run; a default name gets a number if it is taken."""
    if args.out:
        folder = Path(args.out)
        there = [name for name in CHECKPOINTS if os.path.lexists(folder / name)]
        if there:
            go_on = "" if there == ["best.pt"] else f", or --resume {folder}"
            raise UserError(f"{folder} holds a run ({', '.join(there)}); give another "
                            f"--out{go_on}")
    else:
        name = f"{args.method.replace(':', '-')}-{args.dataset}-s{args.seed}"
        taken = 1
        folder = Path("runs") / name
        while folder.exists():
            taken += 1
            folder = Path("runs") / f"{name}-{taken}"
    return make_folder(folder)


def lock(folder: Path):
    """Two runs in one folder would overwrite each other: the second one ends here."""
    try:
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error})") from None
    try:
        import fcntl
        # Of this kind a lock ends with its process, and the loader's have no share.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training in {folder}; wait for it, or "
                        f"give another --out") from None
    except (ImportError, OSError) as error:  # Windows; some network drives
        print(f"warning: {folder} cannot be locked ({error}); do not start a second "
              f"run in it", file=sys.stderr)
    return file


# --- Checkpoints of a run ------------------------------------------------------------


def save(run: Run, name="last.pt") -> None:
    """Write all that the next step depends on; last.pt becomes prev.pt.

    Not where last.pt is of the same step, before its evaluation: prev.pt is older.
    """
    if run.rank > 0 or (name == "last.pt" and run.saved == (run.done, run.evaluated)):
        return
    model = run.model.state_dict()
    broken = [name for name, x in model.items() if not x.isfinite().all()]
    if broken:
        raise UserError(f"{broken[0]} is not finite at iteration {run.done}; not "
                        f"saved: {run.folder}/last.pt is from before. Try a lower --lr",
                        code=3)
    state = run.meta | {
        "iteration": run.done, "steps": run.total, "evaluated": run.evaluated,
        "miou": run.miou, "best_miou": run.best, "bad_steps": run.bad_steps,
        "log": run.rows, "model": model, "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict()}
    if name == "last.pt":
        older = None if run.saved[:1] == (run.done,) else run.folder / "prev.pt"
        save_checkpoint(state, run.folder / name, keep=older)
        run.saved = run.done, run.evaluated
        run.log.write_all()
    else:
        save_checkpoint(state, run.folder / name)


def newest_checkpoint(folder: Path) -> dict:
    """last.pt, or prev.pt if that is damaged; if both are, nothing is touched."""
    faults = []
    for name in ("last.pt", "prev.pt"):
        try:
            checkpoint = load_checkpoint(folder / name)
        except Damaged as error:
            faults.append(str(error))
            continue
        if faults:
            print(f"warning: {faults[0]}; going on from {name}", file=sys.stderr)
            if told_rank() == 0 and (folder / "last.pt").exists():
                # Else the next save would put it in the place of the good one.
                os.replace(folder / "last.pt", folder / "damaged.pt")
        return checkpoint
    raise UserError("; ".join(faults))


def resume_point(args):
    """The checkpoint to go on from, and the folder's lock; None and None without one.

    The arguments of the run stand in for those that are not given.
    """
    if not args.resume:
        return None, None
    folder = Path(args.resume)
    if args.out:
        raise UserError("--resume goes on in its own folder; drop --out")
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder" if not folder.exists() else
                        f"--resume takes a folder: --resume {folder.parent}")
    held = lock(folder) if told_rank() == 0 else None
    checkpoint = newest_checkpoint(folder)
    for name, value in checkpoint["args"].items():
        if name not in args.given:
            setattr(args, name, value)
            if name in RECIPE:
                args.given = [*args.given, name]
    print(f"resuming {folder} at iteration {checkpoint['iteration']}")
    return checkpoint, held


def check_same(checkpoint: dict, now: dict) -> None:
    """A resumed run is the run that it was, or ends in a list of what is not."""
    def flat(meta):
        nested = {f"{name}.{key}": value for name in ("recipe", "options")
                  for key, value in meta[name].items()}
        return nested | {name: value for name, value in meta.items() if name not in (
            "recipe", "options", "args", "environment", "data_root")}
    then, now_ = flat({name: checkpoint[name] for name in now}), flat(now)
    changed = [f"  {name:<22} {then.get(name)!r} -> {now_.get(name)!r}"
               for name in sorted(then | now_) if then.get(name) != now_.get(name)]
    if changed:
        raise UserError("\n".join([
            "--resume goes on with a run as it was, but this has changed:", *changed,
            "leave it as it was, or start a new run (--finetune-from takes over the "
            "weights)"]))
    for name, value in now["environment"].items():
        before = checkpoint["environment"].get(name, value)  # an older one may lack it
        if before != value:
            what = "the last bits may differ"
            if name in ("processes", "accumulate"):
                what = ("batch norm may see other parts of a batch, and then the run "
                        "is another")
            print(f"warning: {name} was {before}, is {value}: {what}", file=sys.stderr)


def go_on_from(checkpoint: dict, run: Run) -> None:
    """Put everything that the next step depends on in its place.

    Random numbers are not among it: each step seeds them from its own number.
    """
    run.model.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.done, run.evaluated = checkpoint["iteration"], checkpoint["evaluated"]
    run.saved = run.done, run.evaluated
    run.miou, run.best = checkpoint["miou"], checkpoint["best_miou"]
    run.bad_steps, run.rows = checkpoint["bad_steps"], checkpoint["log"]
    if run.evaluated == run.total:
        raise UserError(f"{run.args.resume} is finished: {run.done} of {run.total} "
                        f"steps")


# --- What can go wrong ---------------------------------------------------------------


def skip(run: Run, buffers: list[Tensor], loss: float, norm: float, rate: float):
    """Leave no trace of a step whose loss or gradient is not finite; ten are too many.

    In fp16 a gradient that overflows is nothing unusual: the scaler halves its scale.
    """
    for buffer, before in zip(run.model.buffers(), buffers):
        buffer.copy_(before)  # batch norm's running mean must not keep a NaN
    scale = run.scaler.get_scale()
    if run.scaler.is_enabled() and math.isfinite(loss) and scale > 1:
        print(f"{run.done + 1:>6}  skipped: overflow in fp16, loss scale {scale:g}")
        return
    run.bad_steps += 1
    print(f"{run.done + 1:>6}  skipped: loss {loss:g}, norm of its gradient {norm:g}")
    if run.bad_steps < 10:
        return
    batches = data.Batches(len(run.train_set), run.values["batch"], start=0, stop=0,
                           seed=run.args.seed)
    names = [run.train_set.name(index) for _, index in batches.keys(run.done)]
    other = {"fp16": "--amp bf16, ", "bf16": "--amp off, ", "off": ""}[run.args.amp]
    raise UserError(
        f"loss {loss:g}, gradient norm {norm:g} at iteration {run.done + 1}, the tenth "
        f"in a row, learning rate {rate:.3g}; its images: {', '.join(names)}. Try "
        f"{other}a lower --lr, a longer --warmup or --clip 10; {run.folder}/last.pt is "
        f"from before", code=3)


class Stopped(UserError):
    """By a signal, with everything saved."""

    def __init__(self, number: int, run: Run):
        super().__init__(f"{signal.Signals(number).name}: saved after iteration "
                         f"{run.done} of {run.total}; go on with\n"
                         f"  python train.py --resume {shlex.quote(str(run.folder))}",
                         128 + number)


class Signals:
    """SIGINT, SIGTERM and the like: an end after this step; a second one, at once.

    SIGHUP comes when the terminal goes, SIGXCPU from some schedulers. What is ignored
    from outside, as SIGHUP under nohup, stays ignored.
    """

    def __init__(self):
        self.signal, self.asked, self.before = 0, 0.0, {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU"):
            number = getattr(signal, name, None)  # Windows has the first two
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame) -> None:
        if not self.signal:
            self.signal, self.asked = number, time.monotonic()
            with suppress(OSError):  # stderr may be closed
                # No print, which the signal may have come in the middle of.
                os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif time.monotonic() - self.asked > 1:
            # Sooner it is the same one: SLURM's, which torchrun passes on as well.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def kept_alive(run: Run):
    """Signals are listened to, the folder stays locked, a machine's faults get advice.

    Yields what was asked for by a signal.
    """
    with run.lock or nullcontext(), Signals() as asked:
        try:
            yield asked
        except (RuntimeError, MemoryError, OSError) as error:
            advice = machine_fault(error, run)
            if not advice:
                raise
            said = first_line(error)[:200]
            raise UserError(f"{advice} ({said}). {run.folder}/last.pt is whole: "
                            f"--resume {run.folder}", code=1) from error


def machine_fault(error: Exception, run: Run) -> str:
    """What to do about a fault that torch reports in its own terms; "" for a bug."""
    said, args, values = str(error), run.args, run.values
    if "Too many open files" in said:  # whatever was to be opened
        return "too many open files: raise `ulimit -n`, or lower --workers"
    if any(word in said for word in ("shared memory", "Bus error", "</torch_")):
        return ("a loader process found no room in /dev/shm, through which its images "
                "come: give the container more (--shm-size), or pass --workers 0")
    # A bug in a loader process comes as "Caught .. in DataLoader worker process 0".
    if "DataLoader worker (pid" in said or (
            "DataLoader worker" in said and out_of_memory(error)):
        return ("a loader process was killed, mostly for want of memory: lower "
                "--workers or --batch")
    if "DataLoader timed out" in said:
        for process in multiprocessing.active_children():
            process.kill()  # it would not hear anything less
        return (f"a loader process said nothing for {data.STUCK} s: a disk that does "
                f"not answer? Try fewer --workers")
    if out_of_memory(error):
        crop = " ".join(map(str, values["crop"]))
        parts = f"--accumulate {2 * args.accumulate}, or "
        try:
            check_split(values["batch"], run.world, 2 * args.accumulate, run.device)
        except UserError:
            parts = ""
        return (f"out of memory at --batch {values['batch']} --crop {crop}, peak "
                f"{peak_memory(run.device):.1f} GB: try {parts}a smaller one of these")
    if run.world > 1 and "imed out" in said:
        return f"another process of this run has said nothing for {PATIENCE}"
    if run.world > 1 and any(word in said for word in ("onnection", "NCCL")):
        return "another process of this run has ended; it says why"
    return ""


@contextmanager
def not_vital(name: str):
    """A disk that is full costs this file, not the run."""
    try:
        yield
    except OSError as error:
        print(f"warning: cannot write {name} ({error}); the run goes on",
              file=sys.stderr)


# --- The log -------------------------------------------------------------------------


class Feed:
    """Batches one by one, and the time that was spent waiting for them."""

    def __init__(self, loader):
        self.loader, self.batches = loader, None

    def __enter__(self):
        self.restart()
        return self

    def __exit__(self, *_):
        self.batches = None  # ends the loader's processes, now and not at some time

    def restart(self) -> None:
        self.since, self.waited, self.steps = time.monotonic(), 0.0, 0

    def next(self):
        first, before = self.batches is None, time.monotonic()
        self.batches = self.batches or iter(self.loader)
        batch = next(self.batches)
        if first:  # the loader's processes had to start
            self.restart()
        else:
            self.waited += time.monotonic() - before
        self.steps += 1
        return batch


class Log:
    """log.csv, curves.png and the progress lines.

    The rows are in every checkpoint, too, and the small file is written anew each time:
    what a full disk or a kill has cost is in it again after the next row.
    """

    columns = ("iteration", "lr", "loss", "out", "aux", "images_per_s", "data_share",
               "memory_gb", "miou", "pixel_accuracy")

    def __init__(self, run: Run):
        self.folder, self.rows, self.mute = run.folder, run.rows, run.rank > 0
        self.write_all()

    def write_all(self) -> None:
        if self.mute:
            return
        temporary = self.folder / "log.tmp"
        with not_vital("log.csv"):
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(temporary, self.folder / "log.csv")

    def write(self, **row) -> None:
        self.rows.append({name: str(value) for name, value in row.items()})
        self.write_all()

    def progress(self, run: Run, rate: float, losses: dict, feed: Feed) -> None:
        seconds = max(time.monotonic() - feed.since, 1e-9)
        speed = feed.steps * run.values["batch"] / seconds
        left = int((run.total - run.done) * run.values["batch"] / speed)
        waited, gigabytes = feed.waited / seconds, peak_memory(run.device)
        aux = sum(value for name, value in losses.items() if name.startswith("aux"))
        self.write(iteration=run.done, lr=f"{rate:.6g}", loss=f"{losses['loss']:.5f}",
                   out=f"{losses['out']:.5f}", aux=f"{aux:.5f}",
                   images_per_s=f"{speed:.1f}", data_share=f"{waited:.2f}",
                   memory_gb=f"{gigabytes:.2f}")
        print(f"{run.done:>6}/{run.total}  loss {losses['loss']:.3f}  lr {rate:.4f}  "
              f"{speed:.1f} img/s  data {waited:.0%}  {gigabytes:.1f} GB  "
              f"ETA {left // 60}:{left % 60:02d}", flush=True)

    def evaluation(self, run: Run, accuracy: float) -> None:
        self.write(iteration=run.done, miou=f"{run.miou:.5f}",
                   pixel_accuracy=f"{accuracy:.5f}")
        print(f"{run.done:>6}  val mIoU {run.miou:.4f}  pixel accuracy {accuracy:.4f}",
              flush=True)
        if not self.mute:
            with not_vital("curves.png"):
                draw_curves(self.rows, self.folder / "curves.png", run.args.method)


def draw_curves(rows: list[dict], path: Path, title: str) -> None:
    """Of the rows of log.csv: loss and learning rate left, validation mIoU right."""
    from matplotlib.figure import Figure

    def series(name):
        known = [row for row in rows if row.get(name)]
        return ([int(row["iteration"]) for row in known],
                [float(row[name]) for row in known])
    figure = Figure(figsize=(10, 3.6), layout="tight")
    left, right = figure.subplots(1, 2)
    few = "o-" if len(series("loss")[0]) < 20 else "-"  # one point makes no line
    left.plot(*series("loss"), few, color="tab:blue", label="training loss")
    left.set(xlabel="iteration", ylabel="loss", ylim=(0, None), title=title)
    rate = left.twinx()
    rate.plot(*series("lr"), color="0.6", lw=1)
    rate.set_ylabel("learning rate", color="0.5")
    right.plot(*series("miou"), "o-", color="tab:green", label="mIoU")
    right.plot(*series("pixel_accuracy"), "o-", color="0.6", label="pixel accuracy")
    right.set(xlabel="iteration", ylim=(0, 1), title="validation")
    right.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
