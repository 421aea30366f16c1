"""What can go wrong in a run, provoked: each fault costs little and is named."""
import copy
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torchvision.models.resnet import Bottleneck

import data
import train
from common import FORMAT, UserError, load_checkpoint, methods
from conftest import (FOUR_STEPS, TINY, assert_same, bytes_of, child, draw_tree, ended,
                      flip, launch, make_thin, rows_of, stop_after, train_ends)

MANY_STEPS = [*TINY, "--crop", "32", "64", "--iterations"]
GET_MODEL = torchvision.models.get_model  # before it is made thin

pytestmark = pytest.mark.usefixtures("one_thread", "thin")


@pytest.fixture
def steps(monkeypatch):
    """Of every step that follows: state before, state after, loss."""
    taken, step = [], train.train_step

    def state(run):
        return copy.deepcopy({"model": run.model.state_dict(),
                              "momentum": run.optimizer.state_dict()["state"]})

    def watched(run, *batch):
        before = state(run)
        losses, rate = step(run, *batch)
        taken.append((before, state(run), losses["loss"]))
        return losses, rate
    monkeypatch.setattr(train, "train_step", watched)
    return taken


def at_step(patch, number, act):
    """From now on `act(run)` is called just before that step."""
    step = train.train_step

    def acted(run, *batch):
        if run.done + 1 == number:
            act(run)
        return step(run, *batch)
    patch.setattr(train, "train_step", acted)


def spoil(patch, bad, change=lambda total: total * math.inf):
    """From now on the loss of the steps in `bad` is changed."""
    now, step, loss = [0], train.train_step, train.segmentation_loss

    def numbered(run, *batch):
        now[0] = run.done + 1
        return step(run, *batch)

    def spoiled(*args, **options):
        total, terms = loss(*args, **options)
        return (change(total) if now[0] in bad else total), terms
    patch.setattr(train, "train_step", numbered)
    patch.setattr(train, "segmentation_loss", spoiled)


def assert_finite(state):
    broken = [name for name, x in state["model"].items() if not x.isfinite().all()]
    assert not broken, f"not finite: {broken}"


def until(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.005)


# --- Signals, to a process of its own ------------------------------------------------


def pausing(argv, place, where):
    """train.main in a child: waits in step two until told to go on, or scores long."""
    patch, load = pytest.MonkeyPatch(), data.Streets.load
    os.setpgid(0, 0)

    def pause(run):
        (place / "here").touch()
        until((place / "go").exists, "word to go on")

    def slowly(streets, index):
        if streets.split == "val":
            (place / "here").touch()
            time.sleep(0.05)
        return load(streets, index)
    if where == "step":
        at_step(patch, 2, pause)
    else:
        patch.setattr("data.Streets.sizes", {"train": 6, "val": 2000})
        patch.setattr("data.Streets.load", slowly)
    return train.main(argv)


@contextmanager
def paused(place, where, *more):
    """A process that is training in place/run and has got there; its output: said."""
    argv = [*FOUR_STEPS, *map(str, more), "--out", str(place / "run")]
    process = child(pausing, argv, place, where, output=str(place / "said"))
    try:
        until(lambda: (place / "here").exists() or process.exitcode is not None, where)
        assert process.exitcode is None, (place / "said").read_text()
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step(number, tmp_path):
    """Ctrl-C, a scheduler's SIGTERM, a terminal that goes: no step is lost.

    As from a terminal it goes to the loader's processes, too, which the step needs. It
    may come twice: from SLURM, and from torchrun, which passes SLURM's on.
    """
    with paused(tmp_path, "step", "--workers", 2) as process:
        os.killpg(process.pid, number)
        time.sleep(0.1)
        os.killpg(process.pid, number)
        (tmp_path / "go").touch()
        process.join(20)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 128 + number, said
    assert f"--resume {tmp_path}/run" in said, "it does not say how to go on"
    last = load_checkpoint(tmp_path / "run/last.pt")
    assert last["iteration"] == 2, "the step was cut short, or others followed"


