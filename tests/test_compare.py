"""compare: intervals, paired differences, and what they allow to say."""
import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from conftest import FOUR_STEPS, call_evaluate, launch

pytestmark = pytest.mark.usefixtures("one_thread", "thin")


@pytest.fixture(scope="module")
def counts():
    """Matrices of three runs over seven images with four classes, one of them rare."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (3, 7, 4, 4), generator=generator, dtype=torch.int32)
    counts[:, 1:, 3] = 0  # the truth has class 3 in the first image only
    counts[1] += 40 * torch.eye(4, dtype=torch.int32)  # run 1 is better everywhere
    return counts


def miou_slowly(matrix, *, drawn=False):
    """Class by class: hits over truth and prediction together, absent ones left out.

    Of images that were drawn, so are those that the truth lacks.
    """
    ious = []
    for c in range(len(matrix)):
        together = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
        if matrix[c].sum() or together and not drawn:
            ious.append((matrix[c, c] / together).item())
    return sum(ious) / len(ious)


def test_mious_of_many_matrices_are_those_of_each(counts):
    for run, images in zip(evaluate.mious(counts), counts):
        assert run.tolist() == pytest.approx([miou_slowly(m) for m in images])


def test_the_bootstrap_is_the_literal_loop(counts):
    """Draw as many images as there are, with replacement; the same ones for each run.

    The matrices are added up, then the mIoU is taken: not the mean of images' mIoUs.
    """
    drawn = evaluate.bootstrap(counts, draws=150)
    picked = torch.randint(7, (150, 7), generator=torch.Generator().manual_seed(0))
    for run in range(3):
        slow = [miou_slowly(sum(counts[run, i].double() for i in images), drawn=True)
                for images in picked.tolist()]
        assert drawn[run].tolist() == pytest.approx(slow, abs=1e-6)


def test_one_stray_pixel_does_not_move_an_interval():
    """Run b finds class 2 once too often, a hit of 1 in 10,000 pixels less.

    Class 2 is in one of 50 images. Draws without it, a third of all, would charge b an
    IoU of 0 for three classes, where a has a mean over two.
    """
    counts = torch.zeros(2, 50, 3, 3)
    counts[:, :, 0, 0] = counts[:, :, 1, 1] = 100
    counts[:, 0, 2, 2] = 100
    counts[1, 7, 0, 0] -= 1
    counts[1, 7, 0, 2] += 1
    drawn = evaluate.bootstrap(counts)
    low, high = evaluate.interval(drawn[1] - drawn[0])
    assert -0.01 < low <= high <= 0


def test_an_interval_is_of_the_number_beside_it():
    """Class 2 is in no image, and run b finds it in each: an IoU of 0, as in its mIoU.

    Without it the interval of b would be of a mean over other classes, around 0.75.
    """
    counts = torch.zeros(2, 20, 3, 3)
    counts[:, :, 0, 0] = counts[:, :, 1, 1] = 100
    counts[1, :, 1] = torch.tensor([0, 50, 50])
    drawn = evaluate.bootstrap(counts)
    assert evaluate.mious(counts.sum(1)).tolist() == [1, 0.5]
    assert evaluate.interval(drawn[0]) == (1, 1)
    assert evaluate.interval(drawn[1]) == (0.5, 0.5), "of the classes that are there"


def test_an_interval_that_misses_its_number_is_said():
    """A percentile bootstrap of eight images, in one of which a class is."""
    row = {"method": "a", "n": 1, "miou": 0.5, "low": 0.4, "high": 0.6,
           "seeds": math.nan, "miou within 3 px": 0.3, "difference": 0.0,
           "difference low": 0.0, "difference high": 0.0}
    assert "says little" not in evaluate.compare_text([row], [])
    assert "says little" in evaluate.compare_text([row | {"low": 0.51}], [])
    apart = row | {"difference": -0.04, "difference low": -0.03}
    assert "says little" in evaluate.compare_text([apart], [])


def test_neighbouring_frames_are_drawn_together(counts):
    """Images 2, 3, 4, then 5, 6, 0 and one more: stretches that go round a circle."""
    drawn = evaluate.bootstrap(counts, block=3, draws=150)
    starts = torch.randint(7, (150, 3), generator=torch.Generator().manual_seed(0))
    slow = []
    for three in starts.tolist():
        images = [(start + step) % 7 for start in three for step in range(3)][:7]
        slow.append(miou_slowly(sum(counts[0, i].double() for i in images), drawn=True))
    assert drawn[0].tolist() == pytest.approx(slow, abs=1e-6)


def test_frames_of_a_video_widen_the_interval():
    """Each scene has ten equal frames: 100 images, but ten independent ones.

    Drawn one by one they look like 100, and the interval is sqrt(10) times too narrow.
    """
    generator = torch.Generator().manual_seed(0)
    hits = torch.randint(0, 100, (10,), generator=generator).repeat_interleave(10)
    counts = torch.zeros(1, 100, 2, 2)
    counts[0, :, 0, 0] = hits
    counts[0, :, 0, 1] = 100 - hits
    alone, together = (evaluate.interval(evaluate.bootstrap(counts, block=block)[0])
                       for block in (1, 10))
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.25)


def test_an_interval_is_of_percentiles():
    """Of the draws that have a valid pixel: images without any may be all of a draw."""
    values = torch.arange(1001, dtype=torch.float64)
    assert evaluate.interval(values) == (25, 975)
    none = torch.full((9,), math.nan, dtype=torch.float64)
    assert evaluate.interval(torch.cat([values, none])) == (25, 975)


@pytest.fixture(scope="module")
def seen(counts):
    seen = evaluate.Compared(7, 4, runs=3, pictured=[0, 1, 2])
    seen.counts, seen.near = counts, counts
    return seen


def test_differences_are_paired_and_over_seeds(seen):
    """Runs 0 and 2 are seeds of one method, run 1 is another: better on every image."""
    groups = {"a": [{"gmacs": 1.0, "run": 0}, {"gmacs": 1.0, "run": 2}],
              "b": [{"gmacs": 2.0, "run": 1}]}
    order = torch.tensor([0, 2, 1])  # as the groups list them
    mixed = evaluate.Compared(7, 4, runs=3, pictured=[0, 2])
    mixed.counts, mixed.near = seen.counts[order], seen.near[order, :5]
    a, b = evaluate.compared_rows(groups, mixed, ["w", "x", "y", "z"])
    whole = [miou_slowly(images.sum(0).double()) for images in seen.counts]
    assert a["miou"] == pytest.approx((whole[0] + whole[2]) / 2)
    assert a["seeds"] == pytest.approx(np.std([whole[0], whole[2]], ddof=1))
    assert (a["difference"], a["images won"], b["n"]) == (0, 0, 1)
    assert b["difference"] == pytest.approx(whole[1] - a["miou"])
    assert b["images won"] == b["images"] == 7 and math.isnan(b["seeds"])
    assert a["images lost"] == b["images lost"] == 0, "a tie is no loss"
    drawn = evaluate.bootstrap(seen.counts)
    paired = drawn[1] - (drawn[0] + drawn[2]) / 2
    assert (b["difference low"], b["difference high"]) == pytest.approx(
        evaluate.interval(paired)), "not of the same images"
    drawn = evaluate.bootstrap(seen.near[:, :5])
    paired = drawn[1] - (drawn[0] + drawn[2]) / 2
    at_boundary = [b[f"difference within 3 px{which}"] for which in (" low", " high")]
    assert at_boundary == pytest.approx(evaluate.interval(paired)), "of all pixels"
    assert a["low"] < a["miou"] < a["high"] and "iou z" in a


@pytest.mark.parametrize("low, high, said", [
    (-0.01, 0.02, "are not told apart"), (0.001, 0.02, "b is ahead of a"),
    (-0.02, -0.001, "b is behind a")])
def test_an_order_is_stated_only_if_the_interval_allows_it(low, high, said):
    row = {"method": "b", "difference": (low + high) / 2, "difference low": low,
           "difference high": high, "seeds": math.nan, "n": 1}
    words = evaluate.in_words(row, {"method": "a", "seeds": 0.01, "n": 2})
    assert said in words and "seeds" not in words


def test_seeds_that_differ_by_as_much_are_said():
    """0.003 between two means over seeds that spread by 0.0049 and 0.0098 is nothing.

    Nor is 0.02, 2.6 standard errors: with four runs, 95 % are 4.3 of them.
    """
    first = {"method": "a", "seeds": 0.0049, "n": 2}
    row = {"method": "b", "difference": -0.003, "difference low": -0.0054,
           "difference high": -0.0007, "seeds": 0.0098, "n": 2}
    words = evaluate.in_words(row, first)
    assert "b is behind a" in words and "differ by 0.0333 or more" in words
    far = {"difference": -0.02, "difference low": -0.03, "difference high": -0.01}
    assert "seeds" in evaluate.in_words(row | far, first)
    far = {"difference": -0.18, "difference low": -0.19, "difference high": -0.17}
    assert "seeds" not in evaluate.in_words(row | far, first)


def test_what_intervals_over_images_leave_out_is_said():
    """Two seeds of one method are its own null; one seed says nothing of others."""
    a0, a1, b0, b1 = ({"facts": {"method": method}, "seed": seed, "dataset": "streets"}
                      for method in "ab" for seed in (0, 1))
    alone = evaluate.compared_groups([("a", [a0, a1])])
    assert alone == {"a seed=0": [a0], "a seed=1": [a1]}
    assert "the seed alone" in evaluate.about_seeds(alone)
    both = {"a": [a0, a1], "b": [b0]}
    assert evaluate.compared_groups(list(both.items())) == both
    assert "one run does not say" in evaluate.about_seeds(both)
    assert "spread of the seeds" in evaluate.about_seeds(both | {"b": [b0, b1]})


def test_the_enlarged_part_is_at_a_boundary():
    """A whole region called otherwise is larger, but says nothing of the decoder."""
    labels = torch.zeros(40, 80, dtype=torch.uint8)
    labels[:10, 60:] = 1
    blunt = labels.clone()
    blunt[8:10, 60:] = 0
    blunt[20:, :30] = 1
    top, left, h, w = evaluate.where_they_differ(labels, [labels, blunt])
    assert (h, w) == (10, 20)
    assert top < 10 <= top + h and left + w > 60, "not where the boundary is"


def test_the_images_that_are_shown_are_not_of_one_moment():
    """Frame 73 is next in disagreement after 72, but shows the same scene."""
    differ = torch.zeros(101)
    differ[[71, 72, 73, 5]] = torch.tensor([0.4, 0.5, 0.45, 0.3])
    assert evaluate.shown_images(differ) == [5, 72]
    assert evaluate.shown_images(torch.tensor([0.1, 0.2])) == [0, 1]
    assert evaluate.shown_images(torch.tensor([0.1])) == [0]


def test_pixels_near_a_boundary_and_disagreement_are_counted(monkeypatch):
    """Two halves: the band has four pixels on each side, void is in neither count."""
    labels = torch.zeros(10, 20, dtype=torch.uint8)
    labels[:, 10:] = 1
    labels[0] = 255
    wrong = labels.clone()
    wrong[1:, 0] = 1  # far from the boundary
    seen = evaluate.Compared(1, 2, runs=2, pictured=[0, 1])
    seen.update(0, labels, [labels, wrong])
    assert seen.counts[1, 0].tolist() == [[81, 9], [0, 90]]
    width = 2 * (evaluate.NEAR + 1)  # both pixels of the pair, and as many on each side
    assert seen.near[1, 0].sum() == 9 * width and not seen.near[1, 0, 0, 1]
    assert seen.differ[0] == 9 / 200


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two seeds, another method, and a run that is not finished."""
    root = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        from conftest import make_thin
        make_thin(patch)
        for name, more in (("a0", []), ("a1", ["--seed", 1]),
                           ("b", ["--method", "nrd:bilinear"])):
            launch(*FOUR_STEPS, *more, "--out", root / name)
    return root


