"""Train any method on any data set: `python train.py`, `python train.py --help`.

From top to bottom: the recipe (which value, and who says so), the pieces of a run
(model, optimiser, data), the loop (`train`: one screen), what several processes need,
checkpoints, what can go wrong, the log, the command line.

A run is a folder:
    config.json   what was asked for, and the recipe that came of it
    log.csv       one line per --log-every iterations and per evaluation
    curves.png    loss, learning rate, mIoU       samples.png  image|truth|prediction
    last.pt       to resume from                  prev.pt      the one before it
    best.pt       best mIoU on val

Several processes, one per GPU, are started by torchrun; nothing else has to be set:
    torchrun --standalone --nproc_per_node 4 train.py --dataset cityscapes ..

Exit codes: 0 done; 1 a fault of this program or machine; 2 a mistake in what was asked
for or in the data; 3 the loss diverged; 4 storage; 130, 143 stopped by SIGINT, SIGTERM.
"""
from __future__ import annotations

import argparse
import csv
import errno
import fcntl
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import data
from common import (BACKBONES, IGNORE_INDEX, UserError, build_model, load_method,
                    network_input, parse_options, segmentation_loss)
from evaluate import (FORMAT, Damaged, Protocol, autocast, checksum, draw_curves,
                      join_processes, load_checkpoint, out_of_memory, rank_and_world,
                      sample_sheet, score_dataset, show_errors)

# --- 1. The recipe -------------------------------------------------------------------

# Ours, for every method, where its module has no recipe of its own for the data set.
OURS = {
    "backbone": "resnet18", "weights": "none", "batch": 8, "crop": (256, 352),
    "epochs": 40, "iterations": 0, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
    "power": 0.9, "min_lr": 1e-4, "warmup": 100, "scale": (0.75, 1.5),
    "photometric": True, "aux_weight": 0.4, "ohem": False, "channels": 128,
    "bn_images": 0, "head_lr": 1.0, "pretrain": 0, "clip": 0.0,
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
    "clip": "largest norm that the gradient may have, 0: any",
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


@dataclass
class Run:
    """Everything that a run carries along."""

    args: argparse.Namespace
    values: dict  # the recipe without its sources
    device: torch.device
    rank: int  # which of the `world` processes this is; only rank 0 writes
    world: int
    model: nn.Module
    network: nn.Module  # model and loss in one module, within DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # fp16's, without effect otherwise
    train_set: object
    val_set: object
    folder: Path
    lock: object  # an open file, while no other process may write to the folder
    meta: dict  # what every checkpoint says of the run; it may not change on resume
    total: int  # steps
    done: int = 0
    evaluated: int = 0  # the step at which val was last scored
    saved: tuple = ()  # (done, evaluated) in last.pt
    miou: float = math.nan  # the last one
    best: float = -1.0
    bad_steps: int = 0  # skipped for a loss that is not finite, in a row
    log_rows: int = 0


class Objective(nn.Module):
    """The loss of a batch as one module, as DDP wants to have it."""

    def __init__(self, model: nn.Module, args, values: dict):
        super().__init__()
        self.model, self.amp = model, args.amp
        self.run = torch.compile(model) if args.compile else model
        self.module = load_method(args.method)[0]
        self.weights = {"aux_weight": values["aux_weight"], "ohem": values["ohem"]}

    def forward(self, inputs: Tensor, labels: Tensor, pretrain: bool):
        with autocast(inputs.device, self.amp):
            if pretrain:
                loss = self.module.pretrain_loss(self.model, inputs, labels)
                return loss, {"out": loss.detach()}
            outputs = self.run(inputs)
        return segmentation_loss(outputs, labels, **self.weights)  # in float32


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
          f"{model.encoder.loaded if fresh else 'weights of another checkpoint'}")
    # channels_last: convolutions read all channels of a pixel at once, and are faster.
    return model.to(memory_format=torch.channels_last), options


def prepare_model(method: str, model, train_set, workers: int) -> None:
    """What a method learns of the labels before its first step, if it does."""
    prepare = getattr(load_method(method)[0], "prepare", None)
    if prepare:
        def say(step, steps, done):
            if sys.stdout.isatty():  # in a file it would be one endless line
                print(f"\rlabels, pass {step + 1} of {steps}: {done}/{len(train_set)} ",
                      end="", flush=True)
        started = time.monotonic()
        line = prepare(model, data.LabelMaps(train_set, workers), progress=say)
        print(f"{line} ({time.monotonic() - started:.0f} s)")


