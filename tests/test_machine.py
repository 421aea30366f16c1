"""What machines and strange files do to the programs: each ends in a sentence."""
import errno
import io
import math
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import data
import evaluate
import train
from common import UserError, load_checkpoint
from conftest import (FOUR_STEPS, ROOT, TINY, call_evaluate, child, draw_tree, ended,
                      save, train_ends)

pytestmark = pytest.mark.usefixtures("one_thread", "thin")


# --- Where a program talks to --------------------------------------------------------


def test_a_run_outlives_the_disk_of_its_output(tmp_path):
    """`train.py > log.txt` on a disk that fills up: the words are lost, not the run."""
    argv = [*FOUR_STEPS, "--out", str(tmp_path)]
    assert ended([child(train.main, argv, output="/dev/full")]) == [0]
    assert load_checkpoint(tmp_path)["iteration"] == 4


@pytest.mark.parametrize("ends", [
    "| head -n 1", pytest.param(">&- 2>&-", marks=pytest.mark.thorough)])
def test_a_program_outlives_who_listens(ends):
    """A closed pipe, a closed stdout and stderr: exit code 0 and no traceback."""
    command = f"{sys.executable} evaluate.py cost nrd:bilinear --json {ends}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_no_text_of_others_commands_the_terminal():
    """A class may be called "\\x1b[2J", which clears the screen: it is written out."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    talk = common.Sturdy(stream)
    print("car\x1b[2J\tB\u00e4ume\x9b", file=talk)
    stream.flush()
    assert stream.buffer.getvalue() == b"car\\x1b[2J\tB\\xe4ume\\x9b\n"


def test_an_error_that_names_a_file_is_a_sentence(capsys):
    """The disk's errors need no traceback, those of the code do."""
    with pytest.raises(SystemExit) as stop, common.show_errors([]):
        open("/nowhere/at/all")
    assert stop.value.code == 4 and "/nowhere/at/all" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), common.show_errors(["--debug"]):
        open("/nowhere/at/all")
    with pytest.raises(SystemExit) as stop, common.show_errors([]):
        raise OSError(errno.ENOSPC, "No space left on device")  # a write names no file
    assert stop.value.code == 4 and "No space left" in capsys.readouterr().err


def test_debug_is_understood_by_every_program():
    """Where an error says "--debug shows more", it may stand behind the command."""
    assert evaluate.parse(["export", "RUN", "--out", "x.pt2", "--debug"]).debug
    assert data.parse(["--dataset", "streets", "--debug"]).debug
    assert train.parse(["--debug"]).given == []


def test_a_number_is_not_lost_to_a_folder(tmp_path, stopped, capsys):
    """Minutes of scoring, and then nowhere to put it: the folder is tried first."""
    (tmp_path / "file").write_text("mine")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(evaluate, "score_dataset", lambda *_, **__: 1 / 0)
        call_evaluate("score", stopped, "--out", tmp_path / "file")
    assert stop.value.code == 2
    assert "cannot write to the folder" in capsys.readouterr().err


@pytest.mark.parametrize("argv, said", [
    (["--resume", ""], "--resume is empty"), (["--data-root="], "--data-root is empty"),
    (["--device", "gpu"], "--device gpu: "), (["--device", "meta"], "--device meta: "),
    (["--ohem", 2], "at most 1, got 2"), (["--photometric", 2], "at most 1, got 2")])
def test_what_a_script_may_hand_over_by_mistake(argv, said, tmp_path, capsys):
    """An empty variable is no default, a number beyond its meaning is none."""
    assert said in train_ends(capsys, 2, *argv, "--out", tmp_path / "run").err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, said", [
    (["--scales", "nan"], "above 0"), (["--base-size", -1, -1], "at least 0"),
    (["--workers", -1], "at least 0"), (["--device", "foo"], "--device foo: ")])
