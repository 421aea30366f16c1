"""The command that checks a data set, and every fault that it must name."""
import io
import re
import resource
import shutil
import struct
import zlib
from fnmatch import fnmatch
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import voc

import data
from common import UserError
from conftest import VOC_COLOURS, draw_tree, run, save, tree_files

NAMES = [name for name in data.DATASETS if name != "streets"]
BINARY = np.eye(64, 96, dtype=np.uint8) * 255

# --- The command ---------------------------------------------------------------------


@pytest.fixture
def check(tmp_path, capsys):
    """data.py in this process: exit code, what it printed, what it complained of."""
    def run_it(name, root, *more):
        argv = ["--dataset", name, "--workers", 0, "--out", tmp_path / "sheet.png"]
        try:
            code = data.main(list(map(str, [*argv, "--data-root", root, *more])))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run_it


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_is_read_by_the_command(tmp_path, name, check):
    """ok, a line per split, test included, and per class, and a picture."""
    splits = list(data.SOURCES[name].counts)
    root = draw_tree(tmp_path, name, splits=splits)
    code, out, err = check(name, root, "--splits", *splits)
    assert code == 0 and out.endswith("\nok\n"), err
    assert f"{name}: checking {', '.join(splits)}\n" in out and "64x96 (2)" in out
    for split in splits:
        assert f"{name} {split}: 2 images read, 0 with faults" in out
    info = data.open_dataset(name, "val", root=str(root)).info
    lines = out.splitlines()
    for label in info.classes:
        assert any(line.startswith(f"{label} ") for line in lines), label
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 976 and 328 < sheet.height < 1000 and sheet.mode == "RGB"


def test_streets_are_checked_by_loader_processes(tmp_path, check, monkeypatch):
    """They need no --data-root; more processes change nothing but the time."""
    monkeypatch.setattr("data.Streets.sizes", {"train": 3, "val": 2})
    code, out, err = check("streets", tmp_path, "--workers", 2)
    assert code == 0 and "streets train: 3 images read, 0 with faults" in out, err


def test_the_command_as_a_user_types_it(tmp_path):
    """A fault ends no loader process: both splits are read, the rest is drawn, code 2.
    """
    root = draw_tree(tmp_path, "camvid")
    bad = [save(root / f"{split}annot" / "0001.png", np.full((64, 96), 77, np.uint8))
           for split in ("train", "val")]
    done = run(data.__file__, "--dataset", "camvid", "--data-root", root,
               "--workers", 2, cwd=tmp_path)
    assert done.returncode == 2 and "ok" not in done.stdout.split()
    assert all(str(path) in done.stderr for path in bad), done.stderr
    assert "Traceback" not in done.stderr
    assert "1/2" not in done.stdout, "a progress line in a file is one endless line"
    assert Image.open(tmp_path / "camvid-check.png").width == 2 * (2 * 240 + 8)


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
    palette = np.array([*data.SOURCES["camvid"].palette, *[(0, 0, 0)] * 245])
    tile = sheet[2:162, 166:326]  # the second of 160 x 160, each with a margin of 2
    shown = tile[10::20, 10::20]  # the middles of the 8x8 blocks, enlarged
    assert np.array_equal(shown, palette[labels[4::8, 4::8]])
    colours = {tuple(c) for c in tile.reshape(-1, 3)}
    assert colours <= {tuple(c) for c in palette}, "colours were blended"


def test_ignored_pixels_look_like_no_class():
    """VOC's background is black, so there void is not; elsewhere it is."""
    for name in set(NAMES) - {"folder"}:  # whose palette its classes.txt has
        palette = data.SOURCES[name].palette
        ignored = tuple(data.colourise(np.array([[255]]), palette)[0, 0])
        assert ignored not in palette, name
        assert (ignored == (0, 0, 0)) == ("voc" not in name), name


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


class Tiny:
    """As many labels as one likes."""

    has_labels = True
    info = data.Info("tiny", (), ())

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
        maps = list(data.LabelMaps(Tiny(), 1))
        assert [int(labels.max()) for labels in maps] == [i % 7 for i in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_download_ends_with_what_to_do(tmp_path, check, monkeypatch):
    """No network: the address, the file's name, where to put it. Else: where to go."""
    def offline(url, *_, **__):
        raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive",
                        offline)
    code, _, err = check("voc", tmp_path, "--download")
    for part in (voc.DATASET_YEAR_DICT["2012"]["url"], "no route to host",
                 "VOCtrainval_11-May-2012.tar", f"into {tmp_path}"):
        assert code == 2 and part in err
    code, _, err = check("cityscapes", tmp_path, "--download")
    assert code == 2 and "after registration" in err and "gtFine" in err
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive",
                        lambda *_, **__: draw_tree(tmp_path, "voc"))
    assert check("voc", tmp_path, "--download")[0] == 0


