"""Make a hand-out: a copy of the library in which chosen functions are to be written.

    python -m tests.assignment --list
    python -m tests.assignment nrd sfnet.warp --out student

A task is a function or a method with one line directly above it:

    # task: minutes=30 points=10 needs=nrd.to_cells section='Sec. 2.2'

Its name is the function's, behind that of its file: `nrd.represent`, or with its class
`nrd.NRDDecoder.fit`. `needs` names tasks that are better done before, `hides` functions
that would give the solution away, with commas between them; both may be left out. So
may `section`, where the docstring cites the paper. What is asked for, and the usual
mistakes, stand in tests/tasks/; tests/grading.py holds a solution against them.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LIMIT = 15  # seconds for all claims of a task, which take well under one
# What of tests/ goes along. The other files may show a solution.
FOR_STUDENTS = "conftest.py", "sharing.py", "shapecheck.py", "sixth.py", "test_prose.py"
# What a student may try first: of each module one call, short enough to check by hand.
EXAMPLES = {
    "common": "common.one_hot(torch.tensor([[[0, 2, 255]]]), 3)",
    "deeplabv3plus": "deeplabv3plus.atrous_rates(16)",
    "dupsampling": "dupsampling.windows(torch.arange(16).reshape(4, 4), 2)",
    "efficientfcn": "efficientfcn.to_grid(torch.eye(2)[None, None], 2, (3, 4))",
    "nrd": "nrd.to_cells(torch.arange(16.0).reshape(1, 1, 4, 4), 2)",
    "sfnet": "sfnet.enlarge(torch.eye(2)[None, None], (3, 3))"}
PLACE = re.compile(r"(?:Sec|Eq|Fig|Table)s?\.? \(?\d[\d.]*\d?\)?(?: \([a-z]\))?")


@dataclass(frozen=True)
class Task:
    """One function that a student writes."""

    module: str
    path: str  # of the function inside the module: "represent", "NRDDecoder.fit"
    minutes: int
    points: int
    needs: tuple[str, ...]
    section: str  # of the paper
    hides: tuple[str, ...]  # functions that contain its solution

    def __str__(self) -> str:
        return f"{self.module}.{self.path}"

    @property
    def word(self) -> str:
        """The name by which other files speak of it: of a method, that of its class."""
        return self.path.split(".")[0]


# --- Finding -------------------------------------------------------------------------


def read(module: str) -> str:
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


def member(parent: ast.AST, path: str):
    """The function or class of this name in a module or class; None if it has none.

    Of two with one name it is the last, as for Python.
    """
    for name in path.split("."):
        inside = reversed(getattr(parent, "body", []))
        parent = next((node for node in inside if getattr(node, "name", "") == name),
                      None)
    return parent


def functions(parent: ast.AST, path=""):
    """Every function of a module with its path, methods too."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{path}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{path}{node.name}", node


@cache
def find_tasks() -> list[Task]:
    """All tasks of all modules, in the order in which they are read."""
    tasks = []
    for module in sorted(file.stem for file in ROOT.glob("*.py")):
        text = read(module)
        lines = text.splitlines()
        for path, node in functions(ast.parse(text)):
            first = min([node, *node.decorator_list], key=lambda part: part.lineno)
            mark = re.fullmatch(r" *# task: (.*)", lines[first.lineno - 2])
            if not mark:
                continue
            values = dict(word.split("=", 1) for word in shlex.split(mark[1]))
            cited = PLACE.search(ast.get_docstring(node) or "")
            section = values.get("section", cited[0] if cited else "")
            listed = lambda key: tuple(filter(None, values.get(key, "").split(",")))
            tasks.append(Task(module, path, int(values["minutes"]),
                              int(values["points"]), listed("needs"), section,
                              listed("hides")))
    return tasks


def choose(names: list[str]) -> list[Task]:
    """The tasks of these names; the name of a file stands for all of its tasks."""
    tasks = find_tasks()
    for name in names:
        if name not in {str(task) for task in tasks} | {task.module for task in tasks}:
            sys.exit(f"no task {name!r}; python -m tests.assignment --list names all")
    return [task for task in tasks if str(task) in names or task.module in names]


