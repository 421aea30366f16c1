"""The course: hand-outs without solutions, and a grader that knows usual mistakes."""
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

import assignment
import evaluate
import grading
import train
from assignment import TESTS, choose, claims_of, find_tasks, member, read
from conftest import ROOT, run

TASKS = find_tasks()
NAMES = ["nrd", "sfnet.warp", "deeplabv3plus.DeepLabv3PlusDecoder.forward"]
QUESTIONS = sorted(path for path in TESTS.glob("questions/*.md")
                   if "answers" not in path.name)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An untouched hand-out, below pytest's configuration as it is in the library."""
    folder = tmp_path_factory.mktemp("hand-out") / "student"
    shutil.copy(ROOT / ".pytest.ini", folder.parent)
    assignment.hand_out(NAMES, folder)
    return folder


def solve(folder, name, edit=lambda function: function, above=""):
    """Write the original function, edited, over a task of a hand-out."""
    (task,) = choose([name])
    ours, file = read(task.module), folder / f"{task.module}.py"
    theirs = file.read_text()
    pieces = []
    for text in (ours, theirs):
        node = member(grading.ast.parse(text), task.path)
        pieces.append("\n".join(text.splitlines()[node.lineno - 1:node.end_lineno]))
    file.write_text(theirs.replace(pieces[1], above + edit(pieces[0])))


# --- The tasks -----------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_task_has_all_that_a_teacher_needs(task):
    """A place in the paper, claims that make up its points, and usual mistakes."""
    assert re.search(r"(Sec\.|Eq\.|Fig\.|note N)", task.section), "no section is cited"
    claims = claims_of(task)
    assert claims, f"tests/tasks/{task.module}.py claims nothing of it"
    assert all(claim.__doc__ for claim in claims.values())
    assert sum(claim.points for claim in claims.values()) == task.points
    assert len(grading.mistakes_of(task)) >= 3
    names = {str(other) for other in TASKS}
    assert set(task.needs) <= names - {str(task)}
    for hidden in task.hides:
        module, path = hidden.split(".", 1)
        assert member(grading.ast.parse(read(module)), path)


def test_every_paper_has_five_tasks():
    for module in {task.module for task in TASKS}:
        assert len(choose([module])) >= 5, module


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough)
                                       for seed in (1, 2, 3))])
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_each_planted_mistake_costs_exactly_its_points_and_is_named(task, seed):
    """The right function with a usual mistake in it fails the claims that the mistake
    lists, for the reason that it states, and no other claim.
    """
    right = grading.right_answers(task, seed)
    raised = [name for name, value in right.items()
              if isinstance(value, dict) and "raised" in value]
    assert not raised, right
    assert not any(grading.judge(task, right, seed).values())
    for mistake in grading.mistakes_of(task):
        found = grading.wrong_answers(task, seed)[mistake.says]
        verdict = grading.judge(task, found, seed)
        failed = {name: wrong for name, wrong in verdict.items() if wrong}
        assert failed == dict.fromkeys(mistake.loses.split(), mistake.says)


