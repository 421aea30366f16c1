"""Several processes are one run: gradients, numbers, signals, and what if one dies."""
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import train
from common import UserError, load_checkpoint, methods
from conftest import (ROOT, TINY, assert_same, call_evaluate, contents, ended, launch,
                      ranks, rows_of, stop_after)

pytestmark = pytest.mark.usefixtures("one_thread", "thin")


def first_gradients(argv, target):
    """Gradients of a run's first batch, norms and dropout frozen; then two real steps.

    The sky is made void: what is left of the images differs by more than twice.
    """
    run = train.start_run(train.parse(list(map(str, argv))))
    images, labels = next(iter(train.training_loader(run)))
    labels[labels == 0] = 255
    run.model.train()
    for module in run.model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout2d)):
            module.eval()
    losses = train.backward(run, images, labels)
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters()
                 if p.grad is not None}
    for _ in range(2):
        train.train_step(run, images, labels)
    if run.rank == 0:
        torch.save({"losses": losses, "gradients": gradients}, target)
    return 0


@pytest.mark.parametrize("method", [*methods(), "dupsampling pretrained"])
def test_two_processes_have_the_gradient_of_one(tmp_path, method):
    """2 processes x 2 images = 1 x 4 = 1 x 2 parts of 2: the mean over valid pixels.

    Each method under DDP, which stops at a parameter without a gradient. (That every
    variant's has one: test_common.py.)
    """
    method, pretrained, _ = method.partition(" ")
    argv = [*TINY, "--method", method, "--iterations", 4]
    argv += ["--pretrain", 2, "--lr", 1e-3] if pretrained else []
    output = tmp_path / "said"
    for name, world, parts in (("one", 1, 1), ("two", 2, 1), ("parts", 1, 2)):
        options = [*argv, "--accumulate", parts, "--out", tmp_path / name]
        processes = ranks(world, first_gradients, options, tmp_path / f"{name}.pt",
                          output=output)
        assert ended(processes) == [0] * world, output.read_text()[-2000:]
    one, two, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True)
                       for name in ("one", "two", "parts"))
    largest = max(g.abs().max() for g in one["gradients"].values())
    for other in (two, parts):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for name, gradient in one["gradients"].items():
            assert (gradient - other["gradients"][name]).abs().max() < 1e-4 * largest, (
                f"{name}: a mean of means?")


def train_ranks(argv, rank_to_stop=None, step=0, number=signal.SIGTERM):
    """train.py as one of several; one may get a signal in the middle of a step."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == str(rank_to_stop):
            stop_after(step, patch, number)
        return train.main(list(map(str, argv)))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    """Four steps by three processes; nobody stops them."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = [*TINY, "--batch", 6, "--iterations", 4, "--eval-every", 2]
    processes = ranks(3, train_ranks, [*settings, "--out", folder / "whole"],
                      output=folder / "said")
    assert ended(processes) == [0, 0, 0], (folder / "said").read_text()[-2000:]
    return folder / "whole", settings


def test_only_the_first_process_talks_and_writes(three_ranks, tmp_path, capsys):
    """One log, one line per step; the mIoU is that of one process, to the digit.

    Each process has running statistics of its own images: rank 0's are everybody's.
    """
    folder, _ = three_ranks
    said = (folder.parent / "said").read_text()
    assert said.count("best mIoU on val") == 1
    assert "6 images per step (command line) = 3 processes x 1 parts x 2" in said
    steps = [row["iteration"] for row in rows_of(folder)]
    assert steps == ["1", "2", "2", "3", "4", "4"]
    call_evaluate("score", folder, "--workers", 0, "--out", tmp_path)
    assert f"mIoU {load_checkpoint(folder)['miou']:.4f}" in capsys.readouterr().out


def test_a_signal_to_one_process_stops_all_after_the_same_step(three_ranks, tmp_path):
    """Exit 143 everywhere, saved once; resumed, the run is the same to the bit.

    Three, because the sum of two gradients does not depend on their order.
    """
    whole, settings = three_ranks
    said, cut = tmp_path / "said", tmp_path / "cut"
    stopped = ranks(3, train_ranks, [*settings, "--out", cut], 1, 3, output=said)
    assert ended(stopped) == [143, 143, 143], said.read_text()[-2000:]
    assert load_checkpoint(cut / "last.pt")["iteration"] == 3
    resumed = ranks(3, train_ranks, ["--resume", cut], output=said)
    assert ended(resumed) == [0, 0, 0], said.read_text()[-2000:]
    assert_same(contents(whole), contents(cut))


