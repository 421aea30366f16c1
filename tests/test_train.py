"""Training from the command line: recipes, steps, what a run leaves, mistakes."""
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import dupsampling
import train
from common import (UserError, build_model, load_checkpoint, load_method, methods,
                    restore, segmentation_loss)
from conftest import (TINY, assert_same, call_evaluate, draw_tree, launch, rows_of,
                      save, stop_after, train_ends)

PAIRS = [*TINY, "--batch", "2", "--warmup", "1"]  # two images at a time, or one part
PICTURES = {name: getattr(train, name) for name in ("draw_curves", "sample_sheet")}

pytestmark = pytest.mark.usefixtures("one_thread", "thin")


@pytest.mark.parametrize("method", ["nrd", "dupsampling", "efficientfcn", "sfnet"])
def test_sixteen_bits_lose_little(tmp_path, method):
    """A step in bf16 and in fp16: float32's loss within 1 %, and no bad step.

    (That fp16 has to halve its first scale once or twice is no bad step.)
    """
    losses = {}
    for amp in ("off", "bf16", "fp16"):
        launch(*PAIRS, "--method", method, "--iterations", 2, "--crop", 64, 64, "--amp",
               amp, "--out", tmp_path / amp)
        losses[amp] = [float(row["loss"]) for row in rows_of(tmp_path / amp)
                       if row["loss"]]
        assert load_checkpoint(tmp_path / amp)["bad_steps"] == 0
    for amp in ("bf16", "fp16"):
        assert losses[amp][0] == pytest.approx(losses["off"][0], rel=0.01)
        assert losses[amp] != losses["off"], f"{amp} is without effect"