def finetune_from(path: str, model: nn.Module, backbone: str) -> None:
    """Take over what fits by name and shape from another run; list what does not."""
    checkpoint, own = load_checkpoint(path), model.state_dict()
    if checkpoint["backbone"] != backbone:  # some shapes would agree, by chance
        raise UserError(f"--finetune-from {path}: it has --backbone "
                        f"{checkpoint['backbone']}, this run {backbone}")
    theirs = checkpoint["model"]
    fits = {name: tensor for name, tensor in theirs.items()
            if name in own and own[name].shape == tensor.shape}
    model.load_state_dict(fits, strict=False)
    print(f"{len(fits)} of {len(own)} tensors taken over from {path}")
    for name, tensor in theirs.items():
        if name not in fits:
            here = f"{tuple(own[name].shape)} here" if name in own else "not in here"
            print(f"  dropped: {name} {tuple(tensor.shape)}, {here}")
    for name in own:
        if name not in theirs:
            print(f"  not in it, as at the start: {name}")


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


AT_LEAST = {"crop": 32, "batch": 1, "log_every": 1, "save_every": 1, "accumulate": 1,
            **dict.fromkeys(("epochs", "iterations", "momentum", "weight_decay",
                             "power", "min_lr", "warmup", "aux_weight", "bn_images",
                             "pretrain", "clip", "workers", "eval_every", "seed",
                             "difficulty"), 0),
            **dict.fromkeys(("lr", "head_lr", "scale"), 1e-9)}


def check_values(args, values: dict) -> None:
    """Numbers that no run can be made of, before anything is opened."""
    for name, least in AT_LEAST.items():
        value = values.get(name, getattr(args, name, least))
        if not all(least <= x < math.inf for x in (value if isinstance(
                value, (tuple, list)) else [value])):  # nor NaN
            said = "above 0" if least == 1e-9 else f"at least {least}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {said}")
    if values["min_lr"] > values["lr"]:
        raise UserError(f"--min-lr {values['min_lr']}: above --lr {values['lr']}")
    if values["pretrain"] and not hasattr(load_method(args.method)[0], "pretrain_loss"):
        raise UserError(f"--pretrain: {args.method} has no loss of its own; drop it")
    if 0 < values["bn_images"] < values["batch"]:
        raise UserError(f"--bn-images {values['bn_images']}: fewer than one batch of "
                        f"{values['batch']}")


def prepare_data(args, values: dict):
    """Both splits, opened and spot-checked, so that bad files fail before step one."""
    split = {"root": args.data_root, "difficulty": args.difficulty}
    train, val = (data.open_dataset(args.dataset, name, **split)
                  for name in (args.train_split, "val"))
    if args.dataset != "streets":
        for part in (train, val):
            data.check_some(part)
    data.Batches(len(train), values["batch"], start=0, stop=0, seed=0)  # enough images?
    if args.cache:  # half the free memory, shared by the processes of this machine
        room = data.free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        train = data.Cached(train, args.workers, limit=room)
        val = data.Cached(val, args.workers, limit=room - train.bytes)
        print(f"--cache: {train}; {val}")
    return train, val