def test_runs_side_by_side(two, tmp_path, capsys):
    """The numbers of `score`, and files that hold what was said."""
    runs = [two / "a0", two / "a1", two / "b"]
    with pytest.raises(SystemExit):
        call_evaluate("compare", *runs, "--workers", 0, "--block", 2)
    assert "fewer than five such blocks" in capsys.readouterr().err
    call_evaluate("compare", *runs, tmp_path / "none", "--workers", 0, "--out",
                  tmp_path / "out")
    said = capsys.readouterr()
    assert "left out: no checkpoint" in said.err
    assert "over 2 seeds" in said.out and "nrd:bilinear" in said.out
    assert "one run does not say" in said.out
    report = json.loads((tmp_path / "out/compare.json").read_text())
    assert report["images"] == 2 and len(report["runs"]) == 3
    scores = [common.load_checkpoint(run)["miou"] for run in runs]
    first, second = report["rows"]
    assert first["miou"] == pytest.approx(sum(scores[:2]) / 2, abs=1e-5)
    assert second["miou"] == pytest.approx(scores[2], abs=1e-5)
    assert len((tmp_path / "out/compare.csv").read_text().splitlines()) == 3
    assert Image.open(tmp_path / "out/compare.png").size[0] > 800


def test_every_configuration_has_a_line(two, tmp_path, capsys):
    """Another encoder or data set is another configuration: no run is lost."""
    state = common.load_checkpoint(two / "a0")
    for name, change in (("deeper", {"backbone": "resnet34"}),
                         ("elsewhere", {"dataset": "camvid"}),
                         ("exact", {"args": state["args"] | {"tf32": 0}}),
                         ("gone", {"method": "gone"})):
        (tmp_path / name).mkdir()
        common.save_checkpoint(state | change, tmp_path / name / "last.pt")
    call_evaluate("table", two / "a0", two / "a1", *tmp_path.iterdir(), "--csv",
                  tmp_path / "table.csv")
    with open(tmp_path / "table.csv", encoding="utf-8") as file:
        rows = {(row["method"], row["dataset"]): int(row["n"])
                for row in csv.DictReader(file)}
    assert "left out: unknown method 'gone'" in capsys.readouterr().err
    assert rows == {("nrd init=mlp backbone=resnet18 tf32=1", "streets"): 2,
                    ("nrd init=mlp backbone=resnet18 tf32=0", "streets"): 1,
                    ("nrd init=mlp backbone=resnet34 tf32=1", "streets"): 1,
                    ("nrd init=mlp", "camvid"): 1}
    with pytest.raises(SystemExit):
        call_evaluate("compare", two / "a0", tmp_path / "elsewhere")
    assert "several data sets, camvid, streets" in capsys.readouterr().err