def test_a_run_leaves_everything_it_promises(tmp_path, capsys, monkeypatch):
    """config, log, curves, samples, last, best; the number printed is stored too."""
    for name, draw in PICTURES.items():  # which `thin` leaves out
        monkeypatch.setattr(train, name, draw)
    miou = launch(*PAIRS, "--iterations", 4, "--eval-every", 2, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert f"mIoU {miou:.4f}" in printed and "2/2 images" in printed
    for name in ("config.json", "log.csv", "curves.png", "samples.png", "last.pt",
                 "best.pt"):
        assert (tmp_path / name).stat().st_size > 0, name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["recipe"]["iterations"] == {"value": 4, "source": "command line"}
    assert config["recipe"]["lr"]["source"] == "ours"
    state = torch.load(tmp_path / "last.pt", weights_only=True)  # no code in it
    assert state["iteration"] == 4 and state["miou"] == miou
    assert len(state["classes"]) == len(state["palette"]) == 11
    rows = rows_of(tmp_path)
    assert [int(row["iteration"]) for row in rows if row["loss"]] == [1, 2, 3, 4]
    assert [int(row["iteration"]) for row in rows if row["miou"]] == [2, 4]
    assert state["log"] == [{name: value for name, value in row.items() if value}
                            for row in rows], "the log of the checkpoint is another one"


def test_bn_images_are_seen_whole_by_batch_norm(tmp_path, capsys):
    """The stem's running mean is that of whole training images, not of the crops.

    Five images are two full batches of two and a rest, and what is left out is said.
    """
    launch(*PAIRS, "--iterations", 2, "--bn-images", 5, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "are of 4 images: full batches of 2, of 5" in said
    assert re.search(r"^  init +mlp +\(ours, from scratch\)$", said, re.M), (
        "an option that FROM_SCRATCH sets is printed with the recipe")
    checkpoint = load_checkpoint(tmp_path)
    model, streets = restore(checkpoint), data.open_dataset("streets", "train")
    torch.manual_seed(0)  # the run's seed
    picked = [streets.load(i)[0] for i in torch.randperm(6)[:4].tolist()]
    with torch.no_grad():
        stem = model.encoder.stem[0](data.NORMALISE(torch.stack(picked)))
    torch.testing.assert_close(checkpoint["model"]["encoder.stem.1.running_mean"],
                               stem.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_bn_images_come_in_parts_as_in_training(tmp_path, monkeypatch):
    """Whole images of a whole batch would take more memory than any step."""
    batches = []
    whole_loader = data.whole_loader

    def noted(dataset, indices, batch, **options):
        batches.append(batch)
        return whole_loader(dataset, indices, batch, **options)
    monkeypatch.setattr(data, "whole_loader", noted)
    launch(*PAIRS, "--iterations", 2, "--batch", 4, "--accumulate", 2, "--bn-images", 4,
           "--out", tmp_path)
    assert set(batches) == {2}


def test_bn_images_of_one_batch_are_not_neighbours(tmp_path, monkeypatch):
    """Frames of a video are alike: the variance within batches of them is too small."""
    orders = []
    whole_loader = data.whole_loader

    def noted(dataset, indices, *args, **options):
        orders.append(indices)
        return whole_loader(dataset, indices, *args, **options)
    monkeypatch.setattr(data, "whole_loader", noted)
    launch(*PAIRS, "--iterations", 2, "--bn-images", 6, "--out", tmp_path)
    assert sorted(orders[0]) == [0, 1, 2, 3, 4, 5], "an image more than once, or never"
    assert orders[0] != sorted(orders[0]), "in the order of the file names"


def test_bn_images_must_have_one_size():
    samples = [(torch.zeros(3, 4, w), torch.zeros(4, w)) for w in (5, 6)]
    with pytest.raises(UserError, match=r"\(4, 5\) and \(4, 6\); pass --bn-images 0"):
        data.same_size(samples)


def test_bn_images_of_two_sizes_are_refused_before_the_first_step(
        tmp_path, monkeypatch, capsys):
    """And not at the first evaluation, when the run can no longer do without them.

    All of them are looked at: the spot check may miss the one that is larger.
    """
    monkeypatch.setattr(data, "check_some", lambda *_: None)
    draw_tree(tmp_path / "tree", "folder", images=4)
    for kind in ("images", "masks"):
        file = sorted((tmp_path / "tree/train" / kind).iterdir())[0]
        picture = Image.open(file)
        picture.crop((0, 0, 64, picture.height)).save(file)
    said = train_ends(capsys, 2, *PAIRS, "--dataset", "folder", "--data-root",
                      tmp_path / "tree", "--iterations", 2, "--bn-images", 4,
                      "--out", tmp_path / "run").err
    assert "--bn-images needs whole images of one size" in said
    assert not (tmp_path / "run/last.pt").exists()


def test_a_fault_in_evaluation_costs_no_step(tmp_path, monkeypatch, capsys):
    """Out of memory while scoring: every step is saved, `evaluate.py` can try again."""
    def full(*_, **__):
        raise RuntimeError("CUDA out of memory")
    monkeypatch.setattr(train, "score_dataset", full)
    said = train_ends(capsys, 1, *PAIRS, "--iterations", 2, "--eval-every", 2,
                      "--out", tmp_path).err
    assert "out of memory" in said and load_checkpoint(tmp_path)["iteration"] == 2


def test_a_signal_after_the_last_evaluation_leaves_a_finished_run(tmp_path,
                                                                  monkeypatch):
    """Nothing is left to resume, so the run ends as any other, with its pictures.

    (Stopped, it would say that --resume goes on, which refuses finished runs.)
    """
    score = train.score_dataset

    def signalled(*args, **options):
        matrix = score(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return matrix
    monkeypatch.setattr(train, "score_dataset", signalled)
    miou = launch(*PAIRS, "--iterations", 2, "--eval-every", 2, "--out", tmp_path)
    assert load_checkpoint(tmp_path)["miou"] == miou


def test_schedule_warms_up_and_decays_to_min_lr():
    values = {"lr": 0.1, "min_lr": 1e-4, "power": 0.9, "warmup": 10, "warmup_from": 0.0}
    rates = [train.learning_rate(i, values, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.01, rel=0.01) and max(rates) == rates[9]
    assert rates[-1] < 0.003 and sorted(rates[9:], reverse=True) == rates[9:]
    assert train.learning_rate(50, values, 100) == pytest.approx(
        (0.1 - 1e-4) * 0.5**0.9 + 1e-4)
    none = values | {"warmup": 0, "warmup_from": 0.01}
    assert train.learning_rate(0, none, 100) == 0.1, "a warm-up of no steps"
    values["warmup_from"] = 0.5
    low = [train.learning_rate(i, values, 100) for i in range(100)]
    assert low[0] == pytest.approx(0.05, rel=0.01) and low[10:] == rates[10:]
    assert low[5] == pytest.approx(rates[5] * 0.75 / 0.6), "half way to the full rate"


@pytest.mark.parametrize("method", methods())
def test_a_batch_can_be_learned_by_heart(method):
    """30 SGD steps on two small crops: the loss falls below 60 % of its start.

    DUpsampling has to lower its temperature first, which takes some 30 steps more.
    """
    steps, rate = (60, 0.05) if method == "dupsampling" else (30, 0.01)
    dataset, module = data.open_dataset("streets", "train"), load_method(method)[0]
    images, labels = map(torch.stack, zip(*(dataset.load(i) for i in range(2))))
    images = data.NORMALISE(images)[..., 32:96, 64:192]
    labels = labels[:, 32:96, 64:192]
    model = build_model(method, 11, backbone="resnet18", channels=32,
                        **module.FROM_SCRATCH)
    getattr(module, "prepare", lambda *_: None)(model, labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss, terms = segmentation_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(terms["out"].item())
    assert losses[-1] < 0.6 * losses[0], losses


def test_paper_recipe_beats_ours_and_command_line_beats_both():
    recipe = train.make_recipe(train.parse(["--dataset", "cityscapes"]))
    assert recipe["lr"][0] == 0.01 and recipe["lr"][1].startswith("paper")
    assert recipe["crop"][0] == (512, 1024) and recipe["iterations"][0] == 84_000
    assert "channels" not in recipe, "the paper's network, not ours"
    recipe = train.make_recipe(train.parse(["--dataset", "cityscapes", "--lr", "0.02"]))
    assert recipe["lr"] == (0.02, "command line")
    assert train.make_recipe(train.parse([]))["lr"][1] == "ours"


@pytest.mark.parametrize("dataset", ["camvid", "cityscapes", "ade20k"])
def test_one_recipe_for_all_methods_can_be_asked_for(dataset):
    """Where papers state recipes, --recipe ours compares decoders and nothing else."""
    asked = [train.parse(["--method", method, "--dataset", dataset, "--recipe", "ours"])
             for method in methods()]
    first, *others = map(train.make_recipe, asked)
    assert all(other == first for other in others)
    assert {source for _, source in first.values()} == {"ours"} and "channels" in first


def test_trainval_is_trained_on_and_written_down(tmp_path, capsys):
    """--train-split: in the first line, in the checkpoint, and again after --resume."""
    root = draw_tree(tmp_path / "data", "camvid")
    launch(*PAIRS, "--dataset", "camvid", "--data-root", root, "--train-split",
           "trainval", "--iterations", 2, "--bn-images", 0, "--out", tmp_path / "run")
    assert "camvid: 4 training (trainval), 2 validation" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run")["train_split"] == "trainval"
    args = train.parse(["--resume", str(tmp_path / "run")])
    assert train.resume_point(args) and args.train_split == "trainval"


def test_the_augmented_voc_has_the_recipes_of_voc():
    """Papers that say VOC train on it; 80 epochs are EfficientFCN's for VOC."""
    asked = [train.parse(["--method", "efficientfcn", "--dataset", name])
             for name in ("voc", "voc-aug")]
    recipes = list(map(train.make_recipe, asked))
    assert recipes[0] == recipes[1] and recipes[0]["epochs"][0] == 80
    assert "channels" not in recipes[1], "the paper's network, not ours"
    values = {"backbone": "resnet18", "head_lr": 1.0}
    for args in asked:
        args.method = "dupsampling"
        _, options = train.make_model(args, values, 21, fresh=False)
        assert "init" not in options, "the paper's initialisation, not ours"


@pytest.mark.parametrize("method", methods())
def test_cityscapes_trains_on_the_distributed_layout(tmp_path, method, capsys):
    """The real command on a drawn tree, made small; 19 classes, no weights loaded."""
    root = draw_tree(tmp_path / "data", "cityscapes", size=(128, 256))
    launch("--method", method, "--dataset", "cityscapes", "--data-root", root,
           "--weights", "none", "--backbone", "resnet18", "--iterations", 2, "--batch",
           2, "--warmup", 0, "--crop", 64, 64, "--set", "channels=16", "--workers", 0,
           "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert "of 19 classes present" in said and "2/2 images" in said


def test_dupsampling_fits_w_once_and_resume_keeps_it(tmp_path, monkeypatch, capsys):
    """W comes from the training labels before step one; a resumed run has it."""
    argv = [*PAIRS, "--method", "dupsampling:no-fusion", "--iterations", 4,
            "--eval-every", 2]
    launch(*argv, "--out", tmp_path / "whole")
    assert "directions keep" in capsys.readouterr().out
    W = load_checkpoint(tmp_path / "whole")["model"]["decoder.dupsample.W"]
    expected, _, _ = dupsampling.principal_components(
        data.LabelMaps(data.open_dataset("streets", "train"), 0), 11, ratio=16,
        components=64)
    torch.testing.assert_close(W, expected)

    with monkeypatch.context() as patch, pytest.raises(train.Stopped):
        stop_after(2, patch)
        launch(*argv, "--out", tmp_path / "cut")
    monkeypatch.setattr(dupsampling, "prepare", None)
    launch("--resume", tmp_path / "cut")
    assert_same(*(load_checkpoint(tmp_path / name)["model"]
                  for name in ("whole", "cut")))


def test_pretraining_regresses_before_it_classifies(tmp_path):
    """--pretrain 2: two steps of Eq. (4), T has no part in them, then cross-entropy."""
    for steps, name in ((2, "only"), (1, "then")):
        launch(*PAIRS, "--method", "dupsampling:no-fusion", "--iterations", 2,
               "--pretrain", steps, "--out", tmp_path / name)
    log_T = {name: load_checkpoint(tmp_path / name)["model"][
        "decoder.dupsample.temperature.log_T"].item() for name in ("only", "then")}
    assert log_T["only"] == 0 and log_T["then"] != 0


def test_head_lr_speeds_up_all_but_the_encoder():
    """EfficientFCN's code: the decoder learns at ten times the encoder's rate."""
    model = build_model("efficientfcn", 5, backbone="resnet18", channels=16)
    values = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "head_lr": 10.0}
    groups = train.make_optimizer(model, values).param_groups
    named = [{id(p) for p in group["params"]} for group in groups]
    assert named[0] == {id(p) for p in model.encoder.parameters()}
    assert named[1] == {id(p) for p in model.parameters()} - named[0]
    assert [group["factor"] for group in groups] == [1.0, 10.0]


class InOnePiece(nn.Module):
    """A method that keeps the contract and does not say what its encoder is."""

    num_classes = 11

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 11, 1), nn.BatchNorm2d(11))

    def forward(self, images):
        return {"out": self.layer(images), "aux": []}


def test_head_lr_needs_an_encoder_to_leave_out(tmp_path, monkeypatch, capsys):
    """With one learning rate all of it trains; a second one would go nowhere."""
    monkeypatch.setattr(train, "build_model", lambda *_, **__: InOnePiece())
    argv = [*PAIRS, "--iterations", 2, "--out", tmp_path / "run"]
    said = train_ends(capsys, 2, *argv, "--head-lr", 2).err
    assert "--head-lr: nrd does not say" in said and not (tmp_path / "run").exists()
    launch(*argv, "--save-every", 1, "--eval-every", 1)
    before, after = (load_checkpoint(tmp_path / "run" / name)["model"]
                     for name in ("prev.pt", "last.pt"))
    still = [name for name, x in before.items() if torch.equal(x, after[name])]
    assert not still, f"these do not learn: {still}"


@pytest.mark.parametrize("method", ["dupsampling:bilinear-os32", "nrd:no-guidance"])
def test_upper_bound_trains_scores_and_refuses_pictures(tmp_path, method, capsys):
    """--backbone labels, from the command line to the table; predict says no."""
    launch(*PAIRS, "--method", method, "--backbone", "labels", "--iterations", 2,
           "--bn-images", 2, "--out", tmp_path / "run")
    call_evaluate("score", tmp_path / "run", "--workers", 0)
    call_evaluate("table", tmp_path / "run")
    assert "labels" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit):
        call_evaluate("explain", tmp_path / "run")
    assert "reads the ground truth" in capsys.readouterr().err


# --- Mistakes ------------------------------------------------------------------------

MISTAKES = [
    # A number out of its range is named by its option ..
    ("--lr 0", "--lr: must be above 0"), ("--lr -1", "--lr: must be above 0"),
    ("--lr nan", "--lr: must be above 0"), ("--lr fast", "--lr: 'fast' is no float"),
    ("--batch 0", "--batch: must be at least 1"),
    ("--crop 8 8", "--crop: must be at least 32"), ("--crop 64", "--crop: expected 2"),
    ("--workers -1", "--workers: must be at least 0"),
    ("--log-every 0", "--log-every: must be at least 1"),
    ("--accumulate 0", "--accumulate: must be at least 1"),
    ("--momentum -0.1", "--momentum: must be at least 0"),
    ("--scale 0 1", "--scale: must be above 0"),
    ("--iterations 3000000000", "--iterations: must be at least 0 and at most 2147"),
    # .. and so are numbers that do not go together.
    ("--scale 2 1", "--scale 2.0 1.0: from the smaller to the larger"),
    ("--min-lr 1", "--min-lr 1.0: above --lr"),
    ("--base-size 2048 0", "--base-size: two sides, or 0 0"),
    ("--base-size 64 32 --bn-images 8", "pass --bn-images 0 or --base-size 0 0"),
    ("--dataset camvid --base-size 480 360", "pass --bn-images 0 or --base-size 0 0"),
    ("--epochs 0 --iterations 0", "no step at all"),
    ("--epochs 2 --iterations 3", "--epochs and --iterations: give one of them"),
    ("--ohem-threshold 0.7", "--ohem-threshold: needs --ohem"),
    ("--backbone labels --weights imagenet", "labels is no network"),
    ("--data-root x", "streets is drawn and has no folder"),
    ("--dataset folder --difficulty 1", "--difficulty: is one of streets"),
    ("--channels 32 --set channels=64", "give one of them"),
    ("--weights imagenet --finetune-from x", "give one of them"),
    ("--iterations 5 --warmup 10", "pass --warmup 0, or more --iterations"),
    ("--batch 1", "--batch 1 does not do for 1 processes x 1 parts"),
    ("--batch 6 --accumulate 4", "1 processes x 4 parts: pass a multiple of 4, 8"),
    ("--batch 4 --accumulate 4", "--accumulate does not help"),
    ("--batch 1000", "larger than the training set"),
    ("--bn-images 1", "fewer than one batch"),
    # Words: what is known, or what was meant.
    ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
    ("--amp fp8", "--amp: invalid choice: 'fp8'"),
    ("--method nrdd", "unknown method 'nrdd' (did you mean 'nrd'?)"),
    ("--set hiden=3", "has no option 'hiden'"),
    ("--set points=4 --set points=16", "points is given twice"),
    ("--method sfnet --set aligned=3", "sfnet cannot be built so"),
    ("--method sfnet --set aligned={3}", "give a number, a word"),
    ("--method deeplabv3plus --set codewords=8", "has no option 'codewords'"),
    ("--dataset moon", "unknown data set 'moon'"),
    ("--dataset camvid --data-root /nowhere", "no folder /nowhere"),
    ("--backbone resnet19", "unknown backbone"),
    ("--backbone labels", "has no res2, only res5"),
    ("--weights imagnet", "no such file"),
    ("--pretrain 5", "nrd has no loss of its own"),
    ("--resume runs/none", "--resume runs/none: no such folder"),
]


@pytest.mark.parametrize("argv, sentence", MISTAKES, ids=[argv for argv, _ in MISTAKES])
def test_mistakes_end_in_a_sentence_and_code_2(argv, sentence, tmp_path, monkeypatch,
                                               capsys):
    """No traceback, nothing trained, and no folder of a run that never began."""
    monkeypatch.chdir(tmp_path)
    said = train_ends(capsys, 2, *PAIRS, *argv.split())
    assert said.err.startswith("error: ") and sentence in said.err, said.err
    assert "loss" not in said.out and not list(tmp_path.iterdir())


def test_a_variant_is_not_overridden_in_silence(capsys):
    """sfnet:pspnet is 512 wide; our recipes for streets make every network 128 wide."""
    def said(*more):
        args = train.parse(["--method", "sfnet:pspnet", *more])
        values = {name: value for name, (value, _) in train.make_recipe(args).items()}
        train.make_model(args, values, 3, fresh=True)
        return capsys.readouterr().out
    assert ("sfnet:pspnet has channels=512, this recipe 128: --set channels=512 keeps "
            "it") in said()
    assert "this recipe" not in said("--set", "channels=512")
    assert "this recipe" not in said("--set", "channels=64"), "it was asked for"


def test_illegal_label_stops_before_the_first_step(tmp_path, capsys):
    """A mask of the wrong data set: file, values and cause on one line, exit code 2."""
    root = draw_tree(tmp_path / "data", "camvid")
    bad = root / "trainannot" / "0001.png"
    save(bad, np.full((64, 96), 77, np.uint8))
    said = [line for line in train_ends(
        capsys, 2, "--dataset", "camvid", "--data-root", root, *PAIRS, "--bn-images", 0,
        "--out", tmp_path / "run").err.splitlines() if "warning: " not in line]
    assert len(said) == 1, "one sentence, besides the warnings of few images"
    assert said[0].startswith(f"error: {bad}: illegal label values 77")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backbone", ["df1", "df2", "xception65", "xception71",
                                      "resnet34"])
@pytest.mark.parametrize("method", methods())
@pytest.mark.thorough
def test_each_method_trains_on_each_encoder(method, backbone, tmp_path, monkeypatch):
    """--backbone of any paper with any method: 20 steps, and every weight moves.

    A loss that is not finite would have been skipped, a stage that nobody reads would
    have no momentum.
    """
    monkeypatch.setattr("data.Streets.sizes", {"train": 6, "val": 2})
    launch("--method", method, "--backbone", backbone, "--iterations", 20, "--batch", 4,
           "--crop", 64, 64, "--warmup", 2, "--workers", 0, "--log-every", 1, "--lr",
           0.003, "--eval-every", 20, "--out", tmp_path)
    losses = [float(row["loss"]) for row in rows_of(tmp_path) if row["loss"]]
    assert len(losses) == 20 and np.isfinite(losses).all()
    state = load_checkpoint(tmp_path)["optimizer"]["state"].values()
    assert all(each["momentum_buffer"].abs().max() > 0 for each in state)
