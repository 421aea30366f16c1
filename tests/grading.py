"""Grade what students wrote: `python -m pytest --grade=FOLDER --tasks nrd sfnet.warp`.

From the student's file only the task's own function is taken, and what has a name there
that the original lacks, such as a helper. All else is the original: the other tasks,
too, so that each is graded on its own, and nothing that a student changes elsewhere
helps or harms.

A claim is a function in tests/tasks/ that calls the task's function, on inputs that it
draws, and returns what came out. It runs on the student's module in a process of its
own. Equal to what the original gives: its points. Equal to what one of the usual
mistakes gives, each of which is planted in the original by an edit: its sentence.
"""
from __future__ import annotations

import ast
import importlib
import io
import json
import math
import multiprocessing
import numbers
import os
import sys
import time
import traceback
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from assignment import LIMIT, ROOT, Task, choose, claims_of, find_tasks, member, read
from assignment import tasks_file

MEMORY = 8 * 2**30  # bytes that a task's process may ask for
FORKS = multiprocessing.get_context("forkserver")


# --- For tests/tasks/ ----------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A usual mistake: what to say of it, and how it comes out of the right function.

    edits: {text of the function: what stands there instead}. loses: the names of the
    claims that it breaks, separated by blanks.
    """

    says: str
    edits: dict[str, str]
    loses: str


def points(number: int):
    """Makes a function a claim that is worth so many points."""
    def mark(function):
        function.points = number
        return function
    return mark


def gradients(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of function(*inputs), by each of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.arange(out.numel(), dtype=out.dtype).cos().reshape(out.shape)
    return torch.autograd.grad((out * weight).sum(), inputs)


# --- A module with one foreign function ----------------------------------------------


def graft(task: Task, original: str, text: str, file: str) -> ModuleType:
    """The original module, with the task's function and new names from `text`."""
    tree = ast.parse(original)
    theirs = ast.parse(text, file)
    function = member(theirs, task.path)
    if function is None:
        raise NameError(f"{Path(file).name} has no {task.path}")
    home = tree  # the module, then perhaps the class
    source = theirs
    *outer, last = task.path.split(".")
    for name in [*outer, last]:
        at = home.body.index(member(home, name))
        known = set().union(*map(names_of, home.body))
        home.body[at:at] = [part for node in source.body
                            for part in additions(node, known)]
        if name in outer:
            home = member(home, name)
            source = member(source, name)
    home.body[home.body.index(member(home, last))] = function
    return run_module(task, compile(tree, file, "exec"))


def run_module(task: Task, code) -> ModuleType:
    module = ModuleType(task.module)
    module.__file__ = code.co_filename
    exec(code, module.__dict__)
    return module


def names_of(node: ast.stmt) -> set[str]:
    """What a statement gives a name to."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return {part.id for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return {node.name} if hasattr(node, "name") else set()


def additions(node: ast.stmt, known: set[str]) -> list[ast.stmt]:
    """The statement, if it gives only new names; of an import, the names that are."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        node.names = [alias for alias in node.names
                      if (alias.asname or alias.name).split(".")[0] not in known]
        return [node] if node.names else []
    names = names_of(node)
    return [node] if names and not names & known else []


@cache
def three_parts(task: Task) -> tuple[str, str, str]:
    """The text of a module: before a task's function, the function, and after it."""
    text = read(task.module)
    node = member(ast.parse(text), task.path)
    lines = text.splitlines(keepends=True)
    return ("".join(lines[:node.lineno - 1]),
            "".join(lines[node.lineno - 1:node.end_lineno]),
            "".join(lines[node.end_lineno:]))


def planted(task: Task, mistake: Mistake) -> str:
    """The text of the original module with a mistake in the task's function."""
    before, function, after = three_parts(task)
    for old, new in mistake.edits.items():
        assert function.count(old) == 1, f"{task}: {old!r} is not there, or twice"
        function = function.replace(old, new)
    return before + function + after


def mistakes_of(task: Task) -> list[Mistake]:
    asked = getattr(tasks_file(task.module), task.path.replace(".", "_"), None)
    return getattr(asked, "mistakes", [])


# --- What a claim gives --------------------------------------------------------------


def plain(value):
    """A claim's result out of nothing but tensors, numbers, texts, lists and dicts."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value.long()
        if value.ndim == 0:
            return value.item()
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        return value.item()  # numpy's
    return f"a {type(value).__name__}"


def answers(task: Task, module: ModuleType, seed: int):
    """Yields (claim, what it gives); an error is a result, too: {"raised": ..}."""
    for name, claim in claims_of(task).items():
        torch.manual_seed(zlib.crc32(f"{seed} {task} {name}".encode()))
        try:
            yield name, plain(claim(module))
        except BaseException as error:  # SystemExit is one, and costs this claim only
            yield name, raised(error, module.__file__)


def raised(error: BaseException, file: str) -> dict[str, str]:
    """An error as a claim's result; the line is the last one in the student's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == file]
    said = (str(getattr(error, "msg", error)).splitlines() or [""])[0]
    line = str(getattr(error, "lineno", None) or (lines or [""])[-1])
    return {"raised": type(error).__name__, "said": said[:300], "line": line}


