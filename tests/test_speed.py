"""speed: every method has its turn in every round; parts, memory and ratios."""
import csv
import json
import shutil
import sys
import time
import types

import pytest
import torch
from PIL import Image

import common
import evaluate
from conftest import ROOT, call_evaluate

pytestmark = pytest.mark.usefixtures("one_thread", "thin")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """Memory is measured in processes of their own, which take seconds to start."""
    monkeypatch.setattr(evaluate, "memory_of", lambda *_: 0.5)


def test_methods_take_turns(monkeypatch, capsys):
    """A machine that is slow for a second must not be slow for one method alone."""
    turns = []
    step = evaluate.speed_step

    def noted(model, images, args):
        act, name = step(model, images, args), type(model).__name__

        def once():
            turns.append(name)
            act()
        return once
    monkeypatch.setattr(evaluate, "speed_step", noted)
    call_evaluate("speed", "nrd", "sfnet", "--size", "64x96", "--rounds", 2, "--json")
    assert turns == ["NRD", "SFNet", "SFNet", "NRD"] * 2, "first is not always first"
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["nrd", "sfnet"]
    for row in rows:
        assert row["low"] <= row["ms"] <= row["high"] and row["n"] == 2
        assert row["images/s"] == pytest.approx(1000 / row["ms"])
        assert row["GMACs/s"] == pytest.approx(row["GMACs"] * row["images/s"])
        assert 0 < row["encoder ms"] < row["ms"] and "decoder ms" in row


def test_parts_are_timed_where_they_run():
    """A decoder that sleeps is a slow decoder, and its time is in the total."""
    model = common.build_model("nrd", 3, backbone="resnet18", channels=8).eval()
    model.decoder.register_forward_pre_hook(lambda *_: None)
    watch = evaluate.Stopwatch(model, "cpu")
    model.decoder.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    watch.start("total")
    model(torch.zeros(1, 3, 64, 64))
    watch.stop("total")
    seconds = watch.seconds()
    (total,), (decoder,) = seconds["total"], seconds["decoder"]
    assert 0.05 < decoder < total
    assert seconds["encoder"][0] + decoder < total


def test_a_gpu_is_not_waited_for_between_the_parts(monkeypatch):
    """Waiting there would leave it idle until the next part is sent: a slower network.

    A GPU's queue is played here: its clock goes on by one with every mark.
    """
    waits = []
    clock = iter(range(100))

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)

        def elapsed_time(self, end):  # milliseconds
            return end.time - self.time
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(0))
    model = common.build_model("nrd", 3, backbone="resnet18", channels=8).eval()
    watch = evaluate.Stopwatch(model, "cuda")
    for _ in range(2):
        watch.start("total")
        model(torch.zeros(1, 3, 64, 64))
        watch.stop("total")
    assert len(waits) == 2, "once before each call, for what others have left to do"
    seconds = watch.seconds()
    assert len(waits) == 3, "and once before the marks are read"
    assert seconds.pop("total") == [0.007] * 2, "two marks of each part lie within it"
    assert seconds == {part: [0.001] * 2 for part in evaluate.PARTS}


def test_training_steps_and_sizes_and_the_picture(tmp_path, capsys):
    """--train needs two images; csv and picture have every size and class count."""
    with pytest.raises(SystemExit):
        call_evaluate("speed", "nrd", "--train", "--size", "64x64")
    assert "--batch 2" in capsys.readouterr().err
    call_evaluate("speed", "nrd:bilinear", "--train", "--batch", 2, "--rounds", 1,
                  "--size", "32x32", "32x64", "--classes", 3, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "training step, batch 2" in said and said.count("nrd:bilinear") == 2
    assert said.count("1.00x") == 2, "the measure is the first method of each size"
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["size"] for row in rows] == ["32x32", "32x64"]
    assert rows[0]["timed"] == "training step" and rows[0]["batch"] == "2"
    assert "GMACs/s" not in rows[0], "GMACs are of a forward pass"
    assert float(rows[0]["forward encoder ms"]) < float(rows[0]["ms"])
    assert Image.open(tmp_path / "speed.png").size[0] > 800


def test_a_rival_from_another_library_takes_its_turns(tmp_path, monkeypatch, capsys):
    """tests/rival.py, dropped in as smp.py; here something else is the other library.

    What that one cannot do, sizes that 16 does not divide, the file makes good.
    """
    class DeepLabV3Plus(torch.nn.Conv2d):
        def __init__(self, *, encoder_name, encoder_weights, classes):
            super().__init__(3, classes, 1)

        def forward(self, images):
            assert all(n % 16 == 0 for n in images.shape[-2:]), "theirs refuses these"
            return super().forward(images)
    other = types.ModuleType("segmentation_models_pytorch")
    other.DeepLabV3Plus = DeepLabV3Plus
    monkeypatch.setitem(sys.modules, other.__name__, other)
    for path in [*ROOT.glob("*.py"), ROOT / "tests" / "rival.py"]:
        shutil.copy(path, tmp_path / path.name.replace("rival", "smp"))
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    call_evaluate("speed", "smp", "nrd", "--size", "72x96", "--rounds", 1, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["smp", "nrd"]


@pytest.mark.parametrize("argv, said", [
    (["nrd", "--size", "64"], "--size"), (["nrd", "--size", "8x8"], "at least 32"),
    (["nrdd"], "did you mean 'nrd'")])
def test_what_cannot_be_timed(argv, said, capsys):
    with pytest.raises(SystemExit):
        call_evaluate("speed", *argv)
    assert said in capsys.readouterr().err


@pytest.mark.thorough
def test_memory_is_that_of_one_step_alone(monkeypatch):
    """Not that of the process that asks, which Linux would count in with it."""
    monkeypatch.undo()
    large = torch.ones(400_000_000)
    args = evaluate.parse(["speed", "nrd", "--size", "64x64"])
    small = evaluate.memory_of(args, "nrd", (64, 64), 19)
    assert common.peak_memory("cpu") > large.nbytes / 1e9 == 1.6
    assert 0.1 < small < 1.2 < evaluate.memory_of(args, "nrd", (1536, 2048), 19)
