"""Whatever kills a run, nothing is lost: kill -9, damaged files, full disks."""
import errno
import os
import random
import resource
import shutil
import signal
import stat

import pytest
import torch

import common
import train
from common import UserError, load_checkpoint, save_checkpoint
from conftest import (EMPTY, TINY, assert_same, bytes_of, child, contents, ended,
                      flip, launch, make_thin, ranks, stop_after, train_ends)

pytestmark = pytest.mark.usefixtures("one_thread", "thin")

# workers, accumulation, 16 bits: every option that orders the arithmetic differently
SETTINGS = [(workers, parts, amp) for workers in (0, 2) for parts in (1, 2)
            for amp in ("off", "bf16")] + [(0, 1, "fp16")]
QUICK = [(0, 1, "off"), (2, 2, "bf16")]


def setting(workers, parts, amp):
    return [*TINY, "--crop", 32, 64, "--iterations", 12, "--eval-every", 5,
            "--bn-images", 4, "--workers", workers, "--accumulate", parts, "--amp", amp]


@pytest.mark.parametrize("how", [
    pytest.param(how, id="{} workers, {} parts, amp {}".format(*how),
                 marks=() if how in QUICK else pytest.mark.thorough)
    for how in SETTINGS])
def test_resume_is_bit_exact_after_every_step(tmp_path, how, monkeypatch):
    """A run that is stopped after each of its steps is as if it never had been.

    Weights, momentum, batch norm, RNG, the log's rows, and best.pt: to the last bit.
    (Of two settings only after the steps where something else is due before or next.)
    """
    steps = (1, 5, 6, 12) if how in QUICK[1:] else range(1, 13)
    launch(*setting(*how), "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        for step in steps:
            stop_after(step, patch)
            start = ["--resume"] if step > 1 else [*setting(*how), "--out"]
            with pytest.raises(train.Stopped) as stopped:
                launch(*start, tmp_path / "cut")
            assert stopped.value.code == 143
            assert load_checkpoint(tmp_path / "cut/last.pt")["iteration"] == step
    launch("--resume", tmp_path / "cut")  # step 12 is done, its evaluation is not
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "cut"))


# --- kill -9 -------------------------------------------------------------------------


def die_at(moment):
    """SIGKILL to oneself at that call of those that a checkpoint is written with."""
    calls = iter(range(1, 10**6))

    def dying(function):
        def wrapped(*args, **options):
            if next(calls) == moment:
                if function is torch_save:
                    args[1].write(b"PK half a checkpoint")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return wrapped
    torch_save = torch.save
    torch.save, common.load_checkpoint = dying(torch.save), dying(load_checkpoint)
    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


def go_on(folder, settings, moment=None):
    """Begin the run, or resume it if there is anything to resume."""
    saved = any((folder / name).exists() for name in ("last.pt", "prev.pt"))
    if moment:
        die_at(moment)
    return train.main(list(map(str, ["--resume", folder] if saved else
                               [*settings, "--out", folder])))


def finished(folder, settings):
    """How a run ends that nobody kills, as a child: killed ones have its threads."""
    process = child(go_on, folder, settings, output=folder.parent / "said")
    process.join(240)
    assert process.exitcode == 0, (folder.parent / "said").read_text()[-2000:]
    return contents(folder)


def test_kill_9_inside_a_write_loses_nothing(tmp_path):
    """Killed at each call that a save is made of, again and again: the same run.

    Half a file, a file not flushed, not verified, renamed or not: 14 kills in a row. A
    run begins with call 1 for its log, 2 to 7 for its first last.pt and the log again;
    going on, 2 and 3 are rows of the log, 4 to 8 are best.pt, 9 to 15 are last.pt.
    """
    settings = [*TINY, "--iterations", 3, "--eval-every", 1]
    whole = finished(tmp_path / "whole", settings)
    for moment in (2, 5, 7, *range(4, 15)):
        process = child(go_on, tmp_path / "cut", settings, moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"not killed at {moment}"
    assert_same(whole, finished(tmp_path / "cut", settings))
    assert not list((tmp_path / "cut").glob("*.tmp"))


def started(world, folder, settings):
    """The processes of one run, on their way."""
    output = folder.parent / "said"
    if world == 1:
        return [child(go_on, folder, settings, output=output)]
    return ranks(world, go_on, folder, settings, output=output)


@pytest.mark.thorough
@pytest.mark.parametrize("world, workers, parts, amp", [
    (1, 0, 1, "off"), (1, 2, 2, "bf16"), (2, 0, 1, "off"), (2, 2, 1, "bf16")])
def test_kill_9_at_random_moments_loses_nothing(tmp_path, world, workers, parts, amp):
    """25 kills in each of four settings, of one process of two or of both at once."""
    settings = [*TINY, "--iterations", 240, "--eval-every", 90, "--save-every", 2,
                "--workers", workers, "--accumulate", parts, "--amp", amp]
    for process in started(world, tmp_path / "whole", settings):
        process.join(600)
    whole, dice, killed = contents(tmp_path / "whole"), random.Random(0), 0
    for _ in range(25):
        processes = started(world, tmp_path / "cut", settings)
        processes[0].join(dice.uniform(0.4, 1.4) * world)
        for process in dice.choice([processes, processes[:1], processes[-1:]]):
            process.kill()
        codes = ended(processes)  # who is not killed ends by itself
        assert None not in codes, "a process outlives the others"
        killed += -signal.SIGKILL in codes
    assert killed > 12, f"only {killed} of 25 were killed in time"
    last = ended(started(world, tmp_path / "cut", settings), seconds=600)
    said = (tmp_path / "said").read_text()[-2000:]
    assert set(last) == {0} or "is finished" in said, said
    assert_same(whole, contents(tmp_path / "cut"))


# --- Damaged files and full disks ----------------------------------------------------


def cut_to(share):
    def cut(path):
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return cut


@pytest.fixture(scope="module")
def undamaged(stopped_original, tmp_path_factory):
    """How that run ends if nothing is wrong with its files."""
    folder = shutil.copytree(stopped_original, tmp_path_factory.mktemp("un") / "run")
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        launch("--resume", folder)
    return contents(folder)


DAMAGE = {"empty": cut_to(0), "10 %": cut_to(.1), "half": cut_to(.5),
          "99 %": cut_to(.99), "one bit": flip, "gone": os.remove}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, stopped, undamaged,
                                                          monkeypatch, capsys):
    """A sentence, and from prev.pt to the same end as if nothing had happened.

    The damaged file does not become prev.pt at the next save: that is still needed.
    """
    DAMAGE[how](stopped / "last.pt")
    with monkeypatch.context() as patch, pytest.raises(train.Stopped):
        stop_after(2, patch)
        launch("--resume", stopped)
    said = capsys.readouterr()
    assert "going on from prev.pt" in said.err and "at iteration 1" in said.out
    assert load_checkpoint(stopped / "prev.pt")["iteration"] == 1
    launch("--resume", stopped)
    assert_same(undamaged, contents(stopped))