def test_more_or_fewer_processes_may_go_on(tmp_path, capsys):
    """Two processes' run, resumed by one: a warning, the same images, the same end."""
    argv = [*TINY, "--iterations", 3, "--save-every", 1, "--out", tmp_path / "run"]
    stopped = ranks(2, train_ranks, argv, 0, 2, signal.SIGINT)
    assert ended(stopped) == [130, 130]
    launch("--resume", tmp_path / "run")
    assert "processes was 2, is 1: batch norm may see other" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run/last.pt")["iteration"] == 3


def test_a_dead_process_ends_the_others(tmp_path):
    """kill -9 of one: the other does not wait forever, and the checkpoint is whole."""
    said, out = tmp_path / "said", tmp_path / "run"
    argv = [*TINY, "--iterations", 500, "--save-every", 1, "--out", out]
    codes = ended(ranks(2, train_ranks, argv, 1, 3, signal.SIGKILL, output=said))
    assert codes == [1, -signal.SIGKILL], "it waits for one that will never come"
    assert "another process of this run has ended" in said.read_text()
    assert load_checkpoint(out / "last.pt")["iteration"] == 2


def train_otherwise(argv, more):
    """train.py as one of two; the second has `more` on its command line."""
    return train.main([*map(str, argv), *(more if os.environ["RANK"] == "1" else [])])


def test_processes_that_were_asked_for_different_things_do_not_start(tmp_path):
    """Two hosts, two command lines: a list of what differs, at once, and no first step.

    Two learning rates would train to the end and be nobody's experiment; two numbers of
    steps would leave one process waiting for the other. What does not change the run
    may differ: hosts have other disks and other cores.
    """
    said, out = tmp_path / "said", tmp_path / "run"
    argv = [*TINY, "--iterations", 4, "--out", out]
    more = ["--lr", "0.5", "--iterations", "3", "--amp", "bf16", "--workers", "1",
            "--log-every", "2"]
    assert ended(ranks(2, train_otherwise, argv, more, output=said)) == [2, 2]
    assert not out.exists(), "the run has begun"
    # Both write into one file, and not always on lines of their own.
    differ = re.findall(r"(\w+): (\S+) in process 0, ([\w.']+) in process 1",
                        said.read_text())
    assert set(differ) == {("amp", "'off'", "'bf16'"), ("iterations", "4", "3"),
                           ("lr", "0.05", "0.5")}


def test_a_folder_that_the_first_process_refuses_all_refuse(tmp_path):
    """One sentence each, and no traceback of those who waited to hear its name."""
    (tmp_path / "best.pt").touch()
    argv = [*TINY, "--iterations", 4, "--out", tmp_path]
    assert ended(ranks(2, train_ranks, argv, output=tmp_path / "said")) == [2, 2]
    said = (tmp_path / "said").read_text()
    assert said.count("holds a run (best.pt)") == 2 and "Traceback" not in said


def test_torchrun_needs_nothing_else_and_passes_the_signal_on(tmp_path):
    """The command of README; SIGTERM to torchrun, as SLURM sends it, saves first."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node", "2", str(ROOT / "train.py"), *TINY, "--iterations", "500",
         "--save-every", "500", "--out", str(out)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "3/500" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "train.py --resume" in said, said[-2000:]
    assert load_checkpoint(out / "last.pt")["iteration"] >= 3


@pytest.mark.parametrize("batch, world, parts, device, says", [
    (16, 4, 1, "cuda", None), (16, 4, 2, "cpu", None), (4, 4, 1, "cuda", None),
    (16, 3, 1, "cuda", "a multiple of 3, 3 or more"),
    (4, 4, 1, "cpu", "a multiple of 4, 8 or more, because batch norm needs two"),
    (8, 1, 8, "cuda", "--accumulate does not help")])
def test_a_batch_must_divide_and_leave_two_images(batch, world, parts, device, says):
    """Batch norm over one image and one position has no variance. SyncBN sees all."""
    check = lambda: train.check_split(batch, world, parts, torch.device(device))
    if says:
        with pytest.raises(UserError, match=says):
            check()
    else:
        check()