# Functions of tests, each in the place of a solution: file, functions, what to return.
TWINS = {
    "nrd.represent": ("test_nrd", "represent_slowly layers_of_one_cell g",
                      "theta, inputs, *, widths", "theta, inputs, widths"),
    "sfnet.warp": ("test_sfnet", "warp_slowly", "coarse, flow", "coarse, flow"),
    "deeplabv3plus.atrous_convolution": (
        "test_deeplabv3plus", "atrous_slowly", "x, weight, *, rate", "x, weight, rate"),
    "dupsampling.decompress": ("test_dupsampling", "decompress_slowly",
                               "x, W, *, ratio", "x, W, ratio"),
    "efficientfcn.codebook": ("test_efficientfcn", "codebook_slowly",
                              "weighting, base", "weighting, base"),
    "efficientfcn.assemble": ("test_efficientfcn", "assemble_slowly",
                              "weights, codewords", "weights, codewords"),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_literal_twin_is_a_solution(name):
    """Loops that were written from the paper get every point: a claim asks for what
    the paper says, and not for how the library does it.
    """
    (task,) = choose([name])
    file, functions, parameters, arguments = TWINS[name]
    sources = [inspect.getsource(getattr(importlib.import_module(file), function))
               for function in functions.split()]
    text = "\n".join(["import math", *sources, f"def {task.path}({parameters}):",
                      f"    return {functions.split()[0]}({arguments})"])
    module = grading.graft(task, read(task.module), text, "a student's file")
    verdict = grading.judge(task, dict(grading.answers(task, module, 0)), 0)
    assert not any(verdict.values()), verdict


# --- The hand-out --------------------------------------------------------------------


def test_a_hand_out_has_no_solution_and_no_literal_twin(student):
    """Neither the body of a task's function, nor the loop that says the same slowly."""
    texts = {path.name: path.read_text() for path in student.rglob("*.*")
             if path.is_file()}
    for task in choose(NAMES):
        node = member(grading.ast.parse(read(task.module)), task.path)
        body = [part for part in node.body if not isinstance(part, grading.ast.Expr)]
        solution = textwrap.dedent("\n".join(
            read(task.module).splitlines()[body[0].lineno - 1:node.end_lineno]))
        for name, text in texts.items():
            flat = textwrap.dedent(re.sub(r"^ +", "", text, flags=re.M))
            assert re.sub(r"^ +", "", solution, flags=re.M) not in flat, (task, name)
    for twin in ("represent_slowly", "layers_of_one_cell", "warp_slowly"):
        assert not [name for name, text in texts.items() if f"def {twin}" in text]
    there = {path.relative_to(student).as_posix() for path in student.rglob("*")}
    assert not there & {".git", "tests/tasks", "tests/grading.py", "tests/questions",
                        "tests/assignment.py", "results/samples.png"}
    assert {"README.md", "TASKS.md", "data.py", ".pytest.ini",
            "tests/conftest.py"} <= there


def test_a_hand_out_runs_but_for_its_tasks(student):
    """Its own modules are imported, the original being on the path; a demo and train.py
    end with a sentence; a method without a task works.
    """
    program = """
import pathlib, runpy, common, data, evaluate, train, torch
for name in common.methods():
    assert pathlib.Path(__import__(name).__file__).parent == pathlib.Path.cwd(), name
images = torch.randn(1, 3, 33, 65)
common.build_model("efficientfcn", 5, backbone="resnet18", channels=8)(images)
try:
    runpy.run_path("nrd.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 2
train.main(["--method", "nrd"])
"""
    said = run("-c", program, cwd=student)
    assert said.returncode == 2, said.stderr
    assert re.fullmatch(r"(error: task nrd\.\w+: Sec\. 2\.2, \d points, not written "
                        r"yet\n){2}", said.stderr)


def test_a_hand_out_says_how_to_work(student):
    """How to run and check it, with calls that work; no picture, nothing for teachers.
    """
    for module, call in assignment.EXAMPLES.items():
        eval(call, {"torch": torch, module: importlib.import_module(module)})
    tasks = (student / "TASKS.md").read_text()
    assert "sfnet.sample" not in tasks  # sfnet.warp is easier after it, but it is given
    assert "python deeplabv3plus.py" in tasks
    assert "`deeplabv3plus.TwoLevelDecoder.forward` is not in this copy" in tasks
    for name in ("README.md", "results/README.md"):
        page = (student / name).read_text()
        assert not re.search(r"!\[|teachers|tests\.assignment", page), name
    assert "## Results" in (student / "README.md").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("module", [name for name in assignment.EXAMPLES
                                    if name != "common"])
def test_the_demo_of_a_hand_out_ends_with_the_open_task(module, tmp_path):
    assignment.hand_out(["common.one_hot", module], tmp_path)
    assert f"python {module}.py" in (tmp_path / "TASKS.md").read_text()
    said = run(f"{module}.py", cwd=tmp_path)
    assert said.returncode == 2
    assert re.fullmatch(rf"error: task {module}\.[\w.]+: .+, \d+ points, not written "
                        rf"yet\n", said.stderr)


@pytest.mark.thorough
def test_tests_of_a_hand_out_wait_for_the_tasks(student):
    """A test that needs a task is skipped and says for which, others pass."""
    test = student / "tests/test_two.py"
    test.write_text("import nrd, sfnet\n\ndef test_nrd():\n    nrd.coordinate_map(8)\n"
                    "\ndef test_sfnet():\n    assert sfnet.FAM(4)\n")
    said = run("-m", "pytest", "-q", "-rs", test, cwd=student)
    test.unlink()
    assert "1 passed, 1 skipped" in said.stdout, said.stdout
    assert "waits for task nrd.coordinate_map" in said.stdout
    said = run("-m", "pytest", "-q", "tests/test_prose.py", cwd=student)
    assert said.returncode == 0, said.stdout


def test_a_folder_that_is_in_use_is_not_written_into(student):
    with pytest.raises(SystemExit, match="not empty"):
        assignment.hand_out(NAMES, student)
    with pytest.raises(SystemExit, match="no task 'nrd.x'"):
        choose(["nrd.x"])


# --- The grader ----------------------------------------------------------------------


def scores(results):
    return {result["name"].split()[0]: result["score"] for result in results}


def test_the_library_gets_all_points_and_an_untouched_hand_out_none(student):
    tasks = choose(["nrd"])
    assert scores(grading.grade(ROOT, tasks)) == {str(t): t.points for t in tasks}
    results = grading.grade(student, tasks)
    assert set(scores(results).values()) == {0}
    assert {result["output"] for result in results} == {"not written yet"}


@pytest.mark.thorough
def test_every_task_of_the_library_gets_all_points():
    for seed in (0, 1):
        results = grading.grade(ROOT, TASKS, seed=seed)
        assert all(result["status"] == "passed" for result in results), results


def test_what_a_solution_does_to_its_process_costs_itself_only(tmp_path):
    """Loops, exits, crashes, output, the network, the teacher's files: each costs its
    own task; a helper beside the function is found; other edits count for nothing.
    """
    folder = tmp_path / "student"
    assignment.hand_out(["nrd"], folder)
    body = lambda *lines: lambda text: "\n".join(
        [text.split("\n")[0], *(f"    {line}" for line in lines)])
    solve(folder, "nrd.coordinate_map", body("while True: pass"))
    solve(folder, "nrd.theta_length", body("import sys", "sys.exit(0)"))
    solve(folder, "nrd.split_theta", body("import os", "os._exit(0)"))
    solve(folder, "nrd.to_cells", body("return to_cells(x, s)"))
    solve(folder, "nrd.from_cells", body("print('0' * 10**7)", "return cells(x, B, h)"),
          above="from common import rows_at\nONE = 1\n\n\ndef cells(x, B, h):\n"
                "    w = ONE * len(x) // B // h\n    s = math.isqrt(x.shape[2])\n"
                "    return x.reshape(B, h, w, -1, s, s).permute(0, 3, 1, 4, 2, 5)"
                ".reshape(B, -1, h * s, w * s)\n\n\n")
    teacher = f"import pathlib; pathlib.Path({str(ROOT / 'nrd.py')!r}).read_text()"
    solve(folder, "nrd.represent", body(teacher))
    solve(folder, "nrd.NRDDecoder.fit",
          lambda text: text.replace("B, M, q, r = m.shape", "import socket\n"
                                    "        socket.create_connection(('::1', 9))"))
    with open(folder / "nrd.py", "a") as file:
        file.write("\ndef standardised(q):\n    return q\n\n\nCELL = 1\n")
    results = grading.grade(folder, choose(["nrd"]), limit=2)
    assert scores(results) == dict.fromkeys(scores(results), 0) | {"nrd.from_cells": 4}
    said = {result["name"].split()[0]: result["output"] for result in results}
    assert "no end within 2 seconds" in said["nrd.coordinate_map"]
    assert "SystemExit" in said["nrd.theta_length"]
    assert "has ended itself (exit code 0)" in said["nrd.split_theta"]
    assert "RecursionError" in said["nrd.to_cells"]
    assert "PermissionError: open: not while" in said["nrd.represent"]
    assert "PermissionError: socket." in said["nrd.NRDDecoder.fit"]
    (folder / "nrd.py").unlink()  # a sentence that does not show where we keep it
    (gone,) = grading.grade(folder, choose(["nrd.to_cells"]))
    assert (gone["score"], gone["output"]) == (0, "nrd.py is missing")


def test_a_file_is_read_as_python_would(tmp_path):
    """An older attempt above, a mark at the beginning of the file, numpy's integers."""
    head = "def theta_length(widths):\n    "
    count = "np.int64(sum((a + 1) * b for a, b in zip(widths, widths[1:])))"
    (tmp_path / "nrd.py").write_text(
        f"import numpy as np\n\n\n{head}raise ValueError\n\n\n{head}return {count}\n",
        encoding="utf-8-sig")
    (result,) = grading.grade(tmp_path, choose(["nrd.theta_length"]))
    assert result["status"] == "passed", result["output"]


@pytest.mark.parametrize("text, said", [
    ("def warp(coarse, flow):\n  return (", "SyntaxError: '(' was never closed "
                                            "(sfnet.py, line 2)"),
    ("import nothing_like_this\n", "NameError: sfnet.py has no warp"),
    ("\0", "source code string cannot contain null bytes")])
def test_a_file_that_cannot_be_read_is_told_once(text, said, tmp_path):
    (tmp_path / "sfnet.py").write_text(text)
    (result,) = grading.grade(tmp_path, choose(["sfnet.warp"]))
    assert result["score"] == 0 and said in result["output"]


def test_grading_from_the_command_line(student, tmp_path):
    """The points, the sentence of a usual mistake, and Gradescope's results.json."""
    solve(student, "nrd.coordinate_map", lambda text: text.replace("[x, y]", "[y, x]"))
    solve(student, "nrd.theta_length", lambda text: text.replace("+ fan_out", "+ 7"))
    report = tmp_path / "results.json"
    said = subprocess.run(
        [sys.executable, "-m", "pytest", f"--grade={student}", "--tasks", "sfnet.warp",
         "nrd.coordinate_map", "nrd.theta_length", "--seed", "7", "--report", report],
        cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 1, said.stderr
    assert "1 of 13 points, 3 tasks, seed 7" in said.stdout
    results = json.loads(report.read_text())
    assert results["score"] == 1
    # With a blank pytest would read the .pytest.ini of the folder.
    assert "--grade=student " in (ROOT / "README.md").read_text()
    swapped, length, warp = results["tests"]
    assert (swapped["score"], swapped["max_score"]) == (1, 4)
    assert swapped["output"].startswith("shape 1/1\nvalues 0/3: x and y are swapped")
    assert "published 0/2: number 1: 858 instead of 899" in length["output"] or (
        "instead of" in length["output"])
    assert warp["output"] == "not written yet" and warp["status"] == "failed"


# --- Questions -----------------------------------------------------------------------


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_every_question_has_an_answer_that_stays_behind(path, student):
    """As many answers as questions; the copy's TASKS.md has the questions only."""
    questions = re.findall(r"^### (.+)$", path.read_text(), re.M)
    answers = path.with_name(f"{path.stem}-answers.md").read_text()
    assert len(questions) >= 5
    assert re.findall(r"^### (.+)$", answers, re.M) == questions
    if path.stem == "nrd":
        tasks = (student / "TASKS.md").read_text()
        assert all(f"### {question}" in tasks for question in questions)
        assert not re.search(r"Measured here|Not measured here|Expected:", tasks)


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_commands_of_the_questions_are_understood(path):
    """Each is accepted by its program; what is scored or explained has been trained."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.S)
    assert len(blocks) >= 5
    for block in blocks:
        trained = set()
        for command in block.splitlines():
            program, *words = shlex.split(command)[1:]
            if program == "train.py":
                args = train.parse(words)
                train.make_recipe(args)
                train.parse_options(args.method, args.set)
                trained.add(str(args.out))
            else:
                assert program == "evaluate.py"
                args = evaluate.parse(words)
                assert words[0] == "cost" or words[1] in trained, command
