"""A trained network as a file for other programs, and predict with that file."""
import importlib
import json

import pytest
import torch
from PIL import Image

import common
import evaluate
from conftest import SMALL, call_evaluate, launch_on_few, thin_resnet
from test_integrate import SPECS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, with the thin network, of a method that is quickly exported.
    """
    folder = tmp_path_factory.mktemp("run")
    launch_on_few({"train": 2, "val": 1}, "--method", "nrd:bilinear", "--iterations", 1,
                  "--eval-every", 1, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def exported(trained):
    """The file that `export` writes of that run."""
    path = trained / "model.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.get_model", thin_resnet)
        call_evaluate("export", trained, "--out", path)
    return path


@pytest.fixture(scope="module")
def loaded(exported):
    """What `predict` reads of the file, without the module of the method."""
    def unknown(*_):
        raise AssertionError("the file must do without the method's module")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.load_method", unknown)
        return evaluate.load_exported(exported)


def ends(capsys, code, *argv):
    """evaluate.py must end with this code and a sentence, which is returned."""
    with pytest.raises(SystemExit) as stop:
        call_evaluate(*argv)
    said = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in said, said
    return said


# --- The network ---------------------------------------------------------------------

SIZES = [(1, 65, 97), (3, 160, 96), (2, 64, 128), (1, 32, 32), (1, 255, 40)]


@pytest.mark.thorough  # each takes some ten seconds; see `exported` for one at once
@pytest.mark.parametrize("spec", SPECS)
def test_an_exported_network_is_right_at_sizes_it_was_not_traced_at(spec, thin):
    """Batch, height and width are free, from one image of 32x32 pixels on.

    The likely mistakes: a border that is repeated only at the traced size, a ceil of
    Python, a division by a number that is 0 for small maps. Each becomes a guard, and
    the file refuses other images.
    """
    model = common.build_model(spec, 5, **SMALL).eval()
    network = evaluate.Logits(model)
    reloaded = evaluate.traced(network).module()
    with torch.no_grad():
        for B, H, W in SIZES:
            images = torch.randn(B, 3, H, W)
            torch.testing.assert_close(
                reloaded(images), network(images), rtol=1e-3, atol=1e-4,
                msg=lambda said: f"{spec}, {B}x{H}x{W}: {said}")


@pytest.mark.parametrize("size, cells", [((7, 5), 3), ((6, 6), 6), ((2, 3), 6),
                                         ((9, 4), (2, 3))])
def test_pooling_by_products_is_adaptive_pooling(size, cells):
    """Cells that overlap, that are single positions, that are more than positions.

    The likely mistake: the end of a cell rounded down, so that cells never overlap.
    """
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(evaluate.PoolByProducts(cells).double()(x),
                               torch.nn.AdaptiveAvgPool2d(cells)(x),
                               rtol=1e-6, atol=1e-7)


def test_only_poolings_to_several_cells_are_exchanged(thin):
    """In a copy: the network that was given is as before and says the same."""
    model = common.build_model("sfnet", 5, **SMALL).eval()
    network = evaluate.Logits(model)
    other = evaluate.pool_by_products(network)
    count = lambda net, kind: sum(isinstance(m, kind) for m in net.modules())
    poolings = count(network, torch.nn.AdaptiveAvgPool2d)
    assert count(network, evaluate.PoolByProducts) == 0, "the given network was changed"
    assert poolings > 1
    assert count(other, evaluate.PoolByProducts) == poolings - 1, "all but that to 1x1"
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(other(images), network(images), rtol=1e-3, atol=1e-5)


# --- The file ------------------------------------------------------------------------


def test_predict_with_the_file_equals_predict_with_the_run(trained, exported, loaded,
                                                           tmp_path, monkeypatch):
    """Pixel for pixel, whole and in windows; the pictures that are written, too.

    The likely mistake: an image of fewer than 32 rows, which the network refuses.
    """
    picture = torch.randint(256, (70, 110, 3), dtype=torch.uint8)
    tiny = torch.randint(256, (9, 20, 3), dtype=torch.uint8)
    for name, x in {"photo": picture, "tiny": tiny}.items():
        Image.fromarray(x.numpy()).save(tmp_path / f"{name}.png")
    files = [tmp_path / "photo.png", tmp_path / "tiny.png"]
    windows = ["--window", 64, 64]
    with monkeypatch.context() as patch:
        patch.setattr("torchvision.models.get_model", thin_resnet)
        call_evaluate("predict", trained, *files, "--out", tmp_path / "run")
        call_evaluate("predict", trained, *files, "--out", tmp_path / "run-w", *windows)
    monkeypatch.setattr(evaluate, "load_exported", lambda *_: loaded)  # read once
    call_evaluate("predict", exported, *files, "--out", tmp_path / "file")
    call_evaluate("predict", exported, *files, "--out", tmp_path / "file-w", *windows)
    for ours, theirs in (("run", "file"), ("run-w", "file-w")):
        pictures = sorted((tmp_path / ours).iterdir())
        assert len(pictures) == 6
        for path in pictures:
            assert path.read_bytes() == (tmp_path / theirs / path.name).read_bytes(), (
                f"{theirs}: {path.name}")


def test_the_file_says_what_it_is(trained, loaded):
    """Classes, colours and normalisation go with it: a program needs nothing else."""
    about, _, _ = loaded
    checkpoint = common.load_checkpoint(trained)
    for name in ("method", "classes", "mean", "std", "iteration"):
        assert about[name] == checkpoint[name], name
    assert [tuple(c) for c in about["palette"]] == [
        tuple(c) for c in checkpoint["palette"]]
    assert about["commit"] == checkpoint["environment"]["commit"]
    assert str(trained) not in json.dumps(about), "no path of this machine"


def test_what_is_not_right_is_not_kept(trained, tmp_path, monkeypatch, capsys):
    """The file gets its name after the comparison: an older one stays as it was.

    The likely mistake: to write the file under its name, then to compare.
    """
    monkeypatch.setattr("torchvision.models.get_model", thin_resnet)
    out = tmp_path / "model.pt2"
    out.write_bytes(b"an older file")
    write = lambda network, about, path: path.write_bytes(b"new")
    wrong = lambda path: lambda images: torch.zeros(len(images), 11, *images.shape[2:])
    monkeypatch.setitem(evaluate.FORMATS, ".pt2", (write, wrong))
    said = ends(capsys, 1, "export", trained, "--out", out)
    assert "differs from the checkpoint by 1.0e+00" in said
    assert "nothing was kept" in said

    def refuses(path):
        def network(images):
            raise AssertionError("Guard failed: images.size()[2] == 97")
        return network
    monkeypatch.setitem(evaluate.FORMATS, ".pt2", (write, refuses))
    said = ends(capsys, 1, "export", trained, "--out", out)
    assert "could not be exported (Guard failed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert out.read_bytes() == b"an older file"


@pytest.mark.parametrize("lacking", evaluate.ONNX)
def test_onnx_without_its_packages_is_a_sentence(lacking, tmp_path, monkeypatch,
                                                 capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != lacking)
    said = ends(capsys, 2, "export", tmp_path, "--out", tmp_path / "model.onnx")
    assert f"model.onnx: {lacking} not installed; pip install onnx" in said
    assert ".pt2, which needs none" in said


def test_files_that_are_no_export_are_named(trained, exported, tmp_path, capsys):
    """And an export is no run: it cannot be scored or explained."""
    said = ends(capsys, 2, "export", trained, "--out", tmp_path / "model.pth")
    assert "must end in .pt2 or .onnx" in said
    said = ends(capsys, 2, "predict", tmp_path / "lost.pt2", "x.png", "--out", tmp_path)
    assert "no exported network" in said
    (tmp_path / "half.pt2").write_bytes(exported.read_bytes()[:9000])
    said = ends(capsys, 2, "predict", tmp_path / "half.pt2", "x.png", "--out", tmp_path)
    assert "is damaged, or not a file of evaluate.py export" in said
    for command in ("score", "explain", "table"):
        said = ends(capsys, 2, command, exported)
        assert "only `evaluate.py predict` reads" in said, command
