"""How an image becomes class ids, and which pixels are counted: against slow twins."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import evaluate
from common import IGNORE_INDEX, ConfusionMatrix, UserError
from conftest import EMPTY, SMALL, call_evaluate, child, draw_tree, ended, ranks, save
from evaluate import Protocol, predict

MS = Protocol(scales=(0.5, 1.0, 1.75), flip=True)


def tiny(spec="deeplabv3plus", num_classes=5):
    """A small network with random weights that does not say one class everywhere."""
    torch.manual_seed(0)
    model = common.build_model(spec, num_classes, **SMALL)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel()**-0.5)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():  # statistics of some noise, so that maps vary over the image
        model(torch.randn(4, 3, 96, 96))
    return model.eval()


def saved(folder, info, *, root=None, spec="nrd:bilinear"):
    """A run folder with a last.pt as train.py would write it, untrained."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny(spec, len(info.classes))
    options = {"channels": SMALL["channels"]}
    state = {**EMPTY, "method": spec, "options": options,
             "backbone": SMALL["backbone"], "classes": list(info.classes),
             "palette": [list(c) for c in info.palette], "dataset": info.name,
             "data_root": None if root is None else str(root), "difficulty": 0.5,
             "mean": list(data.MEAN), "std": list(data.STD), "iteration": 0,
             "model": model.state_dict()}
    common.save_checkpoint(state, folder / "last.pt")
    return folder


def slowly(model, images, protocol):
    """The literal twin: full score maps at every size, one after the other."""
    H, W = images.shape[-2:]
    total = 0
    base = 1
    if any(protocol.base_size):  # the largest factor with which the image fits into it
        long, short = max(protocol.base_size), min(protocol.base_size)
        base = long / max(H, W)
        if base * min(H, W) > short:
            base = short / min(H, W)
    for scale in protocol.scales:
        size = round(H * base * scale), round(W * base * scale)
        for mirrored in (False, True)[:1 + protocol.flip]:
            x = images if size == (H, W) else evaluate.resize(images, size)
            x = x.flip(-1) if mirrored else x
            h, w = protocol.window or size
            sums, seen = torch.zeros(1, model.num_classes, *size), torch.zeros(size)
            steps = protocol.steps() if protocol.window else size
            for i in range(math.ceil(max(0, size[0] - h) / steps[0]) + 1):
                for j in range(math.ceil(max(0, size[1] - w) / steps[1]) + 1):
                    y = max(0, min(i * steps[0], size[0] - h))
                    z = max(0, min(j * steps[1], size[1] - w))
                    part = model(x[..., y:y + h, z:z + w])["out"]
                    sums[..., y:y + h, z:z + w] += part
                    seen[y:y + h, z:z + w] += 1
            logits = F.interpolate(sums / seen, (H, W), mode="bilinear")
            logits = logits.flip(-1) if mirrored else logits
            total = total + (logits.softmax(1) if protocol.fuse == "mean"
                             else logits.double().exp())
    return total[0].argmax(0)


# --- The image becomes class ids -----------------------------------------------------


@torch.no_grad()
def test_images_smaller_than_a_cell_are_padded_by_their_border():
    """20 rows: the network sees 32, the last ones repeated; the result has 20 again."""
    model, images = tiny(), torch.randn(1, 3, 20, 40)
    padded = F.pad(images, (0, 0, 0, 12), mode="replicate")
    windows = evaluate.Windows(model, images, Protocol())
    torch.testing.assert_close(windows.rows(0, 20), model(padded)["out"][0, :, :20])


@pytest.mark.parametrize("protocol", [
    Protocol(), Protocol(window=(50, 64)), Protocol(window=(64, 64), stride=(9, 40)),
    replace(MS, base_size=(120, 110)),
    MS, replace(MS, window=(48, 96)), replace(MS, fuse="exp")], ids=str)
@torch.no_grad()
def test_protocols_equal_their_slow_twin(protocol):
    """Windows, scales, flip and both fusions against full maps in nested loops."""
    model, images = tiny(), torch.randn(1, 3, 75, 130)
    ids = predict(model, images, protocol)
    assert ids.unique().numel() > 2, "one class everywhere shows nothing"
    wrong = (ids != slowly(model, images, protocol)).float().mean()
    assert wrong < 0.001, f"{wrong:.1%} of the pixels differ"