def total_steps(values: dict, images: int) -> int:
    total = values["iterations"] or values["epochs"] * (images // values["batch"])
    if values["warmup"] >= total:
        raise UserError(f"a warm-up of {values['warmup']} steps in a run of {total}: "
                        f"pass --warmup {total // 10}, or more --iterations")
    return total


def set_up(device: torch.device, args) -> None:
    """How the arithmetic is done, where torch leaves a choice."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        name_nondeterministic()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.deterministic
        # TF32: factors of float32 products are rounded to 10 bits, the sums are not.
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = bool(args.tf32)


def name_nondeterministic() -> None:
    """Turn torch's warnings, where --deterministic has no effect, into a list."""
    show, said = warnings.showwarning, set()

    def name(message, *rest, **options):
        operation, found, _ = str(message).partition(" does not have a deterministic")
        if not found:
            show(message, *rest, **options)
        elif operation not in said:
            said.add(operation)
            print(f"stays nondeterministic: {operation}")
    warnings.showwarning = name
    warnings.filterwarnings("always", ".*does not have a deterministic")


def start_run(args) -> Run:
    """Check everything, build everything, restore a checkpoint if there is one."""
    checkpoint, held = resume_point(args)
    recipe = make_recipe(args)
    values = {name: value for name, (value, _) in recipe.items()}
    check_values(args, values)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(join_processes(args.device or default))
    rank, world = rank_and_world()
    check_split(values["batch"], world, args.accumulate, device)
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
        prepare_model(args.method, model, train_set, args.workers)
        if args.finetune_from:
            finetune_from(args.finetune_from, model, values["backbone"])
    model.to(device)
    run = Run(args, values, device, rank, world, model, Objective(model, args, values),
              make_optimizer(model, values),
              torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
              train_set, val_set, Path(args.resume or ""), held, meta, total)
    if checkpoint:
        go_on_from(checkpoint, run)
    if dist.is_initialized():
        distribute(run)
    run.folder = own_folder(run)
    describe(run, recipe)
    return run


def identity(args, values: dict, options: dict, device, train_set, val_set) -> dict:
    """What makes a run this one; a resumed run must be the same, on any machine."""
    info = val_set.info
    return {"format": FORMAT, "method": args.method, "options": options,
            "backbone": values["backbone"], "dataset": args.dataset,
            "train_split": args.train_split, "data_root": args.data_root,
            "difficulty": args.difficulty, "train_images": len(train_set),
            "classes": list(info.classes), "palette": [list(c) for c in info.palette],
            "mean": list(data.MEAN), "std": list(data.STD), "seed": args.seed,
            "amp": args.amp, "eval_every": args.eval_every,
            "recipe": {name: list(value) if isinstance(value, tuple) else value
                       for name, value in values.items()},
            "args": {name: value for name, value in vars(args).items()
                     if name not in ("given", "resume", "debug")},
            "environment": environment(device, args)}


def own_folder(run: Run) -> Path:
    """The run's folder, made and locked by rank 0, known to all."""
    folder = [None]
    if run.rank == 0:
        path = run.folder if run.args.resume else new_folder(run.args)
        run.lock = run.lock or lock(path)
        for rubbish in path.glob("*.tmp"):  # of a process that was killed
            rubbish.unlink()
        folder = [str(path)]
        # Weights and momentum; last, prev, best, and the one that is being written.
        needed = 2 * 4 * tensor_bytes(run.model.state_dict())
        if free_on_disk(path) < needed:
            print(f"warning: checkpoints will take {needed / 1e9:.2f} GB, "
                  f"{free_on_disk(path) / 1e9:.2f} GB are free", file=sys.stderr)
    if run.world > 1:
        dist.broadcast_object_list(folder, 0)
    return Path(folder[0])


def new_folder(args) -> Path:
    """A new folder for the run; a default name gets a number if it is taken."""
    if args.out:
        folder = Path(args.out)
        if any((folder / name).exists() for name in ("last.pt", "prev.pt")):
            raise UserError(f"{folder} holds a run; continue it with --resume "
                            f"{folder}, or give another --out")
    else:
        name = f"{args.method.replace(':', '-')}-{args.dataset}-s{args.seed}"
        taken = 1
        folder = Path("runs") / name
        while folder.exists():
            taken += 1
            folder = Path("runs") / f"{name}-{taken}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error}); give another "
                        f"--out") from None
    return folder


def lock(folder: Path):
    """Two runs in one folder would overwrite each other: the second one ends here."""
    try:
        file = open(folder / ".lock", "w")
        # Of this kind a lock ends with its process, and the loader's have no share.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}; wait for it, or "
                        f"give another --out") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            print(f"warning: {folder} knows no locks; do not start a second run in it",
                  file=sys.stderr)
            return file
        raise UserError(f"cannot write in {folder} ({error})") from None
    return file