@cache
def right_answers(task: Task, seed: int) -> dict[str, object]:
    """What the original gives, claim by claim."""
    return answers_of_text(task, read(task.module), seed)


@cache
def wrong_answers(task: Task, seed: int) -> dict[str, dict]:
    """{sentence: what the original gives with that mistake planted, claim by claim}"""
    return {mistake.says: answers_of_text(task, planted(task, mistake), seed)
            for mistake in mistakes_of(task)}


def answers_of_text(task: Task, text: str, seed: int) -> dict[str, object]:
    """The same of a text of our own, in this process."""
    file = str(ROOT / f"{task.module}.py")
    return dict(answers(task, run_module(task, compile(text, file, "exec")), seed))


# --- The student's process -----------------------------------------------------------


def lock_up() -> None:
    """From here on: no network, no other program, no file written, no solution read.

    It keeps mistakes and curiosity in, not an attacker: for that, use a container.
    """
    def refuse(event, arguments):
        outside = event.startswith(("socket.", "subprocess.", "shutil.")) or event in (
            "os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn",
            "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.kill")
        if event == "open" and isinstance(arguments[0], (str, bytes, Path)):
            path, _, flags = arguments
            path = Path(os.path.abspath(os.fsdecode(path)))
            outside = flags & (os.O_WRONLY | os.O_RDWR) or (
                ROOT in path.parents and "site-packages" not in path.parts)
        if outside:
            raise PermissionError(f"{event}: not while a task is graded")
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # a system that has no such limit
    for folder in ("", str(ROOT), str(ROOT / "tests")):
        while folder in sys.path:
            sys.path.remove(folder)
    sys.dont_write_bytecode = True
    sys.addaudithook(refuse)


def attempt(task: Task, text: str, file: str, seed: int, pipe) -> None:
    """In the student's process: send what each claim gives, one by one."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    original = read(task.module)
    importlib.import_module(task.module)  # and with it all that it imports
    claims_of(task)
    lock_up()
    pipe.send_bytes(b"ready")
    try:
        module = graft(task, original, text, file)
        sys.modules[task.module] = module  # whoever imports it gets the student's
        results = answers(task, module, seed)
    except BaseException as error:
        fault = raised(error, file)
        results = [(name, fault) for name in claims_of(task)]
    for result in results:
        buffer = io.BytesIO()
        torch.save(result, buffer)
        pipe.send_bytes(buffer.getvalue())


def ask(task: Task, folder: Path, seed: int, limit: float) -> dict[str, object]:
    """What the claims give on the student's file; those that got nowhere say why."""
    file = folder / f"{task.module}.py"
    if not file.exists():
        missing = {"raised": "", "said": f"{file.name} is missing", "line": ""}
        return dict.fromkeys(claims_of(task), missing)
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors mark it so
    except (OSError, UnicodeDecodeError) as error:
        return dict.fromkeys(claims_of(task), raised(error, str(file)))
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=attempt, daemon=True,
                            args=(task, text, str(file), seed, sender))
    process.start()
    sender.close()
    if receiver.poll(60):
        receiver.recv_bytes()  # our modules are loaded: the student's time begins
    deadline = time.monotonic() + limit
    found = {}
    why = ""
    while len(found) < len(claims_of(task)) and not why:
        if not receiver.poll(max(0, deadline - time.monotonic())):
            why = f"no end within {limit:g} seconds: a loop that does not stop?"
            break
        try:
            # weights_only: what comes from there may hold data, and no code.
            name, value = torch.load(io.BytesIO(receiver.recv_bytes()),
                                     weights_only=True)
            found[name] = value
        except EOFError:
            process.join(5)
            why = f"the process has ended itself (exit code {process.exitcode})"
        except Exception as error:
            why = f"an answer that cannot be read ({type(error).__name__})"
    process.kill()
    process.join()
    return {name: found.get(name, {"raised": "", "said": why, "line": ""})
            for name in claims_of(task)}


# --- Judging -------------------------------------------------------------------------


def difference(got, wanted, where="") -> str:
    """What differs between two results, in words; "" if nothing does."""
    if isinstance(got, Tensor) and isinstance(wanted, Tensor):
        return tensor_difference(got, wanted, where)
    if isinstance(got, (int, float)) and isinstance(wanted, (int, float)):
        same = math.isclose(got, wanted, rel_tol=1e-4, abs_tol=1e-5) or (
            math.isnan(got) and math.isnan(wanted))
        return "" if same else f"{where}{got:.5g} instead of {wanted:.5g}"
    pairs = []  # of parts, each with its name
    if isinstance(got, dict) and isinstance(wanted, dict):
        if got.keys() == wanted.keys():
            pairs = [(got[key], wanted[key], f"{where}{key}: ") for key in wanted
                     if key != "line" or "raised" not in wanted]  # each has its own
    elif isinstance(got, list) and isinstance(wanted, list) and (
            len(got) == len(wanted) and (is_long(got) or is_long(wanted))):
        pairs = [(a, b, f"{where}number {i}: ")
                 for i, (a, b) in enumerate(zip(got, wanted), start=1)]
    if pairs:
        return next(filter(None, (difference(*pair) for pair in pairs)), "")
    same = type(got) is type(wanted) and got == wanted
    return "" if same else f"{where}{in_short(got)} instead of {in_short(wanted)}"


