"""`python -m pytest --jobs 2`: several processes share the test files.

Each takes the next file that no other has taken yet, so that what a file's tests have
in common is made once. The first process then reports what the others have found.
"""
import json
import os
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pytest


def add_options(parser) -> None:
    group = parser.getgroup("sharing")
    group.addoption("--jobs", type=int, default=1,
                    help="processes that share the test files (1)")
    group.addoption("--shared", metavar="FOLDER", help="for these processes only")


def pytest_runtestloop(session):
    """In the place of pytest's own loop, if the work is to be shared."""
    shared = session.config.getoption("--shared")
    jobs = session.config.getoption("--jobs")
    if shared:
        with open(Path(shared) / f"{os.getpid()}.reports", "w") as file:
            session.config.pluginmanager.register(Reports(session.config, file))
            run_items(session, Path(shared))
        return True
    if jobs < 2 or session.config.option.collectonly:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest",
                   *session.config.invocation_params.args, f"--shared={folder}"]
        others = [subprocess.Popen(command, stdout=subprocess.DEVNULL)
                  for _ in range(jobs - 1)]
        try:
            run_items(session, Path(folder))
            codes = [other.wait() for other in others]
        finally:
            for other in others:
                other.kill()
        for path in Path(folder).glob("*.reports"):
            report_all(session.config, path)
    if not set(codes) <= {0, 1}:  # 1: tests have failed, and are among the reports
        pytest.exit(f"processes that shared the tests ended with {codes}", 1)
    return True


def run_items(session, folder: Path) -> None:
    """As pytest does it, but for the files that others have taken."""
    items = items_of_taken_files(session, folder)
    item = next(items, None)
    while item:
        following = next(items, None)  # what both need is not torn down in between
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        item = following


def items_of_taken_files(session, folder: Path):
    for path, items in groupby(session.items, key=lambda item: item.path):
        try:
            (folder / path.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from items


class Reports:
    """A plugin of pytest: writes down what it says of each test, a line each."""

    def __init__(self, config, file):
        self.config = config
        self.file = file

    def pytest_runtest_logreport(self, report):
        content = self.config.hook.pytest_report_to_serializable(
            config=self.config, report=report)
        print(json.dumps(content), file=self.file)


def report_all(config, path: Path) -> None:
    """Say again what another process has said of its tests."""
    for line in path.read_text().splitlines():
        report = config.hook.pytest_report_from_serializable(
            config=config, data=json.loads(line))
        config.hook.pytest_runtest_logreport(report=report)
