"""Shared by the tests: tiny models, drawn data trees, and the command lines."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SMALL = {"backbone": "resnet18", "channels": 16}


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(*argv, cwd=ROOT, timeout=120) -> subprocess.CompletedProcess:
    """`python ARGV...` in the checkout, output captured as text."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def draw_tree(root: Path, name: str, *, size=(64, 96), images=2, seed=0) -> Path:
    """A small data set in the layout that `name` is distributed in, all ids present."""
    rng = np.random.default_rng(seed)
    ids = {"camvid": range(12), "cityscapes": [*range(34), 255],
           "folder": [0, 1, 2, 255]}
    for split in ("train", "val"):
        for i in range(images):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            blocks = rng.choice(list(ids[name]), (size[0] // 8, size[1] // 8))
            blocks.flat[:len(ids[name])] = list(ids[name])
            mask = np.kron(blocks, np.ones((8, 8))).astype(np.uint8)
            city, stem = "aachen", f"aachen_{i:06d}_000019"
            image_path, mask_path = {
                "camvid": (f"{split}/{i:04d}.png", f"{split}annot/{i:04d}.png"),
                "cityscapes": (f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png",
                               f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"),
                "folder": (f"{split}/images/{i}.jpg", f"{split}/masks/{i}.png"),
            }[name]
            save(root / image_path, image)
            save(root / mask_path, mask)
    return root