def describe(run: Run, recipe: dict[str, tuple]) -> None:
    """Say and store what is about to happen, each value with where it comes from."""
    args, batch, (_, source) = run.args, run.values["batch"], recipe["batch"]
    print(f"{args.dataset}: {len(run.train_set)} training ({args.train_split}), "
          f"{len(run.val_set)} validation images; {run.device}, "
          f"{torch.get_num_threads()} threads, {args.workers} workers, amp {args.amp}")
    print_recipe(recipe)
    share = batch // (run.world * args.accumulate)
    print(f"{batch} images per step ({source}) = {run.world} processes x "
          f"{args.accumulate} parts x {share} images")
    paper = load_method(args.method)[0].RECIPES.get(recipe_name(args), {}).get("batch")
    if paper and paper[0] != batch:
        print(f"  the paper's {paper[0]} images per step belong to its learning rate; "
              f"in proportion, {batch} would have {batch / paper[0]:.3g} times that")
    epochs = run.total * batch / len(run.train_set)
    print(f"{run.total} steps of {batch} images = {epochs:.1f} epochs -> {run.folder}")
    if run.rank > 0 or args.resume:
        return
    config = {"args": run.meta["args"],
              "recipe": {k: {"value": v, "source": s} for k, (v, s) in recipe.items()},
              "command": " ".join(sys.argv), "environment": run.meta["environment"]}
    with not_vital("config.json"):
        (run.folder / "config.json").write_text(json.dumps(config, indent=1))


def environment(device: torch.device, args) -> dict:
    """On what the last bits of a result depend, besides the recipe."""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "device": device.type,
            "threads": torch.get_num_threads(), "processes": rank_and_world()[1],
            "accumulate": args.accumulate, "compile": args.compile}


# --- 3. The loop ---------------------------------------------------------------------