def is_long(value) -> bool:
    """A list of more than numbers and texts, which are shown as they are."""
    return isinstance(value, list) and not all(isinstance(part, (int, str))
                                               for part in value)


def in_short(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if is_long(value):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(value)}"
    return repr(value)


def tensor_difference(got: Tensor, wanted: Tensor, where: str) -> str:
    if got.shape != wanted.shape:
        return f"{where}shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    same = torch.isclose(got.double(), wanted.double(), rtol=1e-4, atol=1e-5,
                         equal_nan=True)
    if same.all():
        return ""
    first = tuple((~same).nonzero()[0].tolist())
    far = (got - wanted).abs()[~same].max().item()
    return (f"{where}{int((~same).sum())} of {same.numel()} numbers differ, by up to "
            f"{far:.3g}; the first at {list(first)}: {got[first].item():.5g} instead "
            f"of {wanted[first].item():.5g}")


def judge(task: Task, found: dict, seed: int) -> dict[str, str]:
    """{claim: what is wrong with what was found, "" if nothing}"""
    right = right_answers(task, seed)
    verdict = {name: difference(value, right[name]) for name, value in found.items()}
    failed = [name for name in verdict if verdict[name]]
    if not failed or all(is_unwritten(found[name]) for name in failed):
        return verdict | dict.fromkeys(failed, "not written yet")
    wrong = wrong_answers(task, seed)
    like = {says: [name for name in found if not difference(found[name], given[name])]
            for says, given in wrong.items()}
    for name in failed:
        # The mistake that also explains most of what the other claims gave.
        fits = [says for says in wrong if name in like[says]]
        says = max(fits, key=lambda says: len(like[says]), default="")
        verdict[name] = says or describe(found[name], verdict[name], task)
    return verdict


def is_unwritten(value) -> bool:
    return (isinstance(value, dict) and value.get("raised") == "NotImplementedError"
            and value["said"].startswith("task "))


def describe(got, difference: str, task: Task) -> str:
    """What is wrong where no usual mistake is."""
    if not isinstance(got, dict) or "raised" not in got:
        return difference
    if is_unwritten(got):
        return "not written yet"
    line = f" ({task.module}.py, line {got['line']})" if got["line"] else ""
    return f"{got['raised']}: {got['said']}{line}".removeprefix(": ")


def grade(folder: Path, tasks: list[Task], *, seed=0, limit=LIMIT) -> list[dict]:
    """A dict per task, as Gradescope wants it."""
    results = []
    for task in tasks:
        claims = claims_of(task)
        verdict = judge(task, ask(task, folder, seed, limit), seed)
        score = 0
        lines = []
        for name, wrong in verdict.items():
            earned = 0 if wrong else claims[name].points
            score += earned
            lines.append(f"{name} {earned}/{claims[name].points}"
                         + (f": {wrong}" if wrong else ""))
        if score == 0 and len(set(verdict.values())) == 1:
            lines = list(set(verdict.values()))  # the same everywhere: once is enough
        results.append({"name": f"{task} ({task.section})", "score": score,
                        "max_score": task.points, "output": "\n".join(lines),
                        "status": "passed" if score == task.points else "failed"})
    return results


def main(folder: str, names: list[str], seed: int, report: str | None) -> int:
    """The grading as a program; 0 if every point was earned."""
    start = time.monotonic()
    if not Path(folder).is_dir():
        sys.exit(f"--grade={folder}: no such folder")
    FORKS.set_forkserver_preload(["grading", "common"])  # torch is imported only once
    results = grade(Path(folder).resolve(), choose(names) if names else find_tasks(),
                    seed=seed)
    for result in results:
        print(f"{result['score']:>3} of {result['max_score']:>2}  {result['name']}")
        if result["status"] == "failed":
            for line in result["output"].splitlines():
                print(f"{'':12}{line}")
    score = sum(result["score"] for result in results)
    total = sum(result["max_score"] for result in results)
    tasks = "1 task" if len(results) == 1 else f"{len(results)} tasks"
    print(f"{score:>3} of {total} points, {tasks}, seed {seed}")
    if report:
        gradescope = {"score": score, "tests": results,
                      "execution_time": round(time.monotonic() - start)}
        Path(report).write_text(json.dumps(gradescope, indent=2), encoding="utf-8")
    return int(score < total)