def test_a_signal_cuts_an_evaluation_short(tmp_path):
    """An evaluation may take longer than a scheduler waits: none, rather than half.

    A mIoU over a part of the images would be a wrong number. The resumed run makes up.
    """
    with paused(tmp_path, "evaluation", "--eval-every", 2) as process:
        os.kill(process.pid, signal.SIGTERM)
        process.join(20)  # all of it takes longer
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 143, f"still evaluating, or not stopped: {said}"
    assert "mIoU" not in said, "a number from a part of the images"
    assert load_checkpoint(tmp_path / "run/last.pt")["evaluated"] == 0
    launch("--resume", tmp_path / "run")
    rows = [(row["iteration"], bool(row["miou"])) for row in rows_of(tmp_path / "run")]
    assert rows == [("1", False), ("2", False), ("2", True), ("3", False),
                    ("4", False), ("4", True)], "the evaluation was not made up for"


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    """A run that was started to outlive its terminal does."""
    heard = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: heard.append(number))
    with train.Signals():
        assert signal.SIGHUP in heard
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    heard.clear()
    with train.Signals():
        assert not heard


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_second_signal_ends_at_once(number, tmp_path):
    """Whoever asks twice does not want to wait for the step, nor for a file."""
    with paused(tmp_path, "step") as process:
        before, said = bytes_of(tmp_path / "run"), tmp_path / "said"
        os.kill(process.pid, number)
        until(lambda: "once more to stop at once" in said.read_text(), "answer")
        time.sleep(1.1)
        os.kill(process.pid, number)
        process.join(5)
        assert process.exitcode == -number, "it waits for the step, or has caught it"
    assert bytes_of(tmp_path / "run") == before


def test_one_folder_has_one_run(tmp_path, capsys):
    """Two runs in a folder would overwrite each other; a dead one's lock is no lock."""
    with paused(tmp_path, "step") as process:
        before = bytes_of(tmp_path / "run")
        said = train_ends(capsys, 2, "--resume", tmp_path / "run")
        assert "another process is training in" in said.err
        said = train_ends(capsys, 2, *FOUR_STEPS, "--out", tmp_path / "run")
        assert "--resume" in said.err
        assert bytes_of(tmp_path / "run") == before and process.exitcode is None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    launch("--resume", tmp_path / "run")
    assert load_checkpoint(tmp_path / "run/last.pt")["iteration"] == 4


# --- --resume ------------------------------------------------------------------------


@pytest.mark.parametrize("argv, changes", [
    (["--method", "sfnet"], [("method", "'nrd'", "'sfnet'")]),
    (["--lr", "0.5"], [("recipe.lr", "0.05", "0.5")]),
    (["--seed", "1"], [("seed", "0", "1")]),
    (["--momentum", "0.5", "--set", "channels=8", "--crop", "64", "64"],
     [("recipe.momentum", "0.9", "0.5"), ("options.channels", "16", "8"),
      ("recipe.crop", "[32, 64]", "[64, 64]")]),
])
def test_resume_lists_what_has_changed(argv, changes, stopped, capsys):
    """A run that goes on with another recipe is neither of the two: it is refused."""
    before = bytes_of(stopped)
    said = train_ends(capsys, 2, "--resume", stopped, *argv).err
    for name, old, new in changes:
        line = rf"^ +{re.escape(name)} +{re.escape(old)} -> {re.escape(new)}$"
        assert re.search(line, said, re.M), f"{name} is not listed in: {said}"
    assert bytes_of(stopped) == before, "a refusal may not touch the run"


def test_resume_wants_the_folder(stopped, capsys):
    """The file is the likeliest slip: the sentence holds the argument to pass."""
    said = train_ends(capsys, 2, "--resume", stopped / "last.pt").err
    assert said.strip().endswith(f"--resume {stopped}")