@torch.no_grad()
def test_one_window_is_the_whole_image_and_one_scale_is_single_scale():
    model, images = tiny(), torch.randn(1, 3, 75, 130)
    whole = predict(model, images)
    for same in (Protocol(window=(75, 130)), Protocol(window=(500, 500)),
                 Protocol(scales=(1.0,), flip=False, fuse="exp")):
        assert torch.equal(predict(model, images, same), whole), str(same)
    twice = Protocol(scales=(1.0, 1.0))  # the long way: a mean of two equal passes
    assert torch.equal(predict(model, images, twice), whole)


class Flat(nn.Module):
    """A network that passes its input on as logits, to feed chosen numbers."""

    num_classes = 3

    def forward(self, images):
        return {"out": images, "aux": []}


@pytest.mark.parametrize("H, W", [(40, 70), (20, 20), (5, 90)])
def test_predictions_stay_at_their_pixels(H, W):
    """Also where a small image was padded for the encoder: the far border is cut."""
    scores = torch.randn(1, 3, H, W)
    assert torch.equal(predict(Flat(), scores), scores[0].argmax(0)), (
        "predictions slid against the image")
    lopsided = torch.zeros(1, 3, H, W)
    lopsided[:, 1, :, :W // 4] = 9.0
    ids = predict(Flat(), lopsided, Protocol(flip=True))
    assert (ids[:, :W // 4] == 1).all() and (ids[:, W // 4:] == 0).all(), (
        "the mirrored scores were not mirrored back")


def test_sum_of_exp_does_not_overflow_and_trusts_the_confident():
    """exp(200) is infinite in float32; the sum of exp still finds the larger sum."""
    big = torch.zeros(1, 3, 40, 40)
    big[:, 0], big[:, 2, :20] = 200.0, 201.0
    ids = predict(Flat(), big, Protocol(flip=True, fuse="exp"))
    assert (ids[:20] == 2).all() and (ids[20:] == 0).all()
    # One pass prefers class 0 by 5 to 0, the other class 1 by 9 to 8.5: the mean of
    # softmax follows the clearer one, the sum of exp the one with larger logits.
    for fuse, expected in (("mean", 0), ("exp", 1)):
        says = iter([(5.0, 0.0, 0.0), (8.5, 9.0, 0.0)])
        model = Flat()
        model.forward = lambda images: {"out": torch.tensor(next(says)).reshape(
            1, 3, 1, 1).expand(1, 3, 32, 32)}
        ids = predict(model, big[..., :32, :32], Protocol(flip=True, fuse=fuse))
        assert (ids == expected).all(), fuse


@torch.no_grad()
def test_the_whole_score_map_never_exists(monkeypatch):
    """Neither for one pass nor for ten: no tensor of K*H*W floats beyond the cap."""
    model, images = tiny("nrd"), torch.randn(1, 3, 128, 256)
    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                sizes.append(out.numel() if out.dim() < 4 or out.shape[1] == 5 else 0)
            return out
    whole, ms = predict(model, images), predict(model, images, MS)
    monkeypatch.setattr(evaluate, "STRIP", 5 * 256 * 8)
    monkeypatch.setattr(evaluate, "BAND", 5 * 256 * 64)
    with Largest():
        assert torch.equal(predict(model, images), whole)
        assert torch.equal(predict(model, images, MS), ms), "bands of rows changed ids"
    assert max(sizes) <= 5 * 256 * 64 * 1.75, "more than a band of the score map"


@torch.no_grad()
def test_out_of_memory_names_a_window_and_takes_none_by_itself(monkeypatch):
    """Scored in windows the number would be another one: the user decides."""
    model, images = tiny(), torch.randn(1, 3, 96, 160)

    def full(crop):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(model, "decode", full)
    with pytest.raises(UserError, match="image of 96x160 .*--window 64 80") as caught:
        predict(model, images)
    assert caught.value.code == 1
    monkeypatch.setattr(model, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # another error is not hidden
        predict(model, images)


def predict_a_large_one(size, classes, said):
    """One pass of a network with random weights; the peak of this process."""
    model = common.build_model("nrd", classes, backbone="resnet18").eval()
    with torch.inference_mode():
        predict(model, torch.randn(1, 3, *size))
    said.write_text(str(common.peak_memory("cpu")))


@pytest.mark.thorough
@pytest.mark.parametrize("classes, size", [(19, (1024, 2048)), (150, (683, 1024))])
def test_large_images_are_scored_in_under_two_gigabytes(classes, size, tmp_path):
    """The process itself, with torch in it, from the operating system's count."""
    process = child(predict_a_large_one, size, classes, tmp_path / "peak", thin=False)
    process.join(120)
    assert 0.2 < float((tmp_path / "peak").read_text()) < 2


# --- Which pixels are counted --------------------------------------------------------


def test_absent_classes_follow_the_convention(monkeypatch, seven, tmp_path, capsys):
    """IoU 0.9, 0.8 and none: mean 0.85, and 0.5667 where absent counts as zero."""
    monkeypatch.setattr(ConfusionMatrix, "iou",
                        lambda self: torch.tensor([0.9, 0.8, math.nan]).double())
    for convention, miou, how in (("ours", 0.85, "not averaged"),
                                  ("encoding", 0.5667, "counted as 0")):
        call_evaluate("score", seven, "--workers", 0, "--convention", convention,
                      "--out", tmp_path)
        report = json.loads((tmp_path / "score.json").read_text())
        assert report["miou"] == pytest.approx(miou, abs=1e-4)
        assert report["classes"]["class2"]["iou"] is None
        said = capsys.readouterr().out
        assert f"{how}: class2" in said and f"mIoU {report['miou']:.4f}" in said


def blobs(size=(40, 60), classes=4):
    """Random label maps with regions of some pixels, void strips and a void corner."""
    coarse = torch.rand(1, classes, size[0] // 8, size[1] // 8)
    labels = F.interpolate(coarse, size, mode="bilinear")[0].argmax(0).byte()
    labels[evaluate.class_boundary(labels) & (torch.rand(size) < 0.5)] = IGNORE_INDEX
    labels[:9, :9] = IGNORE_INDEX
    return labels


@pytest.mark.parametrize("trimap", [True, False])
def test_bands_equal_brute_force_distances(trimap):
    """Every pixel's distance to every seed; void is no part of any band."""
    labels, guess = blobs(), blobs(classes=3)
    guess[guess == IGNORE_INDEX] = 3
    H, W = labels.shape
    if trimap:
        seeds = [(y, x) for y in range(H) for x in range(W) if labels[y, x] == 255]
    else:
        pairs = [((y, x), (y + dy, x + dx)) for y in range(H) for x in range(W)
                 for dy, dx in ((0, 1), (1, 0)) if y + dy < H and x + dx < W]
        seeds = {p for a, b in pairs if labels[a] != labels[b]
                 and 255 not in (labels[a], labels[b]) for p in (a, b)}
    away = np.array([[min(max(abs(y - a), abs(x - b)) for a, b in seeds)
                      for x in range(W)] for y in range(H)])
    bands = evaluate.Bands(4, trimap=trimap, widths=(1, 3, 7))
    bands.update(0, labels, guess)
    for width, miou, pixels in bands.results():
        inside = torch.from_numpy(away <= width) & (labels != 255)
        matrix = ConfusionMatrix(4)
        matrix.update(labels[inside], guess[inside])
        assert pixels == inside.sum(), f"width {width}"
        assert miou == pytest.approx(matrix.miou()), f"width {width}"
    empty = torch.zeros(20, 20, dtype=torch.uint8)
    bands.update(1, empty, empty)
    assert bands.sums[0, 0, 0] == 1 and pixels == int(bands.results()[-1][2]), (
        "an image without a seed has no band; its border is no boundary")


def test_boundary_f_equals_brute_force_distances():
    """DAVIS' F by distances between all outline pixels, and 1 if nothing is wrong."""
    labels, guess = blobs(), blobs()
    labels[labels == 3] = 2  # class 3 is in the prediction only
    guess[guess == IGNORE_INDEX] = 0
    metric = evaluate.BoundaryF(1, 6)
    metric.shares = (0.01, 0.04)
    metric.sums = metric.sums[..., :2]
    metric.update(0, labels, guess)
    guess[labels == 255] = 255
    for c in range(4):
        a, b = (evaluate.outline(x == c).nonzero().double() for x in (labels, guess))
        for i, radius in enumerate((1, 3)):  # ceil of 1 % and 4 % of hypot(40, 60)
            if not (len(a) and len(b)):
                expected = 0.0
            else:
                near = torch.cdist(a, b) <= radius
                r, p = near.any(1).double().mean(), near.any(0).double().mean()
                expected = (2 * p * r / (p + r)).item()
            assert metric.sums[0, c, i].item() == pytest.approx(expected), (c, radius)
    assert metric.sums[0, 3, 0] == 0, "predicted, but not there"
    assert metric.sums[0, 5].isnan().all(), "a class in neither does not count"
    perfect = evaluate.BoundaryF(1, 4)
    perfect.update(0, labels, labels)
    assert perfect.results()[0][1] == 1


def test_outline_is_davis_own():
    """Right, below and diagonal neighbours; the last row looks right, the last column
    down, the last pixel nowhere."""
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    expected = [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert evaluate.outline(mask).int().tolist() == expected


# --- The report ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Seven images of different sizes, and a run that knows their classes."""
    root = draw_tree(tmp_path_factory.mktemp("data"), "folder", images=7)
    rng = np.random.default_rng(1)
    for i, (H, W) in enumerate([(64, 96), (40, 50), (33, 70)]):
        save(root / f"val/images/{i}.jpg", rng.integers(0, 256, (H, W, 3), np.uint8))
        save(root / f"val/masks/{i}.png", rng.integers(0, 3, (H, W)).astype(np.uint8))
    info = data.open_dataset("folder", "val", root=str(root)).info
    return saved(tmp_path_factory.mktemp("run") / "r", info, root=root)


def test_report_holds_the_number_and_all_that_it_depends_on(seven, tmp_path, capsys):
    out = tmp_path / "out"
    call_evaluate("score", seven, "--workers", 0, "--flip", "--scales", 0.5, 1,
                  "--bands", "--boundary-f", "--out", out)
    said, report = capsys.readouterr().out, json.loads((out / "score.json").read_text())
    assert f"mIoU {report['miou']:.4f}" in said and "7/7 images" in said
    assert "scales 0.5 1 + flip, mean softmax" in said
    assert (out / "score.txt").read_text().strip() in said
    assert report["settings"]["flip"] and report["images"] == 7
    assert len(report["sha256"]) == 64 and report["split"] == "val"
    assert report["bands"]["name"] == "class-boundary mIoU", "trimap is for VOC only"
    assert [row[0] for row in report["bands"]["rows"]] == list(evaluate.WIDTHS)
    assert len(report["boundary_f"]) == 4
    worst, best = report["worst"], report["best"]
    assert worst[0]["miou"] <= worst[1]["miou"] <= best[1]["miou"] <= best[0]["miou"]
    for name in ("confusion", "worst", "best", "bands"):
        assert Image.open(out / f"{name}.png").size[0] > 200, name


@pytest.mark.parametrize("name, said", [
    ("context59", "mIoU59 0."),
    ("voc-aug", "trimap mIoU within w pixels of void (0 images have none)")])
def test_numbers_carry_the_name_of_what_they_are(tmp_path, capsys, name, said):
    """59 and 60 classes are two metrics; a trimap is around void, and on VOC only."""
    root = draw_tree(tmp_path / "d", name)
    info = data.open_dataset(name, "val", root=str(root)).info
    call_evaluate("score", saved(tmp_path / "run", info, root=root), "--workers", 0,
                  "--bands")
    assert said in capsys.readouterr().out
    assert list((tmp_path / "run").glob(f"score-{name}-val-*/score.json"))


def test_worst_and_best_images_are_those(seven):
    """Each image scored by itself, with another function of the library."""
    checkpoint = common.load_checkpoint(seven)
    model = common.restore(checkpoint)
    dataset = data.open_dataset("folder", "val", root=checkpoint["data_root"])
    alone, images = [], evaluate.PerImage(7, 3)
    for i in range(7):
        image, labels = dataset.load(i)
        with torch.no_grad():
            guess = predict(model, data.NORMALISE(image)[None])
        matrix = ConfusionMatrix(3)
        matrix.update(labels, guess)
        alone.append(matrix.miou())
        images.update(i, labels, guess)
    assert images.order() == sorted(range(7), key=alone.__getitem__)
    images.update(2, torch.full((4, 4), 255), torch.zeros(4, 4))
    assert 2 not in images.order(), "nothing valid: neither worst nor best"


@pytest.mark.parametrize("images, processes", [
    (7, 3), (1, 2), pytest.param(7, 2, marks=pytest.mark.thorough)])
def test_several_processes_count_what_one_counts(tmp_path, seven, images, processes):
    """No image twice, none lost, equal to the digit; nothing to do is no deadlock."""
    scored = seven
    if images == 1:
        root = draw_tree(tmp_path / "data", "folder", images=1)
        info = data.open_dataset("folder", "val", root=str(root)).info
        scored = saved(tmp_path / "run", info, root=root)
    words = ["score", str(scored), "--workers", "0", "--bands", "--boundary-f", "--out"]
    reports, said = {}, tmp_path / "said"
    for n in (1, processes):
        codes = ended(ranks(n, evaluate.main, [*words, str(tmp_path / str(n))],
                            output=said, thin=False))
        assert codes == [0] * n, said.read_text()[-2000:]
        reports[n] = json.loads((tmp_path / str(n) / "score.json").read_text())
        del reports[n]["seconds"], reports[n]["peak_gb"]
    assert reports[1] == reports[processes]
    assert said.read_text().count(f"{images}/{images} images") == 2, "one rank speaks"


def test_a_split_without_valid_pixels_is_an_error_not_a_number(tmp_path, capsys):
    root = draw_tree(tmp_path / "d", "folder")
    info = data.open_dataset("folder", "val", root=str(root)).info
    for path in (root / "val" / "masks").iterdir():
        save(path, np.full((64, 96), 255, np.uint8))
    with pytest.raises(SystemExit) as caught:
        call_evaluate("score", saved(tmp_path / "run", info, root=root), "--workers", 0)
    assert caught.value.code == 2 and "no valid pixel" in capsys.readouterr().err


def test_the_size_of_training_is_that_of_scoring():
    """A run whose images were resized is scored like that, unless it is typed."""
    checkpoint = {"recipe": {"base_size": [2048, 512]}}
    for words, size in (([], (2048, 512)), (["--base-size", "0", "0"], (0, 0)),
                        (["--base-size", "64", "32"], (64, 32))):
        args = evaluate.parse(["score", "RUN", *words])
        assert evaluate.protocol_of(args, checkpoint).base_size == size


@pytest.mark.parametrize("words, message", [
    (("--scales", "0"), "above 0"), (("--scales", "1", "1"), "different"),
    (("--stride", "5", "5"), "give --window"), (("--window", "0", "9"), "at least 1"),
    (("--max-pixels", "9"), "leaves no scale"), (("--split", "tset"), "tset"),
    (("--dataset", "streets"), "knows the 3 classes")])
def test_wrong_wishes_are_refused_in_a_sentence(seven, words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        call_evaluate("score", seven, "--workers", 0, *words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


# --- Files for the test servers ------------------------------------------------------


def in_id_space(root, out) -> list[float]:
    """cityscapesScripts' rule: ids 0..33; ignored ids' rows are no false positives."""
    evaluated = [c.id for c in data.Cityscapes.classes if not c.ignore_in_eval
                 and c.id >= 0]
    counts = np.zeros((256, 256), np.int64)
    for path in sorted((root / "gtFine" / "val").glob("*/*_labelIds.png")):
        name = path.name.replace("_gtFine_labelIds", "_leftImg8bit")
        truth, found = np.array(Image.open(path)), np.array(Image.open(out / name))
        np.add.at(counts, (truth.ravel(), found.ravel()), 1)
    ious = []
    for c in evaluated:
        others = [i for i in evaluated if i != c]
        union = counts[c].sum() + counts[others, c].sum()
        ious.append(counts[c, c] / union if union else math.nan)
    return ious


def test_exported_cityscapes_files_score_as_the_matrix_does(tmp_path, capsys):
    """The number of the server = ours: 33 bicycle, not train id 18, in the files."""
    root = draw_tree(tmp_path / "d", "cityscapes", images=3)
    dataset = data.open_dataset("cityscapes", "val", root=str(root))
    folder, out = saved(tmp_path / "run", dataset.info, root=root), tmp_path / "sub"
    call_evaluate("predict", folder, "--submission", "--split", "val", "--out", out)
    said = capsys.readouterr().out
    assert "zip" in said and "3 files" in said
    assert sorted(p.name for p in out.iterdir()) == sorted(
        str(path.name) for path, _ in dataset.pairs)
    call_evaluate("score", folder, "--workers", 0, "--out", tmp_path / "s")
    report = json.loads((tmp_path / "s" / "score.json").read_text())
    ours = [c["iou"] for c in report["classes"].values()]
    theirs = in_id_space(root, out)
    assert len(ours) == len(theirs) == 19
    assert ours == pytest.approx(theirs, nan_ok=True)


@pytest.mark.parametrize("name, mode", [("ade20k", "L"), ("voc", "P")])
def test_submissions_have_the_servers_values(tmp_path, capsys, name, mode):
    """ADE20K adds one; VOC's are palette files in results/VOC2012/Segmentation/."""
    root = draw_tree(tmp_path / "d", name)
    dataset = data.open_dataset(name, "val", root=str(root))
    folder = saved(tmp_path / "run", dataset.info, root=root)
    call_evaluate("predict", folder, "--submission", "--split", "val", "--out",
                  tmp_path / "s")
    files = sorted((tmp_path / "s").rglob("*.png"))
    assert len(files) == 2 and "Pack them" in capsys.readouterr().out
    model = common.restore(common.load_checkpoint(folder))
    for i, path in enumerate(files):
        with torch.no_grad():
            ids = predict(model, data.NORMALISE(dataset.image(i))[None])
        picture = Image.open(path)
        assert picture.mode == mode and path.stem == dataset.pairs[i][0].stem
        assert np.array_equal(np.array(picture), ids.numpy() + (name == "ade20k"))
    if name == "voc":
        assert files[0].parts[-4:-1] == ("VOC2012", "Segmentation", "comp6_test_cls")
        assert picture.getpalette()[3:6] == [128, 0, 0]
    with pytest.raises(SystemExit):
        call_evaluate("predict", folder, "--submission", "--split", "val", "--out",
             tmp_path / "s")
    assert "is not empty" in capsys.readouterr().err


def test_a_badly_written_submission_is_noticed(tmp_path, monkeypatch):
    root = draw_tree(tmp_path / "d", "ade20k")
    info = data.open_dataset("ade20k", "val", root=str(root)).info
    folder = saved(tmp_path / "run", info, root=root)
    monkeypatch.setattr(data, "raw_values", lambda *_: np.uint8(range(1, 151)))
    read = data.read_mask
    monkeypatch.setattr(data, "read_mask", lambda path: 0 * read(path))
    with pytest.raises(RuntimeError, match="was not written well"):
        call_evaluate("predict", folder, "--submission", "--split", "val", "--out",
             tmp_path / "s")


def test_there_is_no_server_for_camvid(tmp_path, capsys):
    root = draw_tree(tmp_path / "d", "camvid")
    info = data.open_dataset("camvid", "val", root=str(root)).info
    with pytest.raises(SystemExit):
        call_evaluate("predict", saved(tmp_path / "run", info, root=root),
                      "--submission", "--out", tmp_path / "s")
    assert "camvid has no test server" in capsys.readouterr().err
