"""The command that checks a data set, and every fault that it must name."""
import re
import resource
import shutil
import time
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import UserError
from conftest import VOC_COLOURS, child, draw_tree, ended, run, save, tree_files

NAMES = [name for name in data.DATASETS if name != "streets"]

# --- The command ---------------------------------------------------------------------


@pytest.fixture
def check(tmp_path, capsys):
    """data.py in this process: exit code, what it printed, what it complained of."""
    def run_it(name, root, *more):
        argv = ["--dataset", name, "--workers", 0, "--out", tmp_path / "sheet.png"]
        code = 0
        try:
            data.main(list(map(str, [*argv, "--data-root", root, *more])))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run_it


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_is_read_by_the_command(tmp_path, name, check):
    """ok, a line per split and class, and a picture."""
    code, out, err = check(name, draw_tree(tmp_path, name))
    assert code == 0 and out.endswith("\nok\n"), err
    assert f"{name} train: 2 images read, 0 with faults" in out
    assert f"{name}: checking train, val\n" in out and "64x96 (2)" in out
    info = data.open_dataset(name, "val", root=str(tmp_path)).info
    lines = out.splitlines()
    for label in info.classes:
        assert any(line.startswith(f"{label} ") for line in lines), label
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 976 and 328 < sheet.height < 800 and sheet.mode == "RGB"


@pytest.mark.parametrize("name", ["cityscapes", "voc", "ade20k", "camvid"])
def test_test_splits_are_checked_too(tmp_path, name, check):
    root = draw_tree(tmp_path, name, splits=("train", "test"))
    code, out, err = check(name, root, "--splits", "train", "test")
    assert code == 0 and f"{name} test: 2 images read, 0 with" in out, err