def test_wishes_that_are_no_numbers(argv, said, stopped, capsys):
    """A base size of -1 would score one pixel, and print a number."""
    with pytest.raises(SystemExit) as stop:
        call_evaluate("score", stopped, *argv)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_predictions_do_not_become_images(stopped, tmp_path, capsys):
    """Into the folder of the images: the second time there would be four times more."""
    save(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(SystemExit):
        call_evaluate("predict", stopped, tmp_path, "--out", tmp_path)
    assert "is where the images are" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.png"))) == 1


# --- Several processes ---------------------------------------------------------------


@pytest.mark.parametrize("environment, said", [
    ({"WORLD_SIZE": "abc"}, "RANK=? LOCAL_RANK=? WORLD_SIZE=abc"),
    ({"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
      "MASTER_PORT": "1"}, "RANK=5 LOCAL_RANK=5 WORLD_SIZE=2")])
def test_an_environment_that_torchrun_did_not_make(environment, said, tmp_path,
                                                   monkeypatch, capsys):
    """A variable left over, a rank that is none: told at once, not after a wait."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in train_ends(capsys, 1, *FOUR_STEPS, "--out", tmp_path).err


def test_a_rank_without_a_world_is_a_variable_left_over(monkeypatch, capsys):
    """RANK alone makes nobody one of several: the run talks, and owns its folder."""
    monkeypatch.setenv("RANK", "1")
    assert "--method" in train_ends(capsys, 0, "--help").out


def test_a_device_that_is_none_is_not_blamed_on_the_meeting(monkeypatch, capsys):
    """Under torchrun, too, the sentence is about --device."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(int(name == "WORLD_SIZE")))
    said = train_ends(capsys, 2, *FOUR_STEPS, "--device", "gpu").err
    assert "--device gpu" in said and "did not meet" not in said


def alone(argv, seconds):
    """train.main of a process whose fellows never come."""
    common.PATIENCE = common.timedelta(seconds=seconds)
    return train.main(argv)


@pytest.mark.parametrize("taken", [False, True], ids=["nobody comes", "port taken"])
def test_processes_that_do_not_meet_say_so(taken, tmp_path):
    """After the stated patience, or at once, with exit code 1, and none is left."""
    with socket.socket() as held:
        held.bind(("localhost", 0))
        port = str(held.getsockname()[1])
        if taken:
            held.listen()
        else:
            held.close()
        argv = [*FOUR_STEPS, "--out", str(tmp_path / "run")]
        process = child(alone, argv, 1, output=tmp_path / "said", RANK="0",
                        LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost",
                        MASTER_PORT=port)
        assert ended([process], seconds=40) == [1]
    said = (tmp_path / "said").read_text()
    assert "did not meet" in said and f"MASTER_PORT={port}" in said, said
    assert "Traceback" not in said


def test_what_torch_says_of_a_machine_becomes_advice(tmp_path):
    """A stuck process is told from a dead one, a small /dev/shm from little memory."""
    run = train.start_run(train.parse([*FOUR_STEPS, "--out", str(tmp_path)]))
    run.world = 2
    for said, advice in (("Timed out waiting 600000ms for recv", "for 0:10:00"),
                         ("DataLoader worker (pid 7) is killed by signal: Killed.",
                          "loader process was killed"),
                         ("Caught RuntimeError in DataLoader worker process 0.\nDefault"
                          "CPUAllocator: can't allocate memory", "was killed"),
                         ("unable to open shared memory object </torch_42_7_0> in "
                          "read-write mode: Too many open files (24)", "ulimit -n"),
                         ("Connection closed by peer", "has ended"),
                         # Docker's 64 MB of /dev/shm, in two of torch's voices:
                         ("unable to allocate shared memory(shm)", "--shm-size"),
                         ("unable to write to file </torch_42_7>", "--shm-size")):
        assert advice in train.machine_fault(RuntimeError(said), run)
    assert "ulimit -n" in train.machine_fault(OSError(24, "Too many open files"), run)
    assert train.machine_fault(RuntimeError(
        "Caught RuntimeError in DataLoader worker process 0.\n"
        "File /home/u/torch_env/lib.py: a bug"), run) == "", "a bug has no advice"


def test_advice_on_memory_is_followed_by_no_refusal(tmp_path):
    """Four images make two parts of two; four parts of one batch norm would refuse."""
    run = train.start_run(train.parse([*FOUR_STEPS, "--out", str(tmp_path)]))
    assert "try --accumulate 2, or a smaller" in train.machine_fault(MemoryError(), run)
    run.args.accumulate = 2
    assert "try a smaller" in train.machine_fault(MemoryError(), run)


# --- Files of others -----------------------------------------------------------------


@pytest.mark.parametrize("content, said", [
    (b"", "is damaged, or not a file of torch.save"),
    (b"hello", "is damaged, or not a file of torch.save"),
    ([1, 2], "holds a list, expected a dict"),
    ({"layer": "conv", 3: torch.zeros(2)}, "tensors do not fit")])
def test_weights_that_are_none(content, said, tmp_path):
    """A truncated download, a text, another kind of file: a sentence, nothing run."""
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content,
                                                                            path)
    with pytest.raises(UserError, match=said):
        common.build_model("nrd", 3, backbone="resnet18", weights=str(path))


