"""--jobs: several processes share the test files, and nothing is lost or done twice."""
from conftest import run

CONFTEST = '''
import sharing
from sharing import pytest_runtestloop

def pytest_addoption(parser):
    sharing.add_options(parser)
'''
FILE = '''
import os
import time

import pytest


@pytest.mark.parametrize("i", range(3))
def test_one(i):
    with open({log!r}, "a") as file:
        file.write(f"{name} {{i}} {{os.getpid()}}\\n")
    {last}

def wait_for_the_other():
    while len({{line.split()[2] for line in open({log!r})}}) < 2:
        time.sleep(0.05)
'''
WAIT = "wait_for_the_other()"


def make_tests(folder, lasts):
    (folder / "conftest.py").write_text(CONFTEST)
    for name, last in lasts.items():
        text = FILE.format(log=str(folder / "log"), name=name, last=last)
        (folder / f"test_{name}.py").write_text(text)
    return run("-m", "pytest", "-q", "--jobs", 2, "-p", "no:cacheprovider", cwd=folder)


def test_every_test_runs_once_and_every_failure_is_reported(tmp_path):
    """Whoever runs a test, the first process counts it and shows why it failed."""
    wrong = "assert i != 1, 'one is wrong'"
    done = make_tests(tmp_path, {"a": WAIT, "b": wrong, "c": wrong, "d": ""})
    assert "2 failed, 10 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("one is wrong") >= 2 and done.returncode == 1
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({(file, i) for file, i, _ in lines}) == len(lines) == 12
    whose = {file: {pid for name, _, pid in lines if name == file} for file in "abcd"}
    assert all(len(pids) == 1 for pids in whose.values()), "a file has been divided"
    assert len(set.union(*whose.values())) == 2, "one process has done all the work"


def test_a_process_that_dies_is_no_success(tmp_path):
    """What it had taken was not run: the whole must not look green."""
    done = make_tests(tmp_path, {"a": WAIT, "b": "os._exit(7)"})
    assert done.returncode != 0 and "ended with [7]" in done.stdout, done.stdout