def claims_of(task: Task) -> dict:
    """{name: function} of what tests/tasks/ claims of a task."""
    asked = getattr(tasks_file(task.module), task.path.replace(".", "_"), None)
    return {name: value for name, value in vars(asked).items()
            if hasattr(value, "points")} if asked else {}


def tasks_file(module: str):
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module(f"tasks.{module}")


# --- Hollowing -----------------------------------------------------------------------


def instructions(task: Task, docstring: str) -> list[str]:
    """What a student reads in the place of the solution, line by line."""
    said = (f"Task {task}: {task.points} points, about {task.minutes} minutes. "
            f"See {task.section}.")
    if task.needs:
        said += f" It is easier after {', '.join(task.needs)}."
    if "tests/" in docstring:
        said += " The tests that the text above names are not in this copy."
    lines = textwrap.wrap(said, 78)
    for name, claim in claims_of(task).items():
        asked = f"- {name} ({claim.points}): {' '.join(claim.__doc__.split())}"
        lines += textwrap.wrap(asked, 78, subsequent_indent="  ")
    return lines


def hollow(text: str, module: str, tasks: list[Task]) -> str:
    """The text of a module with instructions instead of what the tasks ask for."""
    tree = ast.parse(text)
    lines = text.splitlines()
    holes = []  # function, instructions, why it cannot be called
    for task in tasks:
        if task.module == module:
            node = member(tree, task.path)
            holes.append((node, instructions(task, ast.get_docstring(node) or ""),
                          f"task {task}: {task.section}, {task.points} points, not "
                          f"written yet"))
        for hidden in task.hides:
            if hidden.split(".")[0] == module:
                node = member(tree, hidden.split(".", 1)[1])
                holes.append((node, [], f"task {task}: {hidden} is not in this copy, "
                              f"because it shows the solution"))
    # From the bottom upwards, so that the numbers of the lines above stay true.
    for node, comment, error in sorted(holes, key=lambda hole: -hole[0].lineno):
        if ast.get_docstring(node):
            start = node.body[0].end_lineno
        else:  # behind the signature, whose last line ends with a colon
            start = node.lineno
            while not re.search(r":\s*(#.*)?$", lines[start - 1]):
                start += 1
        said = textwrap.wrap(error, 72, drop_whitespace=False)
        body = [*(f"# {line}" for line in comment), "raise NotImplementedError(",
                *(f'    "{part}"' for part in said)]
        body[-1] += ")"
        indent = " " * (node.col_offset + 4)
        lines[start:node.end_lineno] = [indent + line for line in body]
    return "\n".join(lines) + "\n"


# --- The copy ------------------------------------------------------------------------

# The copy's own, so that pytest does not find the library's above it.
PYTEST_INI = "[pytest]\ntestpaths = tests\n"
# A task that is not written yet skips a test, in the set-up, too.
SKIP = '''

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What waits for a task is skipped, and says for which."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    while error and error.__cause__:
        error = error.__cause__
    if isinstance(error, NotImplementedError) and str(error).startswith("task "):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"waits for {error}")
    return report
'''


def hand_out(names: list[str], folder: Path) -> list[Task]:
    """Write the copy into `folder`, which must be new; the tasks that are in it."""
    tasks = choose(names)
    open_ones = {str(task) for task in tasks}
    tasks = [replace(task, needs=tuple(need for need in task.needs
                                       if need in open_ones)) for task in tasks]
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: choose another --out")
    (folder / "tests").mkdir(parents=True)
    (folder / "results").mkdir()
    for module in sorted(file.stem for file in ROOT.glob("*.py")):
        (folder / f"{module}.py").write_text(hollow(read(module), module, tasks),
                                             encoding="utf-8")
    for path in (ROOT / "requirements.txt", ROOT / ".gitignore",
                 *ROOT.glob("results/*.csv")):
        shutil.copy(path, folder / path.relative_to(ROOT))
    for name in ("README.md", "results/README.md"):
        (folder / name).write_text(for_students((ROOT / name).read_text("utf-8")),
                                   encoding="utf-8")
    for name in FOR_STUDENTS:
        shutil.copy(TESTS / name, folder / "tests" / name)
    with open(folder / "tests/conftest.py", "a", encoding="utf-8") as conftest:
        conftest.write(SKIP)
    (folder / ".pytest.ini").write_text(PYTEST_INI, encoding="utf-8")
    (folder / "TASKS.md").write_text(sheet(tasks), encoding="utf-8")
    return tasks


