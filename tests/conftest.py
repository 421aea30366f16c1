"""Shared by the tests: tiny models, drawn data trees, runs, processes, commands."""
import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

# In networks as small as these, threads spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.models import resnet  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402 (they are found by the line above)
import evaluate  # noqa: E402
import sharing  # noqa: E402
import train  # noqa: E402
from common import FIELDS, FORMAT, load_checkpoint  # noqa: E402
from sharing import pytest_runtestloop  # noqa: E402, F401 (a hook of pytest's)


def voc_colour(label: int) -> list[int]:
    """VOC's palette by its loop: three bits of the id at a time, highest bit first."""
    colour = [0, 0, 0]
    for bit in (7, 6, 5):
        for channel in range(3):
            colour[channel] |= (label >> channel & 1) << bit
        label >>= 3
    return colour


VOC_COLOURS = sum(map(voc_colour, range(256)), [])
# The fields of a checkpoint, all of them empty.
EMPTY = {name: kind() for name, kind in FIELDS.items()}
EMPTY |= {"format": FORMAT, "mean": [0.0] * 3, "std": [1.0] * 3}
SMALL = {"backbone": "resnet18", "channels": 16}
# A run of seconds: python train.py *TINY, best with the `thin` network on few images.
TINY = ["--batch", "4", "--crop", "64", "96", "--set", "channels=16", "--workers", "0",
        "--log-every", "1", "--warmup", "2"]
# Four steps of it, on crops that are still smaller.
FOUR_STEPS = [*TINY, "--crop", "32", "64", "--iterations", "4", "--eval-every", "4"]


def pytest_addoption(parser):
    sharing.add_options(parser)
    parser.addoption("--thorough", action="store_true",
                     help="all combinations, 50 kills: minutes instead of seconds")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support")
    config.addinivalue_line("markers", "thorough: run by --thorough only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def thin_resnet(name, weights=None):
    """A ResNet of one narrow block per stage: the same code, 18 times fewer weights."""
    net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    net.inplanes = 8
    net.conv1 = torch.nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    net.bn1 = torch.nn.BatchNorm2d(8)
    for i in range(4):
        stage = net._make_layer(resnet.BasicBlock, 8 * 2**i, 1, stride=1 + (i > 0))
        setattr(net, f"layer{i + 1}", stage)
    return net


# Thin networks, six images to train on and two to validate on, each drawn only once, no
# pictures at the end.
THIN = {"torchvision.models.get_model": thin_resnet,
        "data.Streets.sizes": {"train": 6, "val": 2},
        "data.draw_street": cache(data.draw_street),
        "train.draw_curves": lambda *_: None,
        "train.sample_sheet": lambda *_, **__: None}


def make_thin(patch):
    for name, value in THIN.items():
        patch.setattr(name, value)


@pytest.fixture
def thin(monkeypatch):
    make_thin(monkeypatch)


@pytest.fixture(scope="module")
def one_thread():
    """More are slower for so small networks, and a child has one, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- Processes -----------------------------------------------------------------------

# They are forked from one that has already imported torch and train: they start in no
# time, can be killed, and can be several ranks of one run.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "conftest"])


def in_child(function, arguments, environment, output, thin):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loaders: as in a usual run
    if thin:
        make_thin(pytest.MonkeyPatch())
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))


def child(function, *arguments, output=os.devnull, thin=True, **environment):
    """A started process that runs function(*arguments), with thin networks."""
    process = FORKS.Process(target=in_child,
                            args=(function, arguments, environment, output, thin))
    process.start()
    return process


def ranks(world, function, *arguments, output=os.devnull, thin=True):
    """`world` processes as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [child(function, *arguments, output=output, thin=thin, RANK=str(rank),
                  LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                  LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                  MASTER_PORT=port) for rank in range(world)]


def ended(processes, seconds=60):
    """The exit codes, once all have ended or the time is up."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(*argv, cwd=ROOT, timeout=120) -> subprocess.CompletedProcess:
    """`python ARGV...` in the checkout, output captured as text."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True)


# --- Runs ----------------------------------------------------------------------------


def launch(*argv):
    """train.py inside this process; the last mIoU."""
    return train.train(train.parse(list(map(str, argv))))


def launch_on_few(sizes: dict, *argv):
    """The same with the thin network, on so many streets: {"train": 2, "val": 1}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.get_model", thin_resnet)
        patch.setattr("data.Streets.sizes", sizes)
        return launch("--batch", 2, "--crop", 64, 96, "--set", "channels=16",
                      "--warmup", 0, "--workers", 0, *argv)


def call_evaluate(*argv):
    """evaluate.py inside this process."""
    return evaluate.main(list(map(str, argv)))


def train_ends(capsys, code, *argv):
    """train.py must end with this exit code, without a traceback; what it said."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, argv)))
    said = capsys.readouterr()
    assert stop.value.code == code, f"exit code {stop.value.code}: {said.err}"
    assert "Traceback" not in said.err
    return said


def stop_after(step, patch, number=signal.SIGTERM):
    """From now on a run gets a real signal in the middle of that step."""
    schedule = train.learning_rate

    def signalled(iteration, *rest):
        if iteration + 1 == step:
            os.kill(os.getpid(), number)
        return schedule(iteration, *rest)
    patch.setattr(train, "learning_rate", signalled)


@pytest.fixture(scope="session")
def stopped_original(tmp_path_factory):
    """A run that was stopped after the second of its four steps, with all its files."""
    folder = tmp_path_factory.mktemp("original") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(train.Stopped):
        make_thin(patch)
        stop_after(2, patch)
        launch(*FOUR_STEPS, "--eval-every", 1, "--out", folder)
    return folder


@pytest.fixture
def stopped(stopped_original, tmp_path):
    """A copy of that run to do anything with."""
    return shutil.copytree(stopped_original, tmp_path / "stopped")


def rows_of(folder) -> list[dict]:
    """The rows of a run's log.csv."""
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path):
    """One bit, in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def contents(folder):
    """All that a run is made of, without what a clock or the machine says."""
    def repeatable(rows):
        columns = ("iteration", "lr", "loss", "out", "aux", "miou", "pixel_accuracy")
        return [[row.get(name, "") for name in columns] for row in rows]
    states = [load_checkpoint(folder / name) for name in ("last.pt", "best.pt")]
    for state in states:
        del state["args"], state["environment"], state["data_root"]
        state["log"] = repeatable(state["log"])
    return {"log": repeatable(rows_of(folder)), "last": states[0], "best": states[1]}


def assert_same(a, b, where=""):
    """Equal to the last bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{where}: {set(a) ^ set(b)}"
        for name in a:
            assert_same(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a} and {b}"


