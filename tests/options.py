"""The options of the grader: `python -m pytest --grade=student`.

.pytest.ini loads this file. The "=" has to be: without it pytest takes the folder for
one of tests, and reads the .pytest.ini that lies in it instead of ours.
"""


def pytest_addoption(parser):
    group = parser.getgroup("grading of assignments")
    group.addoption("--grade", metavar="FOLDER", help="instead of the tests: grade the "
                    "tasks in a student's copy")
    group.addoption("--tasks", nargs="+", default=[], help="nrd sfnet.warp; else all")
    group.addoption("--seed", type=int, default=0, help="of the hidden inputs")
    group.addoption("--report", metavar="FILE", help="Gradescope's results.json")


def pytest_cmdline_main(config):
    if config.getoption("--grade"):
        import grading  # which conftest.py has made possible to find
        return grading.main(*map(config.getoption, ("--grade", "--tasks", "--seed",
                                                    "--report")))