@pytest.mark.parametrize("change, said", [
    (lambda state: state.pop("method"), "method is None, expected a str"),
    (lambda state: state.update(iteration="4"), "iteration is '4', expected a int"),
    (lambda state: state["palette"].pop(), "each class needs a name and a colour"),
    (lambda state: state["palette"][0].__setitem__(0, 256), "of 3 numbers in 0..255"),
    (lambda state: state["classes"].__setitem__(0, 7), "each class needs a name"),
    (lambda state: state["model"].popitem()[1], ""),
    (lambda state: next(iter(state["model"].values())).fill_(math.nan), "finite")])
def test_a_made_up_checkpoint_is_refused(change, said, stopped, capsys):
    """Its file is whole: its fields, colours and weights are looked at, too."""
    state = load_checkpoint(stopped)
    change(state)
    torch.save(state, stopped / "last.pt")
    with pytest.raises(SystemExit) as stop:
        call_evaluate("score", stopped)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and (said or "weights do not fit nrd") in error, error


def test_options_that_make_no_network(tmp_path, capsys):
    """A negative width has the right name and type, and is refused all the same."""
    said = train_ends(capsys, 2, *TINY, "--set", "hidden_channels=-1", "--out",
                      tmp_path).err
    assert "hidden_channels=-1: must be at least 1" in said


# --- Images and labels of others -----------------------------------------------------


def folder(root, classes=None):
    draw_tree(root, "folder", images=4)
    if classes is not None:
        (root / "classes.txt").write_bytes(classes)
    return root


def test_labels_that_are_all_void_are_seen_before_the_first_step(tmp_path, capsys):
    """A run over them learns nothing, ends well, and has no mIoU."""
    for split in ("train", "val"):
        root = folder(tmp_path / split, b"0 a 1 2 3\n1 b 4 5 6\n2 c 7 8 9\n")
        for mask in (root / split / "masks").iterdir():
            save(mask, np.full((64, 96), 255, np.uint8))
        said = train_ends(capsys, 2, *TINY, "--iterations", 4, "--dataset", "folder",
                          "--data-root", root, "--out", tmp_path / "run")
        assert "all pixels of 4 masks are ignored" in said.err, split


@pytest.mark.parametrize("classes, said", [
    (b"0 a 1 2 3\n1 b 4 5 256\n", "r, g, b in 0..255"),
    (b"0 a 1 2 3\n0 b 4 5 6\n", "once each"),
    (b"0 a 1 2 3\n1 a 4 5 6\n", "other names"), (b"0 1 2 3\n", "other names"),
    (b"", "ids from 0 on"),
    ("0 B\u00e4ume 1 2 3\n".encode("latin-1"), "not UTF-8"),
    ("0 a 1 2 3\n".encode("utf-16"), "not UTF-8"),
    (b"".join(b"%d x 1 2 3\n" % i for i in [*range(255), 256]), "once each")])