def for_students(page: str) -> str:
    """A page without its pictures and without what is for teachers."""
    page = re.sub(r"^## For teachers\n.*?(?=^## |\Z)", "", page, flags=re.M | re.S)
    return re.sub(r"^!\[.*\n\n?", "", page, flags=re.M)


def how_to_work(tasks: list[Task]) -> list[str]:
    """The part of TASKS.md on running, checking and grading."""
    papers = [task.module for task in tasks if task.module != "common"]
    module = papers[0] if papers else "nrd"
    return ["## How to work", "", f"""\
Begin with the tasks that others are easier after. A paper is cited at the top of its
file. Tensors are float32 unless a docstring says otherwise.

```sh
pip install -r requirements.txt
python {module}.py
python -m pytest -rs tests/test_prose.py
```

The second line sends an image through the network and prints the shapes; it ends with
the name of a task if it needs one that is open. The third runs tests of comments and
shapes; what needs an open task is skipped, and `-rs` says for which it waits.
`README.md` describes the whole library: its pictures and its other tests, which would
show solutions, are not in this copy. To check one function alone:

```python
import torch, {module}
print({EXAMPLES[module]})
```

Below `Task` stand the claims, each with its points. For the grade, each runs on inputs
that are not told here and gets its points if the result is that of the original, up to
rounding. A task is graded on its own, with all others solved, so one that is open or
wrong costs no points elsewhere. It has {LIMIT} seconds, no network, and may not write
files."""]


def sheet(tasks: list[Task]) -> str:
    """TASKS.md of the copy: the tasks, how to begin, and questions on their papers."""
    rows = [f"| `{task}` | {task.section} | {', '.join(task.needs)} | {task.minutes} "
            f"| {task.points} |" for task in tasks]
    parts = ["# Tasks", "", "Each is a function whose body is missing: open its file, "
             "search for `Task`, and\nreplace the `raise`. Only these functions are "
             "graded, together with functions,\nconstants and imports that you add to "
             "the same file. Changes anywhere else do not\ncount.", "",
             "| task | in the paper | easier after | minutes | points |",
             "|---|---|---|---|---|", *rows, ""]
    parts += [f"`{hidden}` is not in this copy, because it shows the solution of "
              f"`{task}`.\n" for task in tasks for hidden in task.hides]
    parts += how_to_work(tasks)
    for module in dict.fromkeys(task.module for task in tasks):
        questions = TESTS / "questions" / f"{module}.md"
        if questions.exists():
            parts += ["", questions.read_text(encoding="utf-8").strip()]
    return "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.assignment", description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help="nrd: all of that file; sfnet.warp")
    parser.add_argument("--out", type=Path, default=Path("student"))
    parser.add_argument("--list", action="store_true", help="print all tasks")
    args = parser.parse_args(argv)
    if args.list:
        print(f"{'task':<47}{'in the paper':<29}{'minutes':>8}{'points':>7}  "
              f"easier after")
        for task in find_tasks():
            print(f"{task!s:<47}{task.section:<29}{task.minutes:>8}{task.points:>7}  "
                  f"{', '.join(task.needs)}".rstrip())
    elif args.tasks:
        tasks = hand_out(args.tasks, args.out)
        print(f"{args.out}: {len(tasks)} tasks, {sum(t.points for t in tasks)} points, "
              f"listed in TASKS.md. To grade it:\n"
              f"python -m pytest --grade={args.out} --tasks {' '.join(args.tasks)}")
    else:
        parser.error("name the tasks of the hand-out; --list prints all")


if __name__ == "__main__":
    main()