# --- Data sets on disk ---------------------------------------------------------------


def save(path: Path, array: np.ndarray, *, palette=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:  # the ids stay, the mode becomes P
        image.putpalette(palette)
    image.save(path)
    return path


VOC, CONTEXT = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010"
RAW_IDS = {"camvid": range(12), "cityscapes": [*range(34), 255],
           "folder": [0, 1, 2, 255], "voc": [*range(21), 255],
           "voc-aug": [*range(21), 255], "ade20k": range(151),
           "coco-voc": [*range(21), 255], "mapillary": range(66),
           "context59": range(60), "context60": range(60)}


def tree_files(name: str, split: str, i: int) -> tuple[str, str, str]:
    """Where a data set as distributed has image i, its mask, and the split's list."""
    folder = {"train": "training", "val": "validation"}.get(split)
    city = {"train": "aachen", "val": "frankfurt", "test": "berlin"}[split]
    number = i + {"train": 0, "val": 1000, "test": 2000}[split]
    stem = {"camvid": f"{i:04d}", "cityscapes": f"{city}_{i:06d}_000019",
            "folder": f"{i}", "voc": f"2007_{number + 32:06d}",
            "voc-aug": f"2007_{number + 32:06d}", "ade20k": f"ADE_{split}_{i + 1:08d}",
            "mapillary": f"{split}_{i:018d}"}.get(name, f"2008_{number + 2:06d}")
    aug = ("Aug", "train_aug") if (name, split) == ("voc-aug", "train") else ("", split)
    voc = (f"{VOC}/JPEGImages/{stem}.jpg",
           f"{VOC}/SegmentationClass{aug[0]}/{stem}.png",
           f"{VOC}/ImageSets/Segmentation/{aug[1]}.txt")
    context = (f"{CONTEXT}/JPEGImages/{stem}.jpg",
               f"{CONTEXT}/SegmentationClassContext/{stem}.png",
               f"{CONTEXT}/ImageSets/SegmentationContext/{split}.txt")
    ade = f"images/{folder}" if folder else "release_test/testing"
    return {
        "camvid": (f"{split}/{stem}.png", f"{split}annot/{stem}.png", ""),
        "cityscapes": (f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png",
                       f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", ""),
        "folder": (f"{split}/images/{stem}.jpg", f"{split}/masks/{stem}.png", ""),
        "voc": voc, "voc-aug": voc, "context59": context, "context60": context,
        "ade20k": (f"{ade}/{stem}.jpg", f"annotations/{folder}/{stem}.png", ""),
        "coco-voc": (f"{split}2017/{i:012d}.jpg",
                     f"annotations/instances_{split}2017.json", ""),
        "mapillary": (f"{folder}/images/{stem}.jpg", f"{folder}/labels/{stem}.png", ""),
    }[name]


# COCO's ids of VOC's classes in VOC's order, and of two more.
COCO_IDS = {
    "airplane": 5, "bicycle": 2, "bird": 16, "boat": 9, "bottle": 44, "bus": 6,
    "car": 3, "cat": 17, "chair": 62, "cow": 21, "dining table": 67, "dog": 18,
    "horse": 19, "motorcycle": 4, "person": 1, "potted plant": 64, "sheep": 20,
    "couch": 63, "train": 7, "tv": 72, "bear": 23, "cup": 47}


def box(x0, y0, x1, y1) -> list:
    """A rectangle as COCO's outline."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def thing(name: str, *polygons, area=1000, iscrowd=0, runs=None) -> dict:
    """One of COCO's annotations: an object's category, and where it is."""
    return {"category_id": COCO_IDS[name], "area": area, "iscrowd": iscrowd,
            "segmentation": runs or list(polygons)}


def all_objects(size) -> list[dict]:
    """An object of each class beside the other, and a crowd."""
    steps = range(0, size[1] // 8 * (size[0] // 8))
    corners = [(8 * (i % (size[1] // 8)), 8 * (i // (size[1] // 8))) for i in steps]
    objects = [thing(name, box(x, y, x + 8, y + 8))
               for name, (x, y) in zip(COCO_IDS, corners)]
    height, width = size
    crowd = {"size": [height, width], "counts": [height * (width - 8), height * 8]}
    return [*objects, thing("person", iscrowd=1, runs=crowd)]


def draw_coco(root: Path, split: str, objects: list[list[dict]], *, size=(64, 96),
              seed=0) -> Path:
    """COCO's images and annotations, `objects` being those of each image."""
    rng, annotations, images = np.random.default_rng(seed), [], []
    for i, present in enumerate(objects):
        image, listed, _ = (root / part for part in tree_files("coco-voc", split, i))
        save(image, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        images.append({"id": 100 + i, "file_name": image.name, "height": size[0],
                       "width": size[1]})
        annotations += [{"image_id": 100 + i, **each} for each in present]
    categories = [{"id": number, "name": name} for name, number in COCO_IDS.items()]
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(json.dumps({"images": images, "annotations": annotations,
                                  "categories": categories}))
    return root


def draw_tree(root: Path, name: str, *, size=(64, 96), images=2, seed=0,
              splits=("train", "val")) -> Path:
    """A small data set in the layout that `name` is distributed in, all ids present."""
    if name == "coco-voc":
        for split in splits:
            draw_coco(root, split, [all_objects(size)] * images, size=size, seed=seed)
        return root
    rng, ids = np.random.default_rng(seed), list(RAW_IDS[name])
    cell = 8 if len(ids) <= size[0] * size[1] // 64 else 4
    for split, i in [(split, i) for split in splits for i in range(images)]:
        image, mask, listed = (root / part for part in tree_files(name, split, i))
        save(image, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        blocks = rng.choice(ids, (size[0] // cell, size[1] // cell))
        blocks.flat[:len(ids)] = ids
        raw = np.kron(blocks, np.ones((cell, cell))).astype(np.uint8)
        is_palette = "SegmentationClass/" in str(mask) or name == "mapillary"
        if split != "test" or name in ("camvid", "folder"):
            save(mask, raw, palette=VOC_COLOURS if is_palette else None)
        elif name == "cityscapes":  # dummies, as distributed
            save(mask, np.zeros(size, np.uint8))
        if listed != root:
            listed.parent.mkdir(parents=True, exist_ok=True)
            line = (f"/JPEGImages/{image.name} /SegmentationClassAug/{mask.name}"
                    if listed.stem == "train_aug" else image.stem)
            listed.write_text((listed.read_text() if i else "") + line + "\n")
    if name == "voc-aug":  # it stands beside VOC's own masks
        (root / VOC / "SegmentationClass").mkdir(exist_ok=True)
    return root