def test_one_bit_of_a_header_is_damage_like_any_other(written):
    """Names, sizes, flags of the parts of the file: zipfile fails in many ways."""
    whole = written.read_bytes()
    for place in (*range(60), *range(len(whole) - 400, len(whole))):
        for bit in (1, 64):
            content = bytearray(whole)
            content[place] ^= bit
            written.write_bytes(content)
            try:
                same = load_checkpoint(written)["x"].eq(1).all()
                assert same, "other weights, without a word"
            except common.Damaged:
                pass


@pytest.mark.parametrize("how", ["half", "gone"])
def test_two_damaged_checkpoints_are_an_error_and_stay(how, stopped, capsys):
    """Exit 2, both are named, and every file is as before: somebody may rescue it."""
    for name in ("last.pt", "prev.pt"):
        DAMAGE[how](stopped / name)
    before = bytes_of(stopped)
    said = train_ends(capsys, 2, "--resume", stopped).err
    assert "last.pt" in said and "prev.pt" in said
    assert bytes_of(stopped) == before


def fill_the_disk_after_two(argv):
    """From step 3 on no file can grow beyond 1 MB: what a full disk is to a writer."""
    schedule = train.learning_rate

    def full(iteration, *rest):
        if iteration == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        return schedule(iteration, *rest)
    train.learning_rate = full
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return train.main(list(map(str, argv)))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    """Exit 4, the space that is needed and the space there is; then --resume works."""
    out, said = tmp_path / "run", tmp_path / "said"
    argv = [*TINY, "--iterations", 4, "--save-every", 1, "--log-every", 9, "--out", out]
    process = child(fill_the_disk_after_two, argv, output=said)
    process.join(60)
    assert process.exitcode == 4, said.read_text()[-2000:]
    assert load_checkpoint(out / "last.pt")["iteration"] == 2
    assert not (out / "last.tmp").exists(), "rubbish where there is no room"
    launch("--resume", out)


@pytest.fixture
def written(tmp_path):
    """A checkpoint that is there before another one is to take its place."""
    save_checkpoint(EMPTY | {"x": torch.ones(3000)}, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_an_interrupted_write_keeps_the_old_checkpoint(written, monkeypatch):
    """An error in the middle of torch.save: old file byte for byte, no rubbish left."""
    before = bytes_of(written.parent)

    def half(state, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match="disk full.*older .* is untouched") as error:
        save_checkpoint(EMPTY | {"x": torch.zeros(3000)}, written)
    assert error.value.code == 4, "storage"
    assert bytes_of(written.parent) == before


def test_what_was_written_is_read_back(written, monkeypatch):
    """A disk that stores something else is noticed before the old file is replaced."""
    reach = os.fsync

    def other(file):
        reach(file)
        flip(written.with_suffix(".tmp"))
    monkeypatch.setattr(os, "fsync", other)
    with pytest.raises(UserError, match="does not fit its checksums"):
        save_checkpoint(EMPTY | {"x": torch.zeros(3000)}, written)
    assert load_checkpoint(written)["x"].min() == 1


def test_a_folder_that_cannot_be_flushed_is_no_reason_to_stop(written, monkeypatch):
    """Some network drives refuse to flush a folder; the file itself is flushed.

    And nothing is kept open: a run saves more often than a process may open files.
    """
    flush, folders = os.fsync, []

    def refusing(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            folders.append(file)
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(file)
    monkeypatch.setattr(os, "fsync", refusing)
    save_checkpoint(EMPTY | {"x": torch.zeros(3000)}, written)
    assert load_checkpoint(written)["x"].max() == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(*folders)