def test_the_command_as_a_user_types_it(tmp_path, monkeypatch):
    """Loader processes, which survive a fault, the default picture, codes 0 and 2."""
    root = draw_tree(tmp_path, "camvid")
    done = run(data.__file__, "--dataset", "camvid", "--data-root", root,
               "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stderr
    assert "1/2" not in done.stdout, "a progress line in a file is one endless line"
    assert Image.open(tmp_path / "camvid-check.png").width == 2 * (2 * 240 + 8)
    bad = [save(root / f"{split}annot" / "0001.png", np.full((64, 96), 77, np.uint8))
           for split in ("train", "val")]
    argv, said = ["--dataset", "camvid", "--data-root", str(root), "--workers", "2",
                  "--out", str(tmp_path / "bad.png")], tmp_path / "said"
    assert ended([child(data.main, argv, output=said)]) == [2]
    said = said.read_text()
    assert all(str(path) in said for path in bad)
    assert "Traceback" not in said and "ok" not in said.split()
    monkeypatch.setattr("data.Streets.sizes", {"train": 3, "val": 2})
    assert data.main(["--dataset", "streets", "--workers", "0", "--out",
                      str(tmp_path / "streets.png")]) == 0


def test_the_table_counts_pixels_and_images(tmp_path, check):
    """Shares are of valid pixels, those of `ignored` of all; by hand on three masks."""
    masks = [np.zeros((10, 10), np.uint8), np.full((10, 20), 255, np.uint8),
             np.repeat(np.uint8([[0, 1, 1, 255]]), 10, axis=0)]
    for i, mask in enumerate(masks):
        for split in ("train", "val"):
            save(tmp_path / split / "images" / f"{i}.png", np.stack([mask] * 3, 2))
            save(tmp_path / split / "masks" / f"{i}.png", mask)
    code, out, err = check("folder", tmp_path, "--splits", "train")
    rows = {line[:14].strip(): line[14:].split() for line in out.splitlines()}
    assert code == 0, err
    assert rows["class0"] == ["84.62%", "2"] and rows["class1"] == ["15.38%", "1"]
    assert rows["ignored"] == ["61.76%", "2"] and rows["no valid pixel"] == ["1"]
    assert "sizes, H x W: 10x10 (1), 10x20 (1), 10x4 (1)\n" in out


def test_the_contact_sheet_shows_labels_in_their_colours(tmp_path, check):
    """Left the image, right its labels in the data set's colours, nothing blended."""
    root = draw_tree(tmp_path, "camvid", size=(64, 64))
    assert check("camvid", root)[0] == 0
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    labels = data.open_dataset("camvid", "train", root=str(root)).labels(0).numpy()
    palette = np.array([*data.CAMVID_PALETTE, *[(0, 0, 0)] * 245])
    shown = sheet[10:160:20, 170:320:20]  # the middles of the 8x8 blocks, enlarged
    assert np.array_equal(shown, palette[labels[4::8, 4::8]])
    colours = {tuple(c) for c in sheet[:160, 160:320].reshape(-1, 3)}
    assert colours <= {tuple(c) for c in palette}, "colours were blended"


def test_ignored_pixels_look_like_no_class():
    """VOC's background is black, so there void is not; elsewhere it is."""
    for name in set(NAMES) - {"folder"}:  # whose palette its classes.txt has
        palette = data.SOURCES[name].palette
        ignored = tuple(data.colourise(np.array([[255]]), palette)[0, 0])
        assert ignored not in palette, name
        assert (ignored == (0, 0, 0)) == (not name.startswith("voc")), name


def test_legends_of_150_classes_stay_readable():
    """In columns, of which none is cut off at the right."""
    source = data.SOURCES["ade20k"]
    info = data.Info("ade20k", source.classes, source.palette)
    strip = data.legend(info, 640)
    assert strip.shape[1] == 640 and strip.shape[0] < 151 * 20 / 3
    assert (strip[:, -8:] == 255).all(), "a name runs out of the picture"


def test_ten_faults_are_listed_and_the_rest_counted(tmp_path, check):
    """It does not stop at the first, in whatever split."""
    root = draw_tree(tmp_path, "camvid", images=7)
    bad = [save(root / f"{split}annot" / f"{i:04d}.png",
                np.full((64, 96), 77, np.uint8))
           for split in ("train", "val") for i in range(6)]
    code, out, err = check("camvid", root)
    assert code == 2 and "camvid: 12 faults\n" in err and "and 2 more" in err
    assert [str(path) in err for path in bad] == [True] * 10 + [False] * 2
    assert "7 images read, 6 with faults" in out and "ok" not in out.split()


def test_whatever_a_file_makes_pillow_raise_is_a_fault(tmp_path, check, monkeypatch):
    root = draw_tree(tmp_path, "camvid")

    def raises(path):
        raise ValueError("a chunk of minus one byte")
    monkeypatch.setattr(data, "read_image", raises)
    code, _, err = check("camvid", root)
    assert code == 2 and "4 faults" in err
    assert f"{root}/train/0001.png: unreadable (ValueError('a chunk of minus" in err


class Tiny:
    """As many labels as one likes."""

    has_labels = True

    def __len__(self):
        return 300

    def load(self, index):
        return torch.zeros(3, 4, 4).byte(), self.labels(index)

    def labels(self, index):
        return torch.full((4, 4), index % 7).byte()


def test_long_splits_do_not_run_out_of_open_files():
    """What loader processes send stays in shared files unless it is copied."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(__file__) as probe:  # its number: how many are open already
        few = probe.fileno() + 200, limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, few)
    try:
        _, sizes, counts = data.survey(Tiny(), "tiny", 1)
        assert sizes == {"4x4": 300} and counts.shape == (300, 256)
        maps = data.LabelMaps(Tiny(), 1)
        assert len(list(map(torch.max, maps))) == len(maps.kept) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_download_ends_with_what_to_do(tmp_path, check, monkeypatch):
    """No network: the address, the file's name, where to put it. Else: where to go."""
    def offline(url, *_, **__):
        raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive",
                        offline)
    code, _, err = check("voc", tmp_path, "--download")
    for part in ("https://", "no route to host", "VOCtrainval_11-May-2012.tar",
                 f"into {tmp_path}"):
        assert code == 2 and part in err
    code, _, err = check("cityscapes", tmp_path, "--download")
    assert code == 2 and "after registration" in err and "gtFine" in err
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive",
                        lambda *_, **__: draw_tree(tmp_path, "voc"))
    assert check("voc", tmp_path, "--download")[0] == 0


# --- Faults: each one sentence that names the file and the cause ---------------------

