"""The prose is executed: shape comments, paper -> code maps, notes, README."""
import ast
import importlib.util
import io
import re
import shlex
import statistics
import tokenize

import pytest
import torch

import common
import data
import evaluate
import train
from conftest import ROOT
from shapecheck import checked

MODULES = common.methods()
SECTIONS = ["1. Config", "2. Equations", "3. Layers", "4. Model", "5. Explain",
            "6. Demo"]
CODE = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])


def source(name):
    return (ROOT / f"{name}.py").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_shape_comments_are_true(name):
    """Every trailing shape comment is reached by some variant and agrees with it."""
    module, errors = importlib.import_module(name), []
    with checked(ROOT / f"{name}.py", errors):
        for variant in module.VARIANTS:
            model = common.build_model(f"{name}:{variant}", 5, backbone="resnet18",
                                       channels=16).eval()
            model(torch.randn(1, 3, 65, 97))
            if variant == "default":
                module.explain(model, torch.randn(1, 3, 64, 96))
                labels = torch.randint(5, (2, 65, 97), dtype=torch.uint8)
                getattr(module, "prepare", lambda *_: None)(model, labels)
    assert not errors, "\n".join(errors)


def test_a_wrong_shape_comment_is_caught(tmp_path):
    """The checker itself: swap two letters and it must complain."""
    path = tmp_path / "wrong.py"
    path.write_text("def f(x):\n    B, C, h, w = x.shape\n"
                    "    y = x.flatten(2)  # (C, B, h*w)\n    return y\n")
    spec = importlib.util.spec_from_file_location("wrong", path)
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    errors = []
    with checked(path, errors):
        wrong.f(torch.zeros(2, 3, 4, 5))
    assert len(errors) == 1 and "C is 3, the tensor has 2" in errors[0]


@pytest.mark.parametrize("name", MODULES)
def test_paper_to_code_map_points_at_things_that_exist(name):
    """Each row of the map names a symbol of the module; every cited Eq. is mapped."""
    module = importlib.import_module(name)
    rows = re.findall(r"^ +\| (.+?) +\| (\S+) +\| .+ \|$", module.__doc__, re.M)
    assert len(rows) >= 5, "the header has no paper -> code map"
    for place, symbol in rows:
        target = module
        for part in symbol.split("."):
            target = getattr(target, part, None)
        assert target is not None, (
            f"{name}: {place} points at {symbol}, which is not there")
    body = source(name).split('"""', 2)[2]
    cited = set(re.findall(r"Eq\. \((\d+)\)", body))
    mapped = set(re.findall(r"[Ee]q\. \((\d+)\)", "".join(place for place, _ in rows)))
    assert cited <= mapped, f"{name}: Eq. {cited - mapped} cited but not in the map"


@pytest.mark.parametrize("name", MODULES)
def test_notes_and_lines_refer_to_each_other(name):
    module = importlib.import_module(name)
    listed = set(re.findall(r"^    (N\d+) ", module.__doc__, re.M))
    used = set(re.findall(r"\bN\d+\b", source(name).split('"""', 2)[2]))
    assert listed == used, (
        f"{name}: notes {listed ^ used} lack their line or their text")


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_same_sections_in_the_same_order(name):
    assert re.findall(r"^# --- (\d\. \w+) -+$", source(name), re.M) == SECTIONS
    module = importlib.import_module(name)
    for symbol in ("build", "VARIANTS", "PUBLISHED", "RECIPES", "explain"):
        assert hasattr(module, symbol), f"{name} offers no {symbol}"


def prose_share(text):
    """Share of the non-blank lines that are comment or docstring."""
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    prose = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline)
             if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(prose & lines) / len(lines)


@pytest.mark.parametrize("name", MODULES)
def test_modules_explain_themselves(name):
    assert 0.35 <= prose_share(source(name)) <= 0.55
    assert len(source(name).splitlines()) <= 530, "too long for one sitting"


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_lines_and_functions_are_short(path):
    """88 columns; functions of at most 50 lines, half of them under 16."""
    text = path.read_text()
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 88]
    assert not wide, f"{path.name}: wide lines {wide}"
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(text))
               if isinstance(n, ast.FunctionDef)}
    long = {k: v for k, v in lengths.items() if v > 50}
    assert not long, f"{path.name}: {long}"
    if lengths:
        assert statistics.median(lengths.values()) <= 15


# --- README --------------------------------------------------------------------------

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
COMMANDS = [line.partition("  #")[0].strip() for block in
            re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines()
            if line.strip().startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_are_understood(command):
    """Every command in README is accepted by the program that it calls."""
    for name, value in (("DIR", "some-folder"), ("$m", "nrd"), ("$seed", "0")):
        command = command.replace(name, value)
    words = shlex.split(command)[1:]
    if command.startswith("torchrun"):  # its own options come first
        words = words[[word.endswith(".py") for word in words].index(True):]
    if words[0] == "train.py":
        args = train.parse(words[1:])
        train.make_recipe(args)
        common.parse_options(args.method, args.set)
    elif words[0] == "evaluate.py":
        evaluate.parse(words[1:])
    elif words[0] == "data.py":
        data.parse(words[1:])
    else:
        assert words[0] in ("-m", *(f"{m}.py" for m in MODULES)), command


def test_readme_names_files_that_exist():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), f"README links to {name}"
    assert len(COMMANDS) >= 8


def test_readme_loops_over_methods_that_exist():
    loops = re.findall(r"for m in (.*?); do", README.replace("\\\n", " "))
    assert loops
    for method in " ".join(loops).split():
        common.load_method(method)