def test_resume_takes_no_other_folder(stopped, tmp_path, capsys):
    """Where would it write: here or there? Nobody should have to guess."""
    said = train_ends(capsys, 2, "--resume", stopped, "--out", tmp_path / "new").err
    assert "drop --out" in said and not (tmp_path / "new").exists()


def test_a_finished_run_says_so(stopped, capsys):
    """Nothing is trained twice: a script that resumes blindly gets a sentence."""
    launch("--resume", stopped)
    before = bytes_of(stopped)
    assert "is finished: 4 of 4 steps" in train_ends(capsys, 2, "--resume", stopped).err
    assert bytes_of(stopped) == before


def test_workers_and_parts_may_change_on_resume(stopped, capsys):
    """Another machine has other cores and another memory: a warning, the same steps."""
    launch("--resume", stopped, "--workers", 2, "--accumulate", 2)
    said = capsys.readouterr()
    assert "at iteration 2" in said.out
    assert "accumulate was 1, is 2: batch norm may see other" in said.err
    assert "1 processes x 2 parts x 2 images" in said.out
    rows = [row["iteration"] for row in rows_of(stopped) if row["loss"]]
    assert rows == ["1", "2", "3", "4"], "steps were repeated or left out"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_images_of_one_process(world):
    """Their shares, put together in order, are the batches of a single process."""
    options = {"start": 3, "stop": 12, "seed": 7}
    whole = data.Batches(13, 4, **options)
    shares = [list(data.Batches(13, 4, rank=rank, world=world, **options))
              for rank in range(world)]
    together = [sum(parts, []) for parts in zip(*shares)]
    assert together == [whole.keys(iteration) for iteration in range(3, 12)]
    assert all(len(set(keys)) == 4 for keys in together)


# --- --finetune-from -----------------------------------------------------------------


def dropped_and_missing(theirs, own):
    """The lines that tell which tensors are not taken over, which have no source."""
    dropped = {f"  dropped: {name} {tuple(x.shape)}, " + (
        f"{tuple(own[name].shape)} here" if name in own else "not in here")
        for name, x in theirs.items()
        if name not in own or own[name].shape != x.shape}
    return dropped, {f"  not in it, as at the start: {name}" for name in own
                     if name not in theirs}


@pytest.mark.parametrize("method", ["nrd", "sfnet"])
def test_finetuning_takes_over_what_fits_and_lists_the_rest(
        method, stopped_original, tmp_path, monkeypatch, capsys):
    """From eleven classes to three: the encoder's weights arrive, to the last bit.

    A tensor that is dropped in silence is a run from scratch that nobody notices.
    """
    root, run = draw_tree(tmp_path / "data", "folder", images=4), tmp_path / "run"
    stop_after(1, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*FOUR_STEPS, "--method", method, "--dataset", "folder", "--data-root",
               root, "--finetune-from", stopped_original, "--out", run)
    start = load_checkpoint(run / "prev.pt")
    theirs, own = load_checkpoint(stopped_original)["model"], start["model"]
    dropped, missing = dropped_and_missing(theirs, own)
    said = capsys.readouterr().out
    assert start["iteration"] == 0 and len(start["classes"]) == 3
    assert f"{len(theirs) - len(dropped)} of {len(own)} tensors taken over" in said
    assert {line for line in said.splitlines() if "dropped: " in line} == dropped
    assert {line for line in said.splitlines() if "not in it" in line} == missing
    assert dropped and bool(missing) == (method == "sfnet")
    encoder = [name for name in own if name.startswith("encoder.")]
    assert encoder and all(torch.equal(own[n], theirs[n]) for n in encoder)