MASKS = {
    "illegal value": (np.full((64, 96), 200, np.uint8),
                      r"label values 200 \(6144 px\); legal are .*; a grey-scale pic"),
    "colour": (np.zeros((64, 96, 3), np.uint8), "mode RGB.*colour-coded"),
    "16 bit": (np.zeros((64, 96), np.uint16), "mode I;16.*16- or 32-bit"),
    "other size": (np.ones((32, 96), np.uint8), r"mask is \(32, 96\) but its image"),
    "binary": (np.eye(64, 96, dtype=np.uint8) * 255, "only 0 and 255: a binary mask?"),
    "empty": (b"", "not an image"), "text": (b"hello", "not an image"),
    "truncated": (None, "truncated"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", MASKS)
def test_a_bad_mask_is_named_with_its_cause(tmp_path, name, fault, check):
    """In every data set, by the command and by the spot check before training."""
    root = draw_tree(tmp_path, name, size=(64, 96))
    dataset = data.open_dataset(name, "val", root=str(root))
    path, (content, message) = dataset.pairs[1][1], MASKS[fault]
    if isinstance(content, np.ndarray):
        save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    code, out, err = check(name, root)
    if (name, fault) == ("folder", "binary"):
        return data.check_some(dataset)  # one of many may be: see below
    assert code == 2 and re.search(f"\n  {re.escape(str(path))}: .*{message}", err), err
    assert "1 faults" in err and "1 with faults" in out
    with pytest.raises(UserError, match=message):
        data.check_some(dataset)


@pytest.mark.parametrize("name", NAMES)
def test_an_unreadable_image_is_named(tmp_path, name, check):
    root = draw_tree(tmp_path, name)
    path = data.open_dataset(name, "train", root=str(root)).pairs[0][0]
    path.write_bytes(path.read_bytes()[:2000])
    code, _, err = check(name, root)
    assert code == 2 and re.search(f"{path}: unreadable .*truncated download", err)


def test_folders_of_binary_masks_are_recognised_as_a_whole(tmp_path, check):
    """255 is legal there: only if all masks are 0 and 255 it must have meant 1."""
    root = draw_tree(tmp_path, "folder", images=3)
    (root / "classes.txt").write_text("0 ground 1 2 3\n1 figure 4 5 6\n2 sky 7 8 9\n")
    masks = [save(root / "val" / "masks" / f"{i}.png",
                  np.eye(64, 96, dtype=np.uint8) * 255) for i in range(3)]
    code, _, err = check("folder", root)
    assert code == 2 and "folder val: every mask" in err and "binary masks?" in err
    with pytest.raises(UserError, match="binary masks.*1 instead of 255"):
        data.check_some(data.open_dataset("folder", "val", root=str(root)))
    save(masks[0], np.full((64, 96), 1, np.uint8))
    data.check_some(data.open_dataset("folder", "val", root=str(root)))
    assert check("folder", root)[0] == 0


def test_a_voc_mask_may_be_background_and_void_alone(tmp_path):
    """Difficult objects are void in VOC; its masks are in palette mode."""
    root = draw_tree(tmp_path, "voc")
    dataset = data.open_dataset("voc", "val", root=str(root))
    only = np.eye(64, 96, dtype=np.uint8) * 255
    save(dataset.pairs[0][1], only, palette=VOC_COLOURS)
    assert np.array_equal(dataset.load(0)[1].numpy(), only)


def test_masks_renumbered_by_another_program_are_recognised(tmp_path):
    """ADE20K: 255 is in no distributed mask; who finds it has shifted ids already."""
    root = draw_tree(tmp_path, "ade20k")
    dataset = data.open_dataset("ade20k", "val", root=str(root))
    save(dataset.pairs[0][1], dataset.labels(0).numpy())
    with pytest.raises(UserError, match="values 255 .*0..150; were the masks renumb"):
        dataset.load(0)


def test_label_ids_in_another_data_set_are_recognised(tmp_path):
    root = draw_tree(tmp_path, "camvid")
    dataset = data.open_dataset("camvid", "train", root=str(root))
    save(dataset.pairs[1][1], np.full((64, 96), 26, np.uint8))
    with pytest.raises(UserError, match="Cityscapes labelIds"):
        data.check_some(dataset)


def remove(kind):
    """Delete the image (0), mask (1) or list (2) of val's second sample."""
    def damage(root, name):
        path = root / tree_files(name, "val", 1)[kind]
        path.unlink()
        return path
    return damage


def replace_by(make):
    """Something else where val's second mask was."""
    def damage(root, name):
        path = remove(1)(root, name)
        make(path)
        return path
    return damage


def twin(kind):
    """A second file of the same name but for its ending."""
    def damage(root, name):
        path = root / tree_files(name, "val", 1)[kind]
        return save(path.with_suffix(".bmp"), np.zeros((64, 96), np.uint8))
    return damage


def empty(root, name):
    """A split without images."""
    image, mask, listed = (root / part for part in tree_files(name, "val", 0))
    if listed != root:
        listed.write_text("")
    for path in [*image.parent.iterdir(), *mask.parent.iterdir()]:
        path.unlink()
    return root


def file_for_folder(root, name):
    folder = (root / tree_files(name, "val", 0)[1]).parent
    shutil.rmtree(folder)
    folder.write_text("")
    return folder


LISTED = ("voc", "voc-aug", "context59", "context60")
PAIRED = ("camvid", "cityscapes", "ade20k", "folder")
LISTING_FAULTS = {
    "image without mask": (remove(1), NAMES, "1 of 2 images have no mask: .*FILE"),
    "mask without image": (remove(0), PAIRED, "1 of 2 masks have no image: .*FILE"),
    "listed image missing": (remove(0), LISTED, "1 of 2 listed images .*not there"),
    "list missing": (remove(2), LISTED, "No such file.*FILE"),
    "broken link": (replace_by(lambda p: p.symlink_to("nowhere")), NAMES,
                    "FILE: a broken link; was the data set moved"),
    "two images of a name": (twin(0), ("folder", "camvid"), "FILE.* have one name"),
    "two masks of a name": (twin(1), ("folder", "camvid"), "FILE.* have one name"),
    "no images": (empty, NAMES, "val: no images .is --data-root .*\n  FILE/"),
    "no folder": (file_for_folder, ("camvid", "voc", "ade20k", "folder", "context60"),
                  "Not a directory: .*FILE"),
}


@pytest.mark.parametrize("fault, name", [
    (fault, name) for fault, (_, names, _) in LISTING_FAULTS.items() for name in names])
def test_what_a_listing_shows_is_found_without_opening_a_file(tmp_path, fault, name,
                                                              check, monkeypatch):
    """Code 2 within two seconds, naming the file, before a picture is looked at."""
    damage, _, message = LISTING_FAULTS[fault]
    path = damage(draw_tree(tmp_path / name, name), name)
    if "no mask" in message or "no image:" in message:  # the one that is still there
        path = next(tmp_path / name / file for file in tree_files(name, "val", 1)
                    if (tmp_path / name / file).is_file())

    def explode(*_):
        raise AssertionError("an image was opened")
    monkeypatch.setattr(Image, "open", explode)
    started = time.time()
    code, _, err = check(name, tmp_path / name, "--splits", "val")
    assert code == 2 and time.time() - started < 2
    message = message.replace("FILE", re.escape(str(path)))
    assert re.search(message, err), err
    assert err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_root_prints_the_expected_tree(tmp_path, name, check):
    """One level too high, too low, nowhere, none: the tree, and where to get it."""
    root = draw_tree(tmp_path / "some" / "DIR", name)
    low = next(path for path in root.iterdir() if path.is_dir())
    first = tree_files(name, "val", 0)[0].split("/")[0]  # a folder of the layout
    for wrong, what in ((root.parent, "one level too high"), (low, "or too low?"),
                        (root / "nowhere", "no folder")):
        code, _, err = check(name, wrong, "--splits", "val")
        assert code == 2 and what in err and f"{wrong}/{first}" in err
        assert f"expected:\n  {wrong}/" in err and data.SOURCES[name].home in err
    with pytest.raises(UserError, match="needs --data-root DIR; expected:\n  DIR/"):
        data.open_dataset(name, "val")


def test_a_closed_folder_and_an_unknown_split_are_named(tmp_path, check, monkeypatch):
    root = draw_tree(tmp_path, "camvid")
    for name in NAMES:
        code, _, err = check(name, root, "--splits", "vla")
        assert code == 2 and "no split 'vla'; it has train, val, " in err
    assert "no split 'test'" in check("context59", root, "--splits", "test")[2]
    assert check("moon", root)[0] == 2

    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr("os.scandir", closed)
    code, _, err = check("camvid", root)
    assert code == 2 and f"Permission denied: '{root}/train'" in err


def test_unusual_images_are_read_upright_in_rgb(tmp_path):
    """Grey, RGBA, palette and EXIF-rotated pictures all become (3, H, W)."""
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    for mode in ("L", "RGBA", "P"):
        picture.convert(mode).save(tmp_path / f"{mode}.png")
        assert data.read_image(tmp_path / f"{mode}.png").shape == (3, 4, 6)
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 6, 4)


def test_palette_mask_keeps_its_ids(tmp_path):
    """Mode P must not be converted: grey values would replace the ids."""
    mask = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8), mode="P")
    mask.putpalette([9, 9, 9, 200, 30, 30, 30, 200, 30] + [77] * 759)
    mask.save(tmp_path / "p.png")
    assert data.read_mask(tmp_path / "p.png").tolist() == [[0, 1, 2, 255]]
