"""A sixth method, dropped beside the five, goes through every command.

It is the file that README shows under "Add a paper": the least that a method needs.
"""
import csv
import re
import shutil
import subprocess
import sys

import pytest
import torch

import common
import data
import evaluate
import train
from conftest import (ROOT, THIN, TINY, assert_same, call_evaluate, contents, draw_tree,
                      ended, launch, ranks, save, stop_after)
from shapecheck import checked

FILE = ROOT / "tests" / "sixth.py"
SHORT = [*TINY, "--method", "sixth", "--iterations", 4, "--eval-every", 2]
SHORT.remove("--set")
SHORT.remove("channels=16")


def drop_in(folder, *more):
    """A copy of what makes the library, with the sixth method beside the five."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), FILE, *more]:
        shutil.copy(path, folder / path.name)
    shutil.copytree(ROOT / "results", folder / "results",
                    ignore=shutil.ignore_patterns("*.png"))
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return drop_in(tmp_path_factory.mktemp("copy") / "library")


@pytest.fixture(scope="module", autouse=True)
def newcomer(library, tmp_path_factory):
    """`python train.py --method sixth ..`, which begins before the other tests."""
    folder = tmp_path_factory.mktemp("newcomer")
    root = draw_tree(folder / "data", "folder", images=2)
    words = ["--method", "sixth", "--dataset", "folder", "--data-root", root,
             "--iterations", 2, "--batch", 2, "--warmup", 0, "--crop", 64, 64,
             "--workers", 0, "--out", folder / "run"]
    process = subprocess.Popen([sys.executable, "train.py", *map(str, words)],
                               cwd=library, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def beside(library, monkeypatch, thin):
    """In this process, too, methods are looked for in that copy."""
    monkeypatch.setattr(common, "FOLDER", library)
    monkeypatch.syspath_prepend(str(library))


@pytest.fixture(scope="module")
def trained(library, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "FOLDER", library)
        patch.syspath_prepend(str(library))
        for name, value in THIN.items():
            patch.setattr(name, value)
        folder = tmp_path_factory.mktemp("runs") / "whole"
        launch(*SHORT, "--out", folder)
    return folder


def test_readme_shows_this_very_file():
    """The template under "Add a paper" is what the tests run."""
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert FILE.read_text() in shown


def test_it_is_found_and_listed():
    assert "sixth" in common.methods() and "nrd" in common.methods()
    with pytest.raises(common.UserError, match="it has: default, coarse"):
        common.build_model("sixth:corase", 5)


def test_it_resumes_to_the_same_bits(tmp_path, monkeypatch):
    launch(*SHORT, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(train.Stopped):
        stop_after(2, patch)
        launch(*SHORT, "--out", tmp_path / "cut")
    launch("--resume", tmp_path / "cut")
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "cut"))


def test_it_is_scored_as_it_was_trained(trained, monkeypatch):
    """Whole, in windows, by scales and flip: what its own `forward` says."""
    model = common.restore(common.load_checkpoint(trained))
    for size in ((64, 96), (65, 97)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(images)["out"][0].argmax(0)
            for protocol in (evaluate.Protocol(), evaluate.Protocol(window=size)):
                assert torch.equal(evaluate.predict(model, images, protocol), expected)
            mirrored = evaluate.predict(model, images, evaluate.Protocol(flip=True))
        assert (mirrored == expected).float().mean() > 0.5


def score_beside(library, *argv):
    """evaluate.py in a process of several, which looks for methods in the copy."""
    sys.path.insert(0, library)
    common.FOLDER = type(common.FOLDER)(library)
    return evaluate.main(list(argv))


def test_two_processes_score_it_as_one_does(trained, library, tmp_path):
    words = ["score", str(trained), "--workers", "0", "--out"]
    for n in (1, 2):
        said = tmp_path / f"said{n}"
        codes = ended(ranks(n, score_beside, str(library), *words,
                            str(tmp_path / str(n)), output=said))
        assert codes == [0] * n, said.read_text()[-2000:]
    one, two = ((tmp_path / n / "score.txt").read_text().splitlines()[:-2]
                for n in ("1", "2"))
    assert one == two


def test_every_other_command_takes_it(trained, tmp_path, capsys):
    """score, predict, cost, table; and it has nothing to explain yet, which is said."""
    call_evaluate("score", trained, "--workers", 0, "--scales", 0.5, 1, "--flip",
                  "--bands", "--out", tmp_path / "score")
    picture = save(tmp_path / "p.png", data.draw_street("val", 0)[0])
    call_evaluate("predict", trained, picture, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "p_overlay.png").is_file()
    call_evaluate("cost", "sixth")
    call_evaluate("table", trained, "--csv", tmp_path / "t.csv")
    said = capsys.readouterr().out
    assert "sixth:coarse" in said and "nothing published" in said
    with open(tmp_path / "t.csv", newline="") as file:
        assert next(csv.DictReader(file))["method"] == "sixth"
    with pytest.raises(SystemExit) as stop:
        call_evaluate("explain", trained)
    assert stop.value.code == 2 and "explains nothing yet" in capsys.readouterr().err


@pytest.mark.parametrize("argv, sentence", [
    (["--head-lr", "10"], "does not say which of its parts is the encoder"),
    (["--channels", "16"], "no option 'channels'"),
    (["--set", "stages=res5"], "stages is a tuple"),
    (["--pretrain", "2"], "has no loss of its own")])
def test_what_it_does_not_offer_is_said(argv, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, SHORT), *argv, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_half_written_method_is_told_what_it_lacks(library, capsys):
    """A file without VARIANTS; one whose build has other arguments."""
    draft = library / "draft.py"
    draft.write_text("def build(num_classes, *, backbone, weights):\n    ...\n")
    with pytest.raises(common.UserError, match="draft.py is no method yet"):
        common.build_model("draft", 5)
    (library / "drift.py").write_text("VARIANTS = {}\nx = 0\nVARIANTS = {}\n\n"
                                      "def build(num_classes):\n    ...\n")
    with pytest.raises(common.UserError, match="an entry 'default', and build the arg"):
        common.build_model("drift", 5)
    draft.unlink()
    (library / "drift.py").unlink()


@pytest.fixture
def changed(library):
    """The sixth method as another file, `seventh`, with lines of a beginner."""
    def write(*replacements):
        text = FILE.read_text()
        for old, new in replacements:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (library / "seventh.py").write_text(text)
        sys.modules.pop("seventh", None)
    yield write
    (library / "seventh.py").unlink()


def test_an_option_that_acts_in_training_alone_tells_runs_apart(changed):
    """`table` would take two shares of dropout for two seeds of one network."""
    changed(("self.trunk(images), 0", "self.trunk(F.dropout(\n            "
             "images, self.dropout, self.training)), 0"),
            ('"res5")) -> nn.Module:', '"res5"), dropout=0.1) -> nn.Module:'),
            ("return Sixth(trunk, stages, num_classes)",
             "model = Sixth(trunk, stages, num_classes)\n"
             "    model.dropout = dropout\n    return model"))
    checkpoint = {"method": "seventh", "classes": ["a", "b"], "backbone": "resnet18"}
    for share, used in ((0.5, {"dropout": 0.5}), (0.1, {})):
        checkpoint["options"] = {"dropout": share}
        assert evaluate.used_options(checkpoint) == used


def test_a_misspelt_name_in_a_methods_file_is_said(changed):
    """In VARIANTS and in RECIPES, where it would be printed and not be used."""
    changed(('{"stages": ("res5",)}', '{"stage": ("res5",)}'))
    with pytest.raises(common.UserError, match="no option 'stage' .did you mean"):
        common.build_model("seventh:coarse", 5)
    for recipe, said in (('"learning_rate": (0.01, "paper")', "has a 'learning_rate'"),
                         ('"lr": 0.01', "lr must be a value and its source")):
        changed(("\n\nclass Sixth",
                 f"RECIPES = {{'streets': {{{recipe}}}}}\n\n\nclass Sixth"))
        with pytest.raises(common.UserError, match=said):
            train.make_recipe(train.parse(["--method", "seventh"]))


def test_where_a_method_is_tried_is_said(changed):
    """On the meta device no tensor has a number; an odd size is tried at once."""
    changed(("    trunk = make_encoder",
             "    torch.ones(1).item()\n    trunk = make_encoder"),
            ("import torch.nn", "import torch\nimport torch.nn"))
    common.build_model("seventh", 5, backbone="resnet18")
    with pytest.raises(common.UserError, match="cannot be built, on torch's meta dev"):
        common.shapes_only("seventh", 5, (64, 64), backbone="resnet18")
    changed(('F.interpolate(logits, (H, W), mode="bilinear")',
             'F.interpolate(logits, scale_factor=4)'))
    with pytest.raises(RuntimeError) as error:
        common.build_model("seventh", 5, backbone="resnet18")
    assert "trial image of 33x65" in error.value.__notes__[0]


def test_it_can_read_labels_in_the_place_of_images():
    """The upper bound: whatever the file calls its encoder, K channels come in."""
    model = common.build_model("sixth:coarse", 11, backbone="labels")
    assert common.input_channels(model) == 11


def test_its_shape_comments_are_true(library):
    """Drafts may stand beside the five: the tests of prose can be run on them."""
    errors = []
    with checked(library / "sixth.py", errors):
        common.build_model("sixth", 5)(torch.randn(1, 3, 65, 97))
    assert not errors, "\n".join(errors)


def test_the_command_as_a_newcomer_types_it(newcomer):
    """A process of its own in the folder, and nothing in it is replaced."""
    said, errors = newcomer.communicate(timeout=120)
    assert newcomer.returncode == 0 and "mIoU" in said, errors