def test_finetuning_on_other_classes_of_the_same_number(tmp_path, monkeypatch, capsys):
    """streets and CamVid have eleven each: the row of `road` is not that of `pole`.

    And W has to be fitted to the new labels, not taken from the old ones.
    """
    words = *FOUR_STEPS, "--method", "dupsampling"
    stop_after(1, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*words, "--out", tmp_path / "streets")
    root = draw_tree(tmp_path / "data", "camvid", images=4)
    stop_after(1, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*words, "--dataset", "camvid", "--data-root", root, "--bn-images", 0,
               "--finetune-from", tmp_path / "streets", "--out", tmp_path / "camvid")
    said = capsys.readouterr().out.partition("taken over from")[2]
    start = load_checkpoint(tmp_path / "camvid/prev.pt")
    theirs, own = load_checkpoint(tmp_path / "streets")["model"], start["model"]
    assert len(theirs) == len(own) and len(start["classes"]) == 11
    for name in ("decoder.dupsample.W", "decoder.dupsample.mean"):
        assert f"dropped: {name} {tuple(own[name].shape)}, of other classes" in said
        assert not torch.equal(own[name], theirs[name])
    assert "of the labels' variance" in said
    temperature = "decoder.dupsample.temperature.log_T"
    assert torch.equal(own[temperature], theirs[temperature])


@pytest.mark.parametrize("backbone", ["labels", "resnet50"])
def test_finetuning_from_another_backbone_is_refused(
        backbone, stopped_original, tmp_path, monkeypatch, capsys):
    """Its weights are of no use, even if some tensors, as the first, have one shape."""
    monkeypatch.setattr("torchvision.models.resnet.BasicBlock", Bottleneck)
    stop_after(1, monkeypatch)
    said = train_ends(capsys, 2, *FOUR_STEPS, "--method", "nrd:bilinear", "--backbone",
                      backbone, "--finetune-from", stopped_original, "--out",
                      tmp_path / "run").err
    assert "--backbone" in said and not (tmp_path / "run").exists()


def of_another_version(path):
    torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)


@pytest.mark.parametrize("damage, sentence", [
    (of_another_version, f"format 99, this library reads format {FORMAT}"),
    (flip, "is damaged (what is in it does not fit its checksums)")],
    ids=["another version", "one bit"])
@pytest.mark.parametrize("how", ["--resume", "--finetune-from"])
def test_foreign_and_damaged_checkpoints_are_refused(damage, sentence, how, stopped,
                                                     tmp_path, capsys):
    """One bit of a weight, the file of another version: not used at all."""
    for name in ("last.pt", "prev.pt", "best.pt"):
        damage(stopped / name)
    before, more = bytes_of(stopped), [*FOUR_STEPS, "--out", tmp_path / "new"]
    said = train_ends(capsys, 2, *(more if how != "--resume" else []), how, stopped).err
    assert sentence in said and str(stopped) in said, said
    assert bytes_of(stopped) == before and not (tmp_path / "new").exists()


# --- Loader processes ----------------------------------------------------------------


def test_a_killed_loader_process_ends_the_run_with_advice(tmp_path, monkeypatch,
                                                          capsys):
    """What the kernel does when memory runs out: no hang, and the cause is named."""
    def kill(run):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
    at_step(monkeypatch, 2, kill)
    said = train_ends(capsys, 1, *MANY_STEPS, 40, "--workers", 2, "--out",
                      tmp_path / "run").err
    assert "loader process was killed" in said and "--workers" in said
    assert f"--resume {tmp_path}/run" in said
    assert load_checkpoint(tmp_path / "run/last.pt")["iteration"] == 0


def stuck(argv):
    """train.main in a child, whose loader process waits for a disk, for ever."""
    data.STUCK, torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1, 0.2
    data.Streets.load = lambda *_: time.sleep(1000)
    return train.main(argv)


def test_a_stuck_loader_process_ends_the_run_with_advice(tmp_path):
    """A network drive that does not answer: an end with a reason, not a silent night.

    The whole process is gone in seconds, or its job would hold its machine for longer.
    """
    argv = [*FOUR_STEPS, "--workers", "1", "--out", str(tmp_path / "run")]
    codes = ended([child(stuck, argv, output=tmp_path / "said")], seconds=30)
    said = (tmp_path / "said").read_text()
    assert "said nothing for 1 s" in said and "Try fewer --workers" in said
    assert f"--resume {tmp_path}/run" in said
    assert codes == [1], "it has given its advice, but not ended"