def test_a_width_that_only_one_run_states_tells_them_apart():
    """A paper's recipe has no width, `--channels 64` has one: two names, not one."""
    narrow = {"name": "nrd", "dataset": "ade20k", "facts": {"method": "nrd"}}
    other = narrow | {"facts": {"method": "nrd", "channels": "64"}}
    assert evaluate.distinguished([[narrow], [other]]) == ["nrd", "nrd channels=64"]


def test_pictures_leave_out_what_all_names_have():
    """Of a recipe tried in three ways only what was changed stands over each column.

    A value with a space in it stays whole, and methods keep their names.
    """
    names = [f"nrd init=mlp scale=[{scale}, 2.0] power={power}"
             for scale, power in ((0.5, 0.9), (1.0, 0.9), (0.5, 0.0))]
    assert evaluate.short_names(names) == ("nrd init=mlp", [
        "scale=[0.5, 2.0] power=0.9", "scale=[1.0, 2.0] power=0.9",
        "scale=[0.5, 2.0] power=0.0"])
    names = ["nrd init=mlp", "sfnet"]
    assert evaluate.short_names(names) == ("", names)
    for names in (["nrd"], ["nrd", "nrd lr=0.1"]):
        assert evaluate.short_names(names) == ("", names), "a column without a name"


def test_data_may_have_been_moved(two, tmp_path, capsys):
    """Asked for, another place is taken, with a warning: it may hold other images."""
    state = common.load_checkpoint(two / "b")
    common.save_checkpoint(state | {"data_root": "there"}, tmp_path / "last.pt")
    runs = [two / "a0", tmp_path, "--workers", 0, "--out", tmp_path / "o"]
    with pytest.raises(SystemExit):
        call_evaluate("compare", *runs)
    assert "has another data_root" in capsys.readouterr().err
    call_evaluate("compare", *runs, "--data-root", "here")
    assert "has learned from there" in capsys.readouterr().err