# --- Masks: each fault is one sentence that names the file and the cause -------------


def encoded(array: np.ndarray, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def four_bit_png(height: int, width: int) -> bytes:
    """A grey PNG of 4 bits, all of its ids 1; PIL reads these but writes none."""
    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(
            ">I", zlib.crc32(body))
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    rows = (b"\0" + b"\x11" * (width // 2)) * height
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# Every data set has at least one fault, each fault the data set where it is likely:
# CamVid's first masks were coloured, Cityscapes' instance ids have 16 bits.
MASKS = [
    ("folder", "a grey picture", encoded(np.full((64, 96), 200, np.uint8)),
     r"label values 200 \(6144 px\); legal are 0..2 and 255; a grey-scale picture"),
    ("folder", "a JPEG called .png", encoded(np.zeros((64, 96), np.uint8), "JPEG"),
     "a JPEG mask; its compression makes up ids.*Save masks as PNG"),
    ("folder", "a JPEG in a TIFF", encoded(np.zeros((64, 96), np.uint8), "TIFF",
                                           compression="jpeg"),
     "a JPEG mask; its compression makes up ids.*Save masks as PNG"),
    ("folder", "4 bits, which PIL stretches to 255", four_bit_png(64, 96),
     "stored as L;4, grey of less than 8 bits .*Save masks as grey of 8 bits"),
    ("camvid", "colours", encoded(np.zeros((64, 96, 3), np.uint8)),
     "mode RGB.*colour-coded"),
    ("cityscapes", "16 bits", encoded(np.zeros((64, 96), np.uint16)),
     "mode I.*16- or 32-bit"),  # I;16, in older versions of PIL I
    ("context60", "another size", encoded(np.ones((32, 96), np.uint8)),
     r"mask is \(32, 96\) but its image is \(64, 96\)"),
    ("voc", "0 and 255, both legal", encoded(BINARY),
     "only 0 and 255: a binary mask. Expected class ids"),
    ("ade20k", "0 and 255, which is illegal", encoded(BINARY),
     "label values 255 .*; only 0 and 255: a binary mask?"),
    ("context59", "nothing", b"", "not an image"),
    ("context59", "text", b"hello", "not an image"),
    ("voc-aug", "half of it", None, "unreadable .*truncated download"),
]


@pytest.mark.parametrize("name, content, message",
                         [(name, *more) for name, _, *more in MASKS],
                         ids=[f"{name}: {fault}" for name, fault, *_ in MASKS])
def test_a_bad_mask_is_named_with_its_cause(tmp_path, name, content, message, check):
    """By the command and by the spot check before training."""
    root = draw_tree(tmp_path, name)
    dataset = data.open_dataset(name, "val", root=str(root))
    path = dataset.pairs[1][1]
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    code, out, err = check(name, root)
    assert code == 2 and re.search(f"\n  {re.escape(str(path))}: .*{message}", err), err
    assert "1 faults" in err and "1 with faults" in out
    with pytest.raises(UserError, match=message):
        data.check_some(dataset)


def test_folders_of_binary_masks_are_recognised_as_a_whole(tmp_path, check):
    """255 is legal there: only if all masks are 0 and 255 it must have meant 1."""
    root = draw_tree(tmp_path, "folder")
    for i in range(2):
        save(root / "val" / "masks" / f"{i}.png", BINARY)
    code, _, err = check("folder", root)
    assert code == 2 and "folder val: every mask" in err and "binary masks?" in err
    with pytest.raises(UserError, match="binary masks.*1 instead of 255"):
        data.check_some(data.open_dataset("folder", "val", root=str(root)))


def test_a_split_without_a_valid_pixel_is_a_fault(tmp_path, check):
    """train.py would refuse it."""
    root = draw_tree(tmp_path, "folder")
    for i in range(2):
        save(root / "val" / "masks" / f"{i}.png", np.full((64, 96), 255, np.uint8))
    code, _, err = check("folder", root)
    assert code == 2 and "folder val: all pixels of 2 masks are ignored" in err


def test_a_coloured_mask_may_have_an_opaque_alpha(tmp_path):
    """RGBA as RGB, unless it is transparent somewhere: what is meant there?"""
    colours = {(1, 2, 3): 0, (4, 5, 6): 1}
    mask = np.uint8([[[1, 2, 3, 255], [4, 5, 6, 255]]])
    save(tmp_path / "mask.png", mask)
    assert data.read_mask(tmp_path / "mask.png", colours).tolist() == [[0, 1]]
    mask[0, 0, 3] = 0
    save(tmp_path / "mask.png", mask)
    with pytest.raises(UserError, match="transparent somewhere: save it as RGB"):
        data.read_mask(tmp_path / "mask.png", colours)


def test_one_binary_mask_among_others_is_warned_of(tmp_path, check, capsys):
    """It may be right, one class and void, or a file from elsewhere: whose it is."""
    root = draw_tree(tmp_path, "folder", images=3)
    save(root / "val" / "masks" / "1.png", BINARY)
    message = (f"warning: 1 masks hold 0 and 255 alone, unlike the rest, first that of "
               f"{root}/val/images/1.jpg; 255 means ignored, not foreground\n")
    code, out, err = check("folder", root)
    assert code == 0 and out.endswith("\nok\n") and err == message
    for split, warning in (("train", ""), ("val", message)):
        data.check_some(data.open_dataset("folder", split, root=str(root)))
        assert capsys.readouterr().err == warning


def test_ids_that_no_training_mask_has_are_warned_of(tmp_path, check):
    """Once, with the ids; not when classes.txt says that they are meant to exist."""
    root = draw_tree(tmp_path, "folder")
    for i in range(2):
        save(root / "train" / "masks" / f"{i}.png", np.uint8([[1, 5], [2, 255]] * 32))
        save(root / "train" / "images" / f"{i}.jpg", np.zeros((64, 2, 3), np.uint8))
    code, _, err = check("folder", root)
    assert code == 0 and err.count("warning") == 1
    assert err.startswith(f"warning: {root}/train/masks: the highest id is 5, but no "
                          f"pixel has 0, 3, 4: 3 of 6 classes cannot be learned")
    (root / "classes.txt").write_text("".join(f"{i} c{i} {i} 2 3\n" for i in range(6)))
    assert check("folder", root)[::2] == (0, "")


def test_an_augmented_voc_mask_may_be_so_in_grey(tmp_path):
    """Copies of SBD's masks are grey, also those of images with difficult objects."""
    dataset = data.open_dataset("voc-aug", "train",
                                root=str(draw_tree(tmp_path, "voc-aug")))
    save(dataset.pairs[0][1], BINARY)
    assert dataset.labels(0).unique().tolist() == [0, 255]


def test_a_voc_mask_may_be_background_and_void_alone(tmp_path, capsys):
    """Difficult objects are void in VOC; its masks are in palette mode."""
    root = draw_tree(tmp_path, "voc")
    dataset = data.open_dataset("voc", "val", root=str(root))
    save(dataset.pairs[0][1], BINARY, palette=VOC_COLOURS)
    assert np.array_equal(dataset.load(0)[1].numpy(), BINARY)
    capsys.readouterr()
    data.check_some(dataset)
    assert capsys.readouterr().err == ""


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


def test_palette_mask_keeps_its_ids(tmp_path):
    """Mode P must not be converted: grey values would replace the ids."""
    ids = np.uint8([[0, 1, 2, 255]])
    path = save(tmp_path / "p.png", ids, palette=VOC_COLOURS)
    assert np.array_equal(data.read_mask(path), ids)


# --- Images --------------------------------------------------------------------------


def test_an_unreadable_image_is_named(tmp_path, check):
    root = draw_tree(tmp_path, "voc")
    path = data.open_dataset("voc", "train", root=str(root)).pairs[0][0]
    path.write_bytes(path.read_bytes()[:2000])
    code, _, err = check("voc", root)
    assert code == 2 and re.search(f"{path}: unreadable .*truncated download", err)


def test_whatever_a_file_makes_pillow_raise_is_a_fault(tmp_path, check, monkeypatch):
    root = draw_tree(tmp_path, "camvid")

    def raises(path, **_):
        raise ValueError("a chunk of minus one byte")
    monkeypatch.setattr("PIL.Image.open", raises)
    code, _, err = check("camvid", root)
    assert code == 2 and "4 faults" in err
    assert f"{root}/trainannot/0001.png: unreadable (a chunk of minus" in err


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


def test_16_bit_grey_images_are_read_at_their_own_range(tmp_path):
    """0..65535 becomes 0..255; cut off at 255, nearly all of it would be white."""
    grey = np.uint16([[0, 255, 256, 30000, 65535]])
    for end in ("png", "tif"):
        image = data.read_image(save(tmp_path / f"grey.{end}", grey))
        assert image.tolist() == [[[0, 0, 1, 117, 255]]] * 3, end


@pytest.mark.parametrize("kind, mode", [(np.int32, "I"), (np.float32, "F")])
def test_images_without_a_known_range_are_refused(tmp_path, kind, mode):
    """Heights, depths, probabilities: which of their values is white nobody knows."""
    path = save(tmp_path / "depth.tif", np.zeros((4, 6), kind))
    with pytest.raises(UserError, match=f"{path}: an image of 32-bit numbers .mode "
                                        f"{mode}.*; save it with 8 or 16 bits"):
        data.read_image(path)


# --- Listings ------------------------------------------------------------------------


def remove(kind):
    """Delete the image (0), mask (1) or list (2) of val's second sample."""
    def damage(root, name):
        path = root / tree_files(name, "val", 1)[kind]
        path.unlink()
        return path
    return damage


def partner(kind):
    """Of image (0) and mask (1) delete the other; this one is to be named."""
    def damage(root, name):
        remove(1 - kind)(root, name)
        return root / tree_files(name, "val", 1)[kind]
    return damage


def broken_link(root, name):
    path = remove(1)(root, name)
    path.symlink_to("nowhere")
    return path


def twin(kind):
    """A second file of the same name but for its ending."""
    def damage(root, name):
        path = root / tree_files(name, "val", 1)[kind]
        return save(path.with_suffix(".bmp"), np.zeros((64, 96), np.uint8))
    return damage


def sub_folder(root, name):
    path = root / tree_files(name, "val", 1)[0]
    folder = path.parent / "more"
    folder.mkdir()
    path.rename(folder / path.name)
    return folder


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


LISTINGS = [  # FILE is what the function returns
    ("cityscapes", "an image without mask", partner(0),
     "1 of 2 images have no mask: .*FILE"),
    ("ade20k", "a mask without image", partner(1),
     "1 of 2 masks have no image: .*FILE"),
    ("voc-aug", "a listed image that is not there", remove(0),
     "1 of 2 listed images .*not there"),
    ("context60", "a list that is not there", remove(2), "No such file.*FILE"),
    ("voc", "a list that is not there", remove(2), "No such file.*FILE"),
    ("camvid", "a broken link", broken_link,
     "FILE: no file, or a broken link; was the data set moved"),
    ("folder", "two images of one name", twin(0), "FILE.* have one name"),
    ("folder", "two masks of one name", twin(1), "FILE.* have one name"),
    ("folder", "images in a folder below", sub_folder,
     "FILE: images in folders below images/ are not read; move them up"),
    ("context59", "an empty list", empty, "val: no images .is --data-root .*\n  FILE/"),
    ("cityscapes", "empty folders", empty,
     "val: no images .is --data-root .*\n  FILE/"),
    ("ade20k", "a file in place of a folder", file_for_folder,
     "Not a directory: .*FILE"),
]


@pytest.mark.parametrize("name, damage, message",
                         [(name, *more) for name, _, *more in LISTINGS],
                         ids=[f"{name}: {fault}" for name, fault, *_ in LISTINGS])
def test_what_a_listing_shows_is_found_without_opening_a_file(tmp_path, name, damage,
                                                              message, check,
                                                              monkeypatch):
    """Code 2, naming the file, before a picture is looked at."""
    root = draw_tree(tmp_path / name, name)
    path = damage(root, name)

    def explode(*_):
        raise AssertionError("an image was opened")
    monkeypatch.setattr(Image, "open", explode)
    code, _, err = check(name, root, "--splits", "val")
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err
    assert re.search(message.replace("FILE", re.escape(str(path))), err), err


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_root_prints_the_expected_tree(tmp_path, name, check):
    """Where the data set has its images, masks and list, and where to get it."""
    code, _, err = check(name, tmp_path, "--splits", "val")
    tree = re.findall(rf"\n  ({tmp_path}/\S+)", err)
    assert code == 2 and data.SOURCES[name].home in err, err
    for file in filter(None, tree_files(name, "val", 0)):
        patterns = [re.sub(r"NAME|CITY|\{.*?\}", "*", line) for line in tree]
        assert any(fnmatch(f"{tmp_path}/{file}", each) for each in patterns), file


def test_a_wrong_root_is_told_from_a_missing_one(tmp_path, check):
    """One level too high, too low, nowhere, none."""
    root = draw_tree(tmp_path / "some" / "DIR", "camvid")
    for wrong, what in ((root.parent, "one level too high"),
                        (root / "train", "or too low?"),
                        (root / "nowhere", "no folder")):
        code, _, err = check("camvid", wrong, "--splits", "val")
        assert code == 2 and what in err and f"expected:\n  {wrong}/val/NAME" in err
    with pytest.raises(UserError, match="needs --data-root DIR; expected:\n  DIR/"):
        data.open_dataset("camvid", "val")


def test_a_closed_folder_and_an_unknown_split_are_named(tmp_path, check, monkeypatch):
    """.. and an unknown data set; PASCAL Context has no test split."""
    root = draw_tree(tmp_path, "camvid")
    code, _, err = check("camvid", root, "--splits", "vla")
    assert code == 2 and "no split 'vla'; it has train, val, test, trainval" in err
    assert "no split 'test'" in check("context59", root, "--splits", "test")[2]
    assert check("moon", root)[0] == 2

    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr("os.scandir", closed)
    code, _, err = check("camvid", root)
    assert code == 2 and f"Permission denied: '{root}/train'" in err