# --- Numbers that are not finite -----------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--ohem", 0.5], ["--accumulate", 2]])
def test_a_batch_without_a_valid_pixel_has_no_loss(more, tmp_path, monkeypatch, steps):
    """All void, as in a crop of the car's own bonnet: 0 / 0 would be NaN for ever."""
    load = data.Streets.load

    def void(streets, index):
        image, labels = load(streets, index)
        return image, labels if streets.split == "val" else torch.full_like(labels, 255)
    monkeypatch.setattr("data.Streets.load", void)
    launch(*FOUR_STEPS, *more, "--out", tmp_path)
    assert [loss for *_, loss in steps] == [0.0] * 4
    last = load_checkpoint(tmp_path / "last.pt")
    assert_finite(last)
    assert last["bad_steps"] == 0, "nothing was wrong with these steps"


def nan_in_one_image(patch):
    """From now on a pixel of one of the four images of step three is NaN."""
    bad, item = data.Batches(6, 4, start=0, stop=0, seed=0).keys(2)[1], (
        data.Augmented.__getitem__)

    def damaged(dataset, key):
        image, labels = item(dataset, key)
        if key == bad:
            image[0, 20, 30] = math.nan
        return image, labels
    patch.setattr("data.Augmented.__getitem__", damaged)


def nan_in_the_gradient(patch):
    """From now on the loss of step three is what it was, its gradient 0 / 0."""
    spoil(patch, {3}, lambda total: total + (total * 0).sqrt())


@pytest.mark.parametrize("fault", [nan_in_one_image, nan_in_the_gradient])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_bad_step_leaves_no_trace(fault, parts, tmp_path, monkeypatch, steps, capsys):
    """Weights, momentum and batch norm's statistics are those from before.

    A single NaN in a running mean, which no gradient reaches, would spoil every mIoU.
    """
    fault(monkeypatch)
    launch(*FOUR_STEPS, "--accumulate", parts, "--out", tmp_path)
    changed = [any(not torch.equal(x, after["model"][name]) for name, x
                   in before["model"].items()) for before, after, _ in steps]
    assert_same(*steps[2][:2], "after the bad step")
    assert changed == [True, True, False, True], "the steps that moved the model"
    assert steps[2][0]["momentum"] and capsys.readouterr().out.count("skipped") == 1
    assert_finite(load_checkpoint(tmp_path / "last.pt"))


def break_a_weight(patch):
    """Before step eleven a weight is lost, as by a fault of the memory."""
    def lose(run):
        run.model.encoder.stem[0].weight.data[0, 0, 0, 0] = math.nan
    at_step(patch, 11, lose)


def break_the_loss(patch):
    """From step eleven on."""
    spoil(patch, range(11, 99))


@pytest.mark.parametrize("fault", [break_a_weight, break_the_loss])
def test_ten_bad_steps_in_a_row_end_the_run(fault, tmp_path, monkeypatch, steps,
                                            capsys):
    """Code 3, and all that is needed to look for the cause; the files are from before.

    The iteration, the learning rate, and the names of the images that it has seen.
    """
    fault(monkeypatch)
    seen, load = [], data.Streets.load
    monkeypatch.setattr("data.Streets.load", lambda streets, index: (
        seen.append(streets.name(index)), load(streets, index))[1])
    said = train_ends(capsys, 3, *MANY_STEPS, 24, "--eval-every", 10, "--out",
                      tmp_path).err
    last, best = (load_checkpoint(tmp_path / name) for name in ("last.pt", "best.pt"))
    rate = train.learning_rate(19, last["recipe"], 24)
    assert "at iteration 20," in said and f"learning rate {rate:.3g};" in said
    assert f"its images: {', '.join(seen[-4:])}." in said
    assert last["iteration"] == best["iteration"] == 10
    assert_finite(best)
    assert_same(last["model"], steps[9][1]["model"], "last.pt")


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, capsys):
    """Of the three files none may be lost to a run that is broken, not even by a stop.
    """
    break_a_weight(monkeypatch)
    stop_after(12, monkeypatch)
    said = train_ends(capsys, 3, *MANY_STEPS, 24, "--eval-every", 6, "--out",
                      tmp_path).err
    assert "encoder.stem.0.weight is not finite at iteration 12" in said
    for name, iteration in (("last.pt", 6), ("prev.pt", 0)):
        state = load_checkpoint(tmp_path / name)
        assert_finite(state)
        assert state["iteration"] == iteration