def test_an_option_that_the_encoder_needs_is_one_that_matters():
    """An encoder of labels has no early features: with guidance there is no network."""
    checkpoint = {"method": "nrd", "classes": ["a", "b"], "backbone": "labels",
                  "options": {"guidance": False}}
    assert evaluate.used_options(checkpoint) == {"guidance": False}


@pytest.mark.parametrize("option", ["learn_upsampling", "mean"])
def test_an_option_that_acts_in_training_alone_is_one_that_matters(option):
    """What is learned, and a buffer that is zero at first, make other experiments."""
    options = {option: True}
    checkpoint = {"method": "dupsampling", "classes": ["a", "b"],
                  "backbone": "resnet18", "options": options}
    assert evaluate.used_options(checkpoint) == options
    assert evaluate.used_options(checkpoint | {"method": "dupsampling:bilinear"}) == {}


def test_an_option_that_another_one_needs_is_one_that_matters():
    """At output stride 16 the ResNet has too few numbers for 1000 components."""
    options = {"output_stride": 32, "components": 1000}
    checkpoint = {"method": "dupsampling", "classes": ["a", "b"],
                  "backbone": "resnet18", "options": options}
    assert evaluate.used_options(checkpoint) == options


def test_what_cannot_be_compared_is_refused(two, tmp_path, capsys):
    """Runs that have learned from other images, or read the answer."""
    state = common.load_checkpoint(two / "b")
    (tmp_path / "c").mkdir()
    for change, said in (({"train_split": "trainval"}, "has another train_split"),
                         ({"difficulty": 1.0}, "has another difficulty"),
                         ({"evaluated": 2}, "no finished run"),
                         ({}, "needs two finished runs")):
        common.save_checkpoint(state | change, tmp_path / "c/last.pt")
        alone = "finished" in said
        runs = [tmp_path / "c"] if alone else [two / "a0", tmp_path / "c"]
        with pytest.raises(SystemExit):
            call_evaluate("compare", *runs, "--out", tmp_path / "o")
        assert said in capsys.readouterr().err
