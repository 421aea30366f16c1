"""Whatever kills a run, nothing is lost: signals, kill -9, damaged files, full disks."""
import csv
import os
import random
import signal
import time

import pytest
import torch

import train
from common import UserError
from conftest import TINY, child
from evaluate import load_checkpoint


def launch(*argv):
    """train.py inside this process; the last mIoU."""
    return train.train(train.parse(list(map(str, argv))))


def contents(folder):
    """All that a run is made of, without what a clock or a version says."""
    columns = ("iteration", "lr", "loss", "out", "aux", "miou", "pixel_accuracy")
    with open(folder / "log.csv", newline="") as file:
        rows = [[row[name] for name in columns] for row in csv.DictReader(file)]
    states = [load_checkpoint(folder / name) for name in ("last.pt", "best.pt")]
    for state in states:
        del state["args"], state["versions"], state["data_root"]
    return {"log": rows, "last": states[0], "best": states[1]}


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


def stop_after(step, monkeypatch, number=signal.SIGTERM):
    """From now on a run gets a real signal in the middle of that step."""
    schedule = train.learning_rate

    def signalled(iteration, *rest):
        if iteration + 1 == step:
            os.kill(os.getpid(), number)
        return schedule(iteration, *rest)
    monkeypatch.setattr(train, "learning_rate", signalled)


# workers, accumulation, 16 bits: every option that orders the arithmetic differently
SETTINGS = [(workers, parts, amp) for workers in (0, 2) for parts in (1, 2)
            for amp in ("off", "bf16")]
QUICK = [(0, 1, "off"), (2, 2, "bf16")]


def setting(workers, parts, amp):
    return [*TINY, "--iterations", 12, "--eval-every", 5, "--bn-images", 4,
            "--workers", workers, "--accumulate", parts, "--amp", amp]


@pytest.mark.parametrize("how", [
    pytest.param(how, id="{} workers, {} parts, amp {}".format(*how),
                 marks=() if how in QUICK else pytest.mark.thorough)
    for how in SETTINGS])
def test_resume_is_bit_exact_after_every_step(tmp_path, how, thin, monkeypatch):
    """A run that is stopped after each of its steps is the run that never was.

    Weights, momentum, batch norm, RNG, the log's rows, and best.pt: to the last bit.
    """
    launch(*setting(*how), "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        for step in range(1, 13):
            stop_after(step, patch)
            start = ["--resume"] if step > 1 else [*setting(*how), "--out"]
            with pytest.raises(train.Stopped) as stopped:
                launch(*start, tmp_path / "cut")
            assert stopped.value.code == 143
            assert load_checkpoint(tmp_path / "cut/last.pt")["iteration"] == step
    launch("--resume", tmp_path / "cut")  # step 12 is done, its evaluation is not
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "cut"))