def test_nothing_is_saved_amid_skipped_steps(tmp_path, monkeypatch, capsys):
    """With --save-every 1 the last good step is still there after ten bad ones."""
    spoil(monkeypatch, range(4, 99))
    said = train_ends(capsys, 3, *MANY_STEPS, 24, "--save-every", 1, "--out", tmp_path)
    assert "the tenth in a row" in said.err
    for name, iteration in (("last.pt", 3), ("prev.pt", 2)):
        state = load_checkpoint(tmp_path / name)
        assert (state["iteration"], state["bad_steps"]) == (iteration, 0)


def test_a_good_step_starts_the_count_anew(tmp_path, monkeypatch, capsys):
    """Twice nine bad steps are no divergence, if one in between was good."""
    spoil(monkeypatch, {*range(2, 11), *range(12, 21)})
    launch(*MANY_STEPS, 22, "--eval-every", 22, "--out", tmp_path)
    assert capsys.readouterr().out.count("skipped") == 18
    assert load_checkpoint(tmp_path)["bad_steps"] == 0


def test_the_count_of_bad_steps_survives_a_stop(tmp_path, monkeypatch, capsys):
    """Else a run that is requeued every few steps would spoil a cluster for weeks."""
    spoil(monkeypatch, range(2, 99))
    with monkeypatch.context() as patch, pytest.raises(train.Stopped):
        stop_after(6, patch)
        launch(*MANY_STEPS, 24, "--out", tmp_path)
    assert "at iteration 11," in train_ends(capsys, 3, "--resume", tmp_path).err


def overflow(total):
    """The loss itself is finite in float32, its gradient is not in fp16."""
    return total * 1e30


def test_fp16_that_always_overflows_ends_with_advice(tmp_path, monkeypatch, capsys):
    """The scale is halved until 1, and only then it counts: code 3 and a way out."""
    spoil(monkeypatch, range(99), overflow)
    said = train_ends(capsys, 3, *MANY_STEPS, 40, "--amp", "fp16", "--out", tmp_path)
    assert "--amp bf16" in said.err or "--amp off" in said.err
    assert said.out.count("overflow in fp16") == 16  # from 2**16 to 1
    assert "at iteration 26," in said.err, "halving counts, or is not done"


def test_one_overflow_in_fp16_is_nothing(tmp_path, monkeypatch, steps, capsys):
    """It is how the scale is found: halved, the step skipped, and not a bad one."""
    spoil(monkeypatch, {3}, overflow)
    at_step(monkeypatch, 1, lambda run: run.scaler.load_state_dict(
        run.scaler.state_dict() | {"scale": 256.0}))
    stop_after(3, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*FOUR_STEPS, "--amp", "fp16", "--out", tmp_path)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["scaler"]["scale"] == 128 and last["bad_steps"] == 0
    assert_same(*steps[2][:2], "after the overflow")
    assert capsys.readouterr().out.count("overflow in fp16") == 1


# --- The folder and the log ----------------------------------------------------------


def test_only_the_runs_own_leftovers_are_removed(tmp_path, monkeypatch):
    """--out may be any folder: what else lies in it, whatever its name, stays."""
    own, foreign = ("last.tmp", "best.tmp", "log.tmp"), ("notes.tmp", "my last.tmp")
    for name in (*own, *foreign):
        (tmp_path / name).write_text("mine")
    stop_after(1, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*FOUR_STEPS, "--out", tmp_path)
    left = {path.name for path in tmp_path.glob("*.tmp")}
    assert left == set(foreign), f"lost: {set(foreign) - left}; left: {left & set(own)}"