def test_a_class_list_is_read_or_explained(classes, said, tmp_path):
    """Before the first image is opened."""
    with pytest.raises(UserError, match=said):
        data.open_dataset("folder", "train", root=str(folder(tmp_path, classes)))


def test_masks_may_have_the_colours_of_the_class_list(tmp_path):
    """RGB masks, as many tools draw them, are ids by classes.txt; others are named."""
    root = folder(tmp_path, b"0 sky 10 20 30\n1 road 40 50 60\n255 void 0 0 0\n")
    colours = np.array([[10, 20, 30], [40, 50, 60], [0, 0, 0]], np.uint8)
    ids = np.arange(64 * 96).reshape(64, 96) % 3
    for split in ("train", "val"):
        for mask in (root / split / "masks").iterdir():
            save(mask, colours[ids])
    dataset = data.open_dataset("folder", "trainval", root=str(root))
    assert dataset.info.classes == ("sky", "road")
    assert np.array_equal(dataset.labels(5).numpy(), np.where(ids == 2, 255, ids))
    save(root / "train/masks/0.png", colours[ids] + np.uint8(ids[..., None] == 1))
    with pytest.raises(UserError, match=r"colour \(41, 51, 61\) \(2048 px\) is none"):
        data.open_dataset("folder", "train", root=str(root)).labels(0)


def test_masks_of_another_name_are_not_a_lost_download(tmp_path):
    """0_mask.png does not belong to 0.jpg by itself, and that is said."""
    root = folder(tmp_path)
    for mask in list((root / "train/masks").iterdir()):
        mask.rename(mask.with_stem(mask.stem + "_mask"))
    with pytest.raises(UserError, match="of one name belong together, and '._mask'"):
        data.open_dataset("folder", "train", root=str(root))


def test_a_turned_photo_beside_its_mask_is_explained(tmp_path, capsys):
    """Cameras turn a picture by a tag, which a program that draws masks may ignore."""
    root, tag = folder(tmp_path), Image.Exif()
    tag[274] = 6
    picture = Image.fromarray(np.zeros((64, 96, 3), np.uint8))
    picture.save(root / "train/images/0.jpg", exif=tag)
    with pytest.raises(UserError, match="turned by its EXIF tag, and its mask is not"):
        data.open_dataset("folder", "train", root=str(root)).load(0)
    tag[274] = 3  # upside down, of the same size: only a look tells
    picture.save(root / "train/images/0.jpg", exif=tag)
    data.check_some(data.open_dataset("folder", "train", root=str(root)))
    assert "1 of 4 images are turned" in capsys.readouterr().err
    root = draw_tree(tmp_path / "published", "ade20k")
    dataset = data.open_dataset("ade20k", "val", root=str(root))
    picture.save(dataset.pairs[0][0], exif=tag)
    data.check_some(dataset)
    assert "images are turned" in capsys.readouterr().err, "of a published set, too"


def test_tiff_and_gif_are_images_and_eps_is_none(tmp_path):
    """Only what is named is tried: for an EPS, PIL would run Ghostscript."""
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    for name in ("a.tif", "b.gif", "c.png"):
        save(tmp_path / name, picture)
    assert len(data.files_in(tmp_path)) == 3
    assert data.read_image(tmp_path / "a.tif").shape == (3, 4, 6)
    (tmp_path / "d.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9")
    with pytest.raises(UserError, match="d.png: not an image .*none of PNG, JPEG"):
        data.read_image(tmp_path / "d.png")


def test_bombs_are_a_sentence(tmp_path, monkeypatch):
    """A few kilobytes that unpack to gigabytes: pixels, or the text beside them."""
    bomb = save(tmp_path / "pixels.png", np.zeros((80, 80), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="pixels.png: .*decompression bomb.*smaller"):
        data.read_image(bomb)
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2**21, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(UserError, match="text.png: unreadable .*too large"):
        data.read_image(tmp_path / "text.png")