def train(args) -> float:
    """One run from its first, or its resumed, step to its last; the last mIoU."""
    started, run = time.monotonic(), start_run(args)
    log = Log(run.folder / "log.csv", run)
    every = args.eval_every or -(-run.total // 5)
    matrix, feed = None, Feed(training_loader(run))
    with run.lock or nullcontext(), machine_faults(run), Signals() as asked, feed:
        while True:
            # What a state calls for depends on the state alone: resumed or not.
            last = run.done == run.total
            if run.done > run.evaluated and (last or run.done % every == 0):
                matrix = evaluate(run, log, asked)
                feed.restart()
            stop = agree(run, asked.signal)
            if stop or run.done in (run.evaluated, run.total) or (
                    run.done % args.save_every == 0):
                save(run, log)
            if stop:
                raise Stopped(stop, run)
            if last:
                break
            images, labels = feed.next()
            loss, terms, rate = train_step(run, images, labels)
            if run.done % args.log_every == 0 or run.done == run.total:
                log.progress(run, rate, loss, terms, feed)
                feed.restart()
    if run.rank == 0:
        with not_vital("samples.png"):
            sample_sheet(run.model, run.val_set, run.folder / "samples.png",
                         device=run.device)
    print(matrix.summary(protocol=str(Protocol()), expected_images=len(run.val_set)))
    print(f"best mIoU on val {run.best:.4f}; {time.monotonic() - started:.0f} s; "
          f"see {run.folder}/samples.png and curves.png")
    return matrix.miou()


def training_loader(run: Run):
    """This process' share of every batch, from the step that is next."""
    values = run.values
    batches = data.Batches(len(run.train_set), values["batch"], start=run.done,
                           stop=run.total, seed=run.args.seed, rank=run.rank,
                           world=run.world)
    return data.train_loader(run.train_set, batches, workers=run.args.workers,
                             crop=values["crop"], scale=values["scale"],
                             photometric=values["photometric"])


def train_step(run: Run, images: Tensor, labels: Tensor):
    """One optimiser step; returns the loss, its terms and the learning rate."""
    # Seeding every step makes dropout independent of history: resume is exact.
    torch.manual_seed(data.mix_seeds(run.args.seed, run.done, run.rank))
    rate = learning_rate(run.done, run.values, run.total)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    run.model.train()
    statistics = [buffer.clone() for buffer in run.model.buffers()]
    run.optimizer.zero_grad(set_to_none=True)
    loss, terms = backward(run, images, labels)
    run.scaler.unscale_(run.optimizer)
    # With the gradients' norm all that can go wrong is seen, and by all processes.
    norm = nn.utils.clip_grad_norm_(run.model.parameters(),
                                    run.values["clip"] or math.inf).item()
    if math.isfinite(loss) and math.isfinite(norm):
        run.scaler.step(run.optimizer)
        run.bad_steps = 0
    else:
        skip(run, statistics, loss, norm, rate)
    run.scaler.update()
    run.done += 1
    return loss, terms, rate


def backward(run: Run, images: Tensor, labels: Tensor) -> tuple[float, dict]:
    """Gradients of the mean loss over the valid pixels of all processes' images.

    A mean over the means of parts would let a pixel weigh more where many around it are
    void. So each part counts by its share of the valid pixels, and the gradient is that
    of the undivided batch. (Batch norm sees one part at a time, OHEM chooses in it.)
    """
    images = images.to(run.device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(run.device, non_blocking=True)
    parts = list(zip(images.chunk(run.args.accumulate),
                     labels.chunk(run.args.accumulate)))
    pretrain = run.done < run.values["pretrain"]  # a mean over all, void too
    counts = [torch.ones_like(truth) if pretrain else truth != IGNORE_INDEX
              for _, truth in parts]
    valid = torch.stack([count.sum() for count in counts])
    weights = valid / total_over_processes(run, valid.sum()).clamp(min=1)
    sums = 0
    for i, (inputs, truth) in enumerate(parts):
        # Until the last part the processes have nothing to tell each other.
        early = dist.is_initialized() and i + 1 < len(parts)
        with run.network.no_sync() if early else nullcontext():
            loss, terms = run.network(network_input(run.model, inputs, truth), truth,
                                      pretrain)
            # DDP takes the mean over processes, and this is a share of a sum.
            run.scaler.scale(loss * weights[i] * run.world).backward()
        terms = {"loss": loss.detach()} | terms
        sums = sums + weights[i] * torch.stack(list(terms.values()))
    loss, *each = total_over_processes(run, sums).tolist()
    return loss, dict(zip(list(terms)[1:], each))


def skip(run: Run, statistics: list[Tensor], loss: float, norm: float, rate: float):
    """Leave no trace of a step whose loss or gradient is not finite; ten are too many.

    In fp16 a gradient that overflows is nothing unusual: the scaler halves its scale.
    """
    for buffer, before in zip(run.model.buffers(), statistics):
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
    raise Diverged(
        f"loss {loss:g}, gradient norm {norm:g} at iteration {run.done + 1}, the tenth "
        f"in a row, learning rate {rate:.3g}; its images: {', '.join(names)}. Try "
        f"{other}a lower --lr, a longer --warmup or --clip 10; {run.folder}/last.pt is "
        f"from before")


def evaluate(run: Run, log: Log, asked: Signals):
    """Score the validation split and keep the best; None if a signal cut it short."""
    if run.world > 1:
        same_buffers(run.model)
    if run.values["bn_images"]:
        refresh_batch_norm(run)
    matrix = score_dataset(run.model, run.val_set, device=run.device,
                           workers=run.args.workers, amp=run.args.amp,
                           stopped=lambda: asked.signal)
    if matrix is None:
        return None
    run.evaluated, run.miou = run.done, matrix.miou()
    log.evaluation(run, matrix.pixel_accuracy())
    if run.miou > run.best:
        # Before last.pt: a kill in between is made good by the resumed run.
        run.best = run.miou
        save(run, log, "best.pt")
    return matrix


def refresh_batch_norm(run: Run) -> None:
    """Take batch norm's running statistics anew, from whole training images.

    Training sees crops, evaluation sees whole images, and the two differ: in a map of
    7x9 cells a 3x3 convolution of dilation 9 reads little but zero padding, in one of
    12x15 it reads features. On CamVid, with such crops: 13 to 19 points of mIoU.
    Of several processes, all do the same work here.
    """
    torch.manual_seed(run.args.seed)  # dropout is on: no memory of what was before
    count, length = run.values["bn_images"], len(run.train_set)
    picked = [i * length // count for i in range(min(count, length))]
    loader = data.whole_loader(run.train_set, picked, run.values["batch"],
                               workers=run.args.workers)
    inputs = (network_input(run.model, *batch) for batch in loader)
    with autocast(run.device, run.args.amp):
        torch.optim.swa_utils.update_bn(inputs, run.model, device=run.device)


# --- 4. Several processes ------------------------------------------------------------


def check_split(batch: int, world: int, parts: int, device: torch.device) -> None:
    """The images of a step must divide evenly, and batch norm needs two at a time."""
    pieces = world * parts
    if batch % pieces:
        more = (batch // pieces + 1) * pieces
        raise UserError(f"--batch {batch} does not divide by {world} processes x "
                        f"{parts} parts; pass --batch {max(pieces, more - pieces)} or "
                        f"{more}")
    together = batch // pieces * (world if device.type == "cuda" else 1)
    if together < 2:
        raise UserError(f"--batch {batch}: batch norm on the pooled 1x1 map of ASPP "
                        f"needs at least two images at a time; pass --batch "
                        f"{2 * pieces} or more (--accumulate does not help)")


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
        # Every parameter has a gradient in every step, except that Eq. (4) of
        # DUpsampling asks neither the temperature nor the auxiliary head.
        find_unused_parameters=run.values["pretrain"] > 0)


def same_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's running statistics: they will score one model.

    DDP does so before each forward pass, and each has seen other images since.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def total_over_processes(run: Run, x: Tensor) -> Tensor:
    x = x.clone()
    if run.world > 1:
        dist.all_reduce(x)
    return x


def agree(run: Run, number: int) -> int:
    """The largest number of any process: a signal that one got stops all, together."""
    x = torch.tensor(number, device=run.device)
    if run.world > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


# --- 5. Checkpoints ------------------------------------------------------------------


def save(run: Run, log: Log, name="last.pt") -> None:
    """Write all that the next step depends on; last.pt becomes prev.pt."""
    if run.rank > 0 or (name == "last.pt" and run.saved == (run.done, run.evaluated)):
        return
    model = run.model.state_dict()
    broken = [name for name, x in model.items() if not x.isfinite().all()]
    if broken:
        raise Diverged(f"{broken[0]} is not finite at iteration {run.done}; not saved: "
                       f"{run.folder}/last.pt is from before. Try a lower --lr")
    state = run.meta | {
        "iteration": run.done, "evaluated": run.evaluated, "miou": run.miou,
        "best_miou": run.best, "bad_steps": run.bad_steps, "log_rows": len(log.rows),
        "model": model, "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "rng": random_states(run.device)}
    if name == "last.pt":
        save_checkpoint(state, run.folder / name, keep=run.folder / "prev.pt")
        run.saved = run.done, run.evaluated
        log.catch_up()
    else:
        save_checkpoint(state, run.folder / name)


def random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_checkpoint(state: dict, path: Path, *, keep: Path | None = None) -> None:
    """Write beside, flush, read back, rename: `path` is the old or the new, never half.

    Killed at any moment it leaves a whole one, if only in `keep`: between two renames.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state | {"sha256": checksum(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        load_checkpoint(temporary)  # what the disk has, not what was meant
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the names, too, survive a power cut
        os.close(folder)
    except (OSError, RuntimeError, UserError) as error:  # torch's zip writer: Runtime..
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path} ({str(error).splitlines()[0]}); it takes "
            f"{tensor_bytes(state) / 1e9:.2f} GB and {free_on_disk(path) / 1e9:.2f} GB "
            f"are free; the older checkpoint is untouched") from None


def tensor_bytes(state) -> int:
    """Bytes of all tensors in nested dicts, about the size of the file."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(tensor_bytes, state.values())) if isinstance(state, dict) else 0


def free_on_disk(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


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
            if os.environ.get("RANK", "0") == "0" and (folder / "last.pt").exists():
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
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder" if not folder.exists() else
                        f"--resume takes a folder: --resume {folder.parent}")
    held = lock(folder) if os.environ.get("RANK", "0") == "0" else None
    checkpoint = newest_checkpoint(folder)
    for name, value in checkpoint["args"].items():
        if name not in args.given:
            setattr(args, name, value)
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
        before = checkpoint["environment"][name]
        if before != value:
            print(f"warning: {name} was {before}, is {value}: the last bits may differ",
                  file=sys.stderr)


def go_on_from(checkpoint: dict, run: Run) -> None:
    """Put everything that the next step depends on in its place."""
    run.model.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if run.device.type == "cuda" and "cuda" in checkpoint["rng"]:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], run.device)
    run.done, run.evaluated = checkpoint["iteration"], checkpoint["evaluated"]
    run.saved = run.done, run.evaluated
    run.miou, run.best = checkpoint["miou"], checkpoint["best_miou"]
    run.bad_steps, run.log_rows = checkpoint["bad_steps"], checkpoint["log_rows"]
    if run.evaluated == run.total:
        raise UserError(f"{run.folder} is finished: {run.done} of {run.total} steps")


# --- 6. What can go wrong ------------------------------------------------------------


class Failed(UserError):
    """The machine's fault, and nobody's mistake."""

    code = 1


class Diverged(UserError):
    code = 3


class StorageError(UserError):
    code = 4


class Stopped(UserError):
    """By SIGINT or SIGTERM, with everything saved."""

    def __init__(self, number: int, run: Run):
        self.code = 128 + number
        super().__init__(f"{signal.Signals(number).name}: saved after iteration "
                         f"{run.done} of {run.total}; go on with\n"
                         f"  python train.py --resume {run.folder}")


class Signals:
    """SIGINT and SIGTERM ask for an end after this step; a second one ends at once."""

    def __init__(self):
        self.signal, self.asked, self.before = 0, 0.0, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame) -> None:
        if not self.signal:
            self.signal, self.asked = number, time.monotonic()
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif time.monotonic() - self.asked > 1:
            # Sooner it is the same one: SLURM's, which torchrun passes on as well.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def machine_faults(run: Run):
    """Give the faults of a machine, which torch reports in its own terms, an advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).splitlines()[0] if str(error) else "no memory"
        args, share = run.args, run.values["batch"] // run.world // run.args.accumulate
        if "DataLoader worker" in said:
            advice = ("a loader process was killed, mostly for want of memory: lower "
                      "--workers or --batch")
        elif "DataLoader timed out" in said:
            for process in multiprocessing.active_children():
                process.kill()  # it would not hear anything less
            advice = (f"a loader process said nothing for {data.STUCK} s: a disk that "
                      f"does not answer? Try fewer --workers")
        elif out_of_memory(error):
            smaller = (f"--accumulate {2 * args.accumulate}" if share % 4 == 0 else
                       f"--crop {' '.join(str(n // 2) for n in run.values['crop'])}")
            advice = (f"out of memory at --batch {run.values['batch']} --crop "
                      f"{' '.join(map(str, run.values['crop']))}, peak "
                      f"{memory(run.device):.1f} GB: try {smaller}")
        elif run.world > 1 and any(word in said for word in ("onnection", "NCCL")):
            advice = "another process of this run has ended; it says why"
        else:
            raise
        raise Failed(f"{advice} ({said}). {run.folder}/last.pt is whole: --resume "
                     f"{run.folder}") from None


@contextmanager
def not_vital(name: str):
    """A disk that is full costs this file, not the run."""
    try:
        yield
    except OSError as error:
        print(f"warning: cannot write {name} ({error}); the run goes on",
              file=sys.stderr)


def memory(device) -> float:
    """Peak memory in GB: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kB on Linux


# --- 7. The log ----------------------------------------------------------------------


class Feed:
    """Batches one by one, and the time that was spent waiting for them."""

    def __init__(self, loader):
        self.loader, self.batches, self.advised = loader, None, False

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

    def advice(self, args) -> str:
        """What to do when the loader is what is slow; said once."""
        share = self.waited / (time.monotonic() - self.since)
        if share < 0.3 or self.advised:
            return ""
        self.advised, cores = True, os.cpu_count() or 1
        ways = ([f"--workers {cores}"] if args.workers < cores else []) + (
            [] if args.cache else ["--cache"]) + ["smaller images on disk"]
        return (f"        {share:.0%} of the time goes into waiting for images: "
                f"{', '.join(ways)} would help")


class Log:
    """log.csv and the progress lines."""

    columns = ("iteration", "lr", "loss", "out", "aux", "images_per_s", "data_share",
               "memory_gb", "miou", "pixel_accuracy")

    def __init__(self, path: Path, run: Run):
        """Rows that came after the checkpoint are from a lost stretch, and go."""
        self.path, self.rows, self.complete = path, [], True
        self.mute = run.rank > 0
        if run.log_rows and path.exists():
            with open(path, newline="") as file:
                self.rows = list(csv.DictReader(file))[:run.log_rows]
        if not self.mute:
            if len(self.rows) < run.log_rows:
                print(f"warning: {path} has lost rows; they stay lost", file=sys.stderr)
            self.complete = False
            with not_vital("log.csv"):
                self.write_all()
                self.complete = True

    def write_all(self) -> None:
        temporary = self.path.with_suffix(".csv.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)

    def write(self, **row) -> None:
        """One row more; if the disk is full, it is written when it is not any more."""
        self.rows.append({name: str(value) for name, value in row.items()})
        if self.mute:
            return
        if not self.complete:
            return self.catch_up()
        self.complete = False
        with not_vital("log.csv"):
            if not self.path.exists():
                self.write_all()
            else:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns, restval="").writerow(row)
            self.complete = True

    def catch_up(self) -> None:
        """Rows that did not fit on the disk may do so now."""
        if not self.complete:
            with suppress(OSError):
                self.write_all()
                self.complete = True

    def progress(self, run: Run, rate, loss, terms, feed: Feed) -> None:
        seconds = time.monotonic() - feed.since
        speed = feed.steps * run.values["batch"] / seconds
        left = int((run.total - run.done) * run.values["batch"] / speed)
        waited, gigabytes = feed.waited / seconds, memory(run.device)
        aux = sum(value for name, value in terms.items() if name != "out")
        self.write(iteration=run.done, lr=f"{rate:.6g}", loss=f"{loss:.5f}",
                   out=f"{terms['out']:.5f}", aux=f"{aux:.5f}",
                   images_per_s=f"{speed:.1f}", data_share=f"{waited:.2f}",
                   memory_gb=f"{gigabytes:.2f}")
        print(f"{run.done:>6}/{run.total}  loss {loss:.3f}  lr {rate:.4f}  "
              f"{speed:.1f} img/s  data {waited:.0%}  {gigabytes:.1f} GB  "
              f"ETA {left // 60}:{left % 60:02d}", flush=True)
        advice = feed.advice(run.args)
        if advice:
            print(advice)

    def evaluation(self, run: Run, accuracy: float) -> None:
        self.write(iteration=run.done, miou=f"{run.miou:.5f}",
                   pixel_accuracy=f"{accuracy:.5f}")
        print(f"{run.done:>6}  val mIoU {run.miou:.4f}  pixel accuracy {accuracy:.4f}",
              flush=True)
        if not self.mute:
            with not_vital("curves.png"):
                draw_curves(self.rows, run.folder / "curves.png", run.args.method)


# --- 8. The command line -------------------------------------------------------------


class Given(argparse.Action):
    """Store a value and remember that it was given, for --resume and for sources."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, values if self.nargs != 0 else True)
        namespace.given = namespace.given | {self.dest}


def machine_options(add) -> None:
    """What changes how fast a run is, not what it is (but for --amp)."""
    add("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="loader processes (default: the cores, at most 8)")
    add("--cache", nargs=0, default=False,
        help="keep decoded images in memory, as many as fit into half of it")
    add("--amp", choices=("off", "bf16", "fp16"), default="off",
        help="convolutions in 16 bits, the rest in float32 (default off)")
    add("--accumulate", type=int, default=1, metavar="PARTS",
        help="a process' images go through the network in so many parts (default 1)")
    add("--compile", nargs=0, default=False, help="torch.compile the network")
    add("--tf32", type=int, choices=(0, 1), default=1,
        help="on a GPU round the factors of float32 products to 10 bits (default 1)")
    add("--deterministic", nargs=0, default=False,
        help="repeatable algorithms on a GPU; operations without one are named")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a method of this library. Without arguments: NRD on "
        "procedural streets, a few minutes on two CPU cores, nothing to download.",
        epilog="Recipe values that are not given come from the module's RECIPES where "
        "its paper states them for the data set, else from train.py; each is printed "
        "with its source. Ctrl-C and SIGTERM save first; --resume goes on.")
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
    add("--finetune-from", metavar="PATH", help="begin with the weights of another run")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (0)")
    add("--eval-every", type=int, default=0, metavar="STEPS",
        help="evaluate and save every so many steps (default a fifth of the run)")
    add("--save-every", type=int, default=500, metavar="STEPS",
        help="save between evaluations, too (default 500)")
    add("--log-every", type=int, default=20, metavar="STEPS", help="progress line (20)")
    machine_options(add)
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
    args, code = parse(argv), 0
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes one talks
    with show_errors(args.debug), open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere) if quiet else nullcontext():
            try:
                train(args)
            except Stopped as stop:
                print(stop)
                code = stop.code
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