@pytest.mark.parametrize("name", ["last.pt", "prev.pt", "best.pt"])
def test_a_folder_with_any_checkpoint_holds_a_run(name, stopped, capsys):
    """Somebody may have kept best.pt alone: a new run would overwrite it."""
    for path in stopped.glob("*.pt"):
        if path.name != name:
            path.unlink()
    before = bytes_of(stopped)
    said = train_ends(capsys, 2, *FOUR_STEPS, "--out", stopped).err
    assert "holds a run" in said and "another --out" in said
    assert bytes_of(stopped) == before


@pytest.mark.parametrize("below", ["", "run"])
def test_out_at_or_below_a_file_is_a_mistake(below, tmp_path, capsys):
    """A mistyped --out is told before the first step, in a sentence."""
    (tmp_path / "file").write_text("mine")
    said = train_ends(capsys, 2, *FOUR_STEPS, "--out", tmp_path / "file" / below)
    assert f"cannot write to the folder {tmp_path}/file" in said.err
    assert "loss" not in said.out and (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_deleted_comes_back(tmp_path, monkeypatch):
    """Hours of training are still in memory: the next save makes the folder anew."""
    run = tmp_path / "run"
    at_step(monkeypatch, 2, lambda _: shutil.rmtree(run))
    launch(*FOUR_STEPS, "--save-every", 3, "--out", run)
    assert load_checkpoint(run / "last.pt")["iteration"] == 4
    assert [row["iteration"] for row in rows_of(run)] == ["1", "2", "3", "4", "4"]


def test_a_folder_that_becomes_a_file_ends_the_run(tmp_path, monkeypatch, capsys):
    """Code 4, as for every place that cannot be written to, and not its traceback."""
    def replace(run):
        shutil.rmtree(run.folder)
        run.folder.write_text("mine")
    at_step(monkeypatch, 2, replace)
    said = train_ends(capsys, 4, *FOUR_STEPS, "--out", tmp_path / "run").err
    assert f"cannot write {tmp_path}/run/" in said
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    """Spaces, umlauts and brackets, which are patterns to a shell, are names here."""
    run = tmp_path / "Läufe vom [1.] März" / "zweiter"
    stop_after(2, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*FOUR_STEPS, "--out", run)
    (run / "last.tmp").write_text("of a process that was killed")
    launch("--resume", run)
    assert load_checkpoint(run / "last.pt")["iteration"] == 4
    assert not (run / "last.tmp").exists()


def test_a_log_that_cannot_be_written_is_made_up_for(tmp_path, monkeypatch, capsys):
    """A file that is in the way for two rows: a warning, and in the end all rows."""
    log = tmp_path / "log.csv"
    at_step(monkeypatch, 2, lambda _: (log.unlink(), log.mkdir()))
    at_step(monkeypatch, 4, lambda _: log.rmdir())
    launch(*FOUR_STEPS, "--out", tmp_path)
    said = capsys.readouterr().err
    assert "cannot write log.csv" in said, said
    rows = rows_of(tmp_path)
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4", "4"]
    assert rows[-1]["miou"] and not list(tmp_path.glob("*.tmp"))


def test_a_run_resumes_even_if_its_log_cannot_be_written(stopped, monkeypatch, capsys):
    """The disk may still be full of what stopped it: a warning, and rows come later."""
    replace, begun = os.replace, []

    def full(source, target):
        if str(target).endswith("log.csv") and not begun:
            begun.append(target)
            raise OSError(28, "No space left on device")
        return replace(source, target)
    monkeypatch.setattr(os, "replace", full)
    launch("--resume", stopped)
    assert "cannot write log.csv" in capsys.readouterr().err
    rows = [row["iteration"] for row in rows_of(stopped) if row["loss"]]
    assert rows == ["1", "2", "3", "4"]


def test_the_share_of_waiting_is_logged(tmp_path, monkeypatch):
    """A GPU that waits for the disk is the commonest waste."""
    load = data.Streets.load
    monkeypatch.setattr("data.Streets.load", lambda streets, index: (
        time.sleep(0.02), load(streets, index))[1])
    launch(*FOUR_STEPS, "--out", tmp_path)
    shares = [float(row["data_share"]) for row in rows_of(tmp_path) if row["loss"]]
    assert len(shares) == 4 and all(0 <= share <= 1 for share in shares), shares
    assert max(shares) > 0.3, "it does not wait, it says"


# --- The machine ---------------------------------------------------------------------


def without_unix(argv):
    """train.main where everything is missing that only Unix has, from its import on."""
    sys.modules.update(fcntl=None, resource=None)  # an import of them fails
    for module, name in ((os, "fork"), (os, "sysconf"), (signal, "alarm"),
                         (signal, "SIGHUP")):
        delattr(module, name)
    multiprocessing.set_start_method("spawn", force=True)
    for name in ("train", "evaluate", "data", "common", *methods()):
        sys.modules.pop(name, None)
    import data as data_anew
    import train as train_anew
    make_thin(pytest.MonkeyPatch())
    # The first act of a loader process: here, as a spawned one has an alarm again.
    data_anew.outlive_a_signal(0)
    return train_anew.main(argv)


def test_a_run_needs_nothing_that_only_unix_has(tmp_path):
    """Windows has no locks of files, no fork, no alarm, and counts no memory.

    Two steps and an evaluation, with a loader process, and what is done without is said
    once: a second run in the folder is up to the user, the log's memory is nan.
    """
    argv = [*FOUR_STEPS, "--iterations", "2", "--warmup", "1", "--workers", "1",
            "--out", str(tmp_path / "run")]
    codes = ended([child(without_unix, argv, output=tmp_path / "said")], seconds=120)
    said = (tmp_path / "said").read_text()
    assert codes == [0] and "best mIoU" in said, said[-2000:]
    for missing in ("cannot be locked", "does not count a process' memory"):
        assert said.count(missing) == 1, f"{missing}: {said.count(missing)} times"
    steps = [row for row in rows_of(tmp_path / "run") if row["loss"]]
    assert [row["memory_gb"] for row in steps] == ["nan", "nan"]


def test_without_weights_no_network_is_needed(tmp_path, monkeypatch):
    """A machine without internet trains: --weights none asks nobody for anything."""
    def offline(*_):
        raise OSError("no network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing-in-store"))
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("torchvision.models.get_model", GET_MODEL)
    stop_after(1, monkeypatch)
    with pytest.raises(train.Stopped):
        launch(*FOUR_STEPS, "--weights", "none", "--out", tmp_path / "run")
    with pytest.raises(UserError):
        launch(*FOUR_STEPS, "--weights", "imagenet", "--out", tmp_path / "other")


def test_out_of_memory_names_a_smaller_setting(tmp_path, monkeypatch, capsys):
    """Exit 1 with batch, crop and peak: parts of the batch have the same gradient."""
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(train, "backward", full)
    said = train_ends(capsys, 1, *FOUR_STEPS, "--out", tmp_path / "run").err
    assert re.search(r"at --batch 4 --crop 32 64, peak .* GB: try --accumulate 2", said)
    assert load_checkpoint(tmp_path / "run/last.pt")["iteration"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_run(workers, tmp_path, monkeypatch, capsys):
    """Exit 2 and the file's name, also from a loader process; no other takes its place.

    Files are spot-checked before the first step; this one has escaped that.
    """
    root = draw_tree(tmp_path / "data", "folder", images=4)
    bad = root / "train/images/2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    monkeypatch.setattr(data, "check_some", lambda part: None)
    said = train_ends(capsys, 2, *FOUR_STEPS, "--dataset", "folder", "--data-root",
                      root, "--workers", workers, "--out", tmp_path / "run").err
    assert said.startswith(f"error: {bad}: unreadable") and said.count("\n") == 1
