"""Whatever kills a run, nothing is lost: kill -9, damaged files, full disks."""
import csv
import os
import random
import resource
import signal

import pytest
import torch

import train
from conftest import TINY, child
from evaluate import load_checkpoint


def launch(*argv):
    """train.py inside this process; the last mIoU."""
    return train.train(train.parse(list(map(str, argv))))


def contents(folder):
    """All that a run is made of, without what a clock or the machine says."""
    columns = ("iteration", "lr", "loss", "out", "aux", "miou", "pixel_accuracy")
    with open(folder / "log.csv", newline="") as file:
        rows = [[row[name] for name in columns] for row in csv.DictReader(file)]
    states = [load_checkpoint(folder / name) for name in ("last.pt", "best.pt")]
    for state in states:
        del state["args"], state["environment"], state["data_root"]
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
            for amp in ("off", "bf16")] + [(0, 1, "fp16")]
QUICK = [(0, 1, "off"), (2, 2, "bf16"), (0, 1, "fp16")]


def setting(workers, parts, amp):
    return [*TINY, "--iterations", 12, "--eval-every", 5, "--bn-images", 4,
            "--workers", workers, "--accumulate", parts, "--amp", amp]


@pytest.mark.parametrize("how", [
    pytest.param(how, id="{} workers, {} parts, amp {}".format(*how),
                 marks=() if how in QUICK else pytest.mark.thorough)
    for how in SETTINGS])
def test_resume_is_bit_exact_after_every_step(tmp_path, how, thin, monkeypatch):
    """A run that is stopped after each of its steps is as if it never had been.

    Weights, momentum, batch norm, RNG, the log's rows, and best.pt: to the last bit.
    """
    launch(*setting(*how), "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        for step in range(1, 13) if how[2] != "fp16" else (1, 7, 12):
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
    torch.save, train.load_checkpoint = dying(torch.save), dying(train.load_checkpoint)
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

    Half a file, a file not flushed, not verified, renamed or not: 11 kills in a row.
    """
    settings = [*TINY, "--iterations", 5, "--eval-every", 2, "--save-every", 1]
    whole = finished(tmp_path / "whole", settings)
    for moment in range(1, 12):
        process = child(go_on, tmp_path / "cut", settings, moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"not killed at {moment}"
    assert_same(whole, finished(tmp_path / "cut", settings))
    assert not list((tmp_path / "cut").glob("*.tmp"))


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.thorough)])
def test_kill_9_at_random_moments_loses_nothing(tmp_path, kills):
    settings = [*TINY, "--iterations", 8 * kills, "--eval-every", 3 * kills,
                "--save-every", 2, "--workers", 1]
    whole = finished(tmp_path / "whole", settings)
    dice, killed = random.Random(0), 0
    for _ in range(kills):
        process = child(go_on, tmp_path / "cut", settings)
        process.join(dice.uniform(0.3, 1.0))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed > kills / 2, f"only {killed} of {kills} were killed in time"
    if not (tmp_path / "cut").exists() or not list((tmp_path / "cut").glob("*.pt")):
        pytest.fail("no run of them got so far as to save")
    try:
        assert_same(whole, finished(tmp_path / "cut", settings))
    except AssertionError as error:
        assert "is finished" in str(error)  # before the last kill
        assert_same(whole, contents(tmp_path / "cut"))


# --- Damaged files and full disks ----------------------------------------------------


def flip(path):
    """One bit, in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_to(share):
    def cut(path):
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return cut


@pytest.fixture
def stopped_run(tmp_path, thin, monkeypatch):
    """A run that was stopped after step 3 of 4, with a save after each step."""
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(train.Stopped):
            launch(*TINY, "--iterations", 4, "--eval-every", 4, "--save-every", 1,
                   "--out", tmp_path / "run")
    return tmp_path / "run"


def copy(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


DAMAGE = {"empty": cut_to(0), "10 %": cut_to(.1), "half": cut_to(.5),
          "99 %": cut_to(.99), "one bit": flip, "gone": os.remove}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped_run, tmp_path, how,
                                                          monkeypatch, capsys):
    """A sentence, and from prev.pt to the same end as if nothing had happened.

    The damaged file does not become prev.pt at the next save: that is still needed.
    """
    whole, hurt = (copy(stopped_run, tmp_path / name) for name in ("whole", "hurt"))
    DAMAGE[how](hurt / "last.pt")
    launch("--resume", whole)
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(train.Stopped):
        stop_after(3, patch)
        launch("--resume", hurt)
    said = capsys.readouterr()
    assert "going on from prev.pt" in said.err and "at iteration 2" in said.out
    assert load_checkpoint(hurt / "prev.pt")["iteration"] == 2
    launch("--resume", hurt)
    assert_same(contents(whole), contents(hurt))


@pytest.mark.parametrize("how", DAMAGE)
def test_two_damaged_checkpoints_are_an_error_and_stay(stopped_run, tmp_path, how,
                                                       capsys):
    """Exit 2, both are named, and every file is as before: somebody may rescue it."""
    hurt = copy(stopped_run, tmp_path / "hurt")
    for name in ("last.pt", "prev.pt"):
        DAMAGE[how](hurt / name)
    before = {file: file.read_bytes() for file in hurt.iterdir()}
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(hurt)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "last.pt" in said and "prev.pt" in said
    assert before == {file: file.read_bytes() for file in hurt.iterdir()}


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


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, thin):
    """Exit 4, the space that is needed and the space there is; then --resume works."""
    out, said = tmp_path / "run", tmp_path / "said"
    argv = [*TINY, "--iterations", 4, "--save-every", 1, "--log-every", 9, "--out", out]
    process = child(fill_the_disk_after_two, argv, output=said)
    process.join(60)
    assert process.exitcode == 4, said.read_text()[-2000:]
    assert load_checkpoint(out / "last.pt")["iteration"] == 2
    assert not (out / "last.tmp").exists(), "rubbish where there is no room"
    launch("--resume", out)


def test_an_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """An error in the middle of torch.save: old file byte for byte, no rubbish left."""
    path = tmp_path / "last.pt"
    train.save_checkpoint({"format": train.FORMAT, "x": torch.ones(3)}, path)
    before = path.read_bytes()

    def half(state, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(train.StorageError, match="disk full.*older .* is untouched"):
        train.save_checkpoint({"format": train.FORMAT, "x": torch.zeros(3)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    """A disk that stores something else is noticed before the old file is replaced."""
    path, written = tmp_path / "last.pt", torch.save
    train.save_checkpoint({"format": train.FORMAT, "x": torch.ones(3)}, path)
    monkeypatch.setattr(torch, "save", lambda state, file: written(
        state | {"x": torch.tensor([1., 1., 2.])}, file))
    with pytest.raises(train.StorageError, match="does not fit its checksum"):
        train.save_checkpoint({"format": train.FORMAT, "x": torch.ones(3)}, path)
    assert load_checkpoint(path)["x"].tolist() == [1, 1, 1]
