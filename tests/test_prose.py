"""The prose is executed: shape comments, paper -> code maps, notes, README."""
import csv
import importlib.util
import itertools
import re
import shlex
import statistics

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
def test_shape_comments_are_true(name, thin):
    """Every trailing shape comment is reached by some variant and agrees with it."""
    module, errors = importlib.import_module(name), []
    with checked(ROOT / f"{name}.py", errors):
        for variant in module.VARIANTS:
            model = common.build_model(f"{name}:{variant}", 5, backbone="resnet18",
                                       channels=16).eval()
            model(torch.randn(1, 3, 65, 97))
            native, _ = model.decode(torch.randn(1, 3, 64, 96))
            model.to_pixels(native, (64, 96), (5, 9))
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


def notes(name):
    """{"N1": its text}: from four blanks and the number to the next one."""
    header = importlib.import_module(name).__doc__
    parts = re.split(r"^    (N\d+) ", header, flags=re.M)[1:]
    texts = [re.split(r"\n(?=\S)", part, maxsplit=1)[0] for part in parts[1::2]]
    return dict(zip(parts[::2], texts))


@pytest.mark.parametrize("name", MODULES)
def test_notes_and_lines_refer_to_each_other(name):
    used = set(re.findall(r"\bN\d+\b", source(name).split('"""', 2)[2]))
    assert set(notes(name)) == used, (
        f"{name}: notes {set(notes(name)) ^ used} lack their line or their text")


@pytest.mark.parametrize("name", MODULES)
def test_notes_are_sentences_with_their_effect(name):
    """What the paper says, what is done here, what it changes: each has its opening."""
    for number, text in notes(name).items():
        openings = re.findall(r"^ +(Paper|Code|Here|Effect):", text, re.M)
        assert openings[-1:] == ["Effect"] and len(openings) >= 2, f"{name} {number}"
        assert len(set(openings)) == len(openings), f"{name} {number}: one twice"


def test_notes_cited_elsewhere_exist():
    """`note N3` in a test, in README or in the table of published numbers is one."""
    for path in [*ROOT.glob("tests/test_*.py")]:
        module = path.stem.removeprefix("test_")
        if module in MODULES:
            cited = set(re.findall(r"\bN\d+\b", path.read_text()))
            assert cited <= set(notes(module)), f"{path.name}: {cited}"
    for method in MODULES:
        for row in common.published(method):
            assert set(re.findall(r"\bN\d+\b", row["why"])) <= set(notes(method)), row
    for number, module in re.findall(r"note (N\d+) (?:in|of) `(\w+)\.py`",
                                     README + RESULTS):
        assert number in notes(module), f"README: {number} of {module}"


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_same_sections_in_the_same_order(name):
    assert re.findall(r"^# --- (\d\. \w+) -+$", source(name), re.M) == SECTIONS
    module = importlib.import_module(name)
    for symbol in ("build", "VARIANTS", "RECIPES", "explain"):
        assert hasattr(module, symbol), f"{name} offers no {symbol}"


@pytest.mark.parametrize("name", MODULES)
def test_the_demo_of_a_module_runs(name, capsys):
    """`python nrd.py`: every tensor by its name and shape, and where the costs are."""
    importlib.import_module(name).demo()
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"costs: python evaluate.py cost {name}"
    assert any(line.startswith("image ") for line in said)


def test_the_programs_know_no_method():
    """A sixth paper is one file: no name of a method, nor of a class of one, elsewhere.

    But for the default of --method, which is one of them.
    """
    classes = {symbol for name in MODULES
               for symbol in re.findall(r"^class (\w+)", source(name), re.M)}
    for program in ("common", "data", "train", "evaluate"):
        text = source(program).replace('"method": Option("nrd", ', "").replace(
            "as nrd:bilinear (default nrd)", "")
        words = set(re.findall(r"\w+", text.lower()))
        found = words & {*MODULES, *(symbol.lower() for symbol in classes)}
        found -= {"fuse", "temperature"} & words  # a Protocol's fuse, streets' colours
        assert not found, f"{program}.py names {found}"


def test_the_step_stands_at_the_beginning():
    """Forward pass, loss, backward pass, optimiser: in 150 lines of train.py."""
    text = "\n".join(source("train").splitlines()[:150])
    for line in ("outputs = self.forward_pass(inputs)", "segmentation_loss(outputs,",
                 ".backward()", "run.scaler.step(run.optimizer)", "while True:"):
        assert line in text, line


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_lines_are_narrow(path):
    wide = [i for i, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 88]
    assert not wide, f"{path.name}: wide lines {wide}"


# --- README --------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
COMMANDS = [line.partition("  #")[0].strip() for block in
            re.findall(r"```(?:sh|bash)\n(.*?)```", README + RESULTS, re.S)
            for line in block.replace("\\\n", " ").splitlines()
            if line.strip().startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_are_understood(command):
    """Every command in README and results/ is accepted by the program it calls."""
    if "sixth" in command or "smp" in command:
        return  # files that are not there yet: test_sixth, test_speed run these
    for name, value in (("DIR", "some-folder"), ("$m", "nrd"), ("$seed", "0"),
                        ("$lr", "0.1")):
        command = command.replace(name, value)
    words = shlex.split(command)[1:]
    if command.startswith("torchrun"):  # its own options come first
        words = words[[word.endswith(".py") for word in words].index(True):]
    if words[0] == "train.py":
        args = train.parse(words[1:])
        train.make_recipe(args)
        train.parse_options(args.method, args.set)
    elif words[0] == "evaluate.py":
        evaluate.parse(words[1:])
    elif words[0] == "data.py":
        data.parse(words[1:])
    else:
        assert words[0] in ("-m", *(f"{m}.py" for m in MODULES)), command


def test_rows_of_the_papers_have_the_papers_recipes():
    """Under "The papers' tables" no value of a training is ours, unless it is typed."""
    section = RESULTS.partition("## The papers' tables\n")[2].partition("\n## ")[0]
    commands = [line for line in section.replace("\\\n", " ").splitlines()
                if line.startswith("python train.py")]
    assert len(commands) > 10
    for command in commands:
        args = train.parse(shlex.split(command)[2:])
        ours = [name for name, (_, source) in train.make_recipe(args).items()
                if source.startswith("ours")]
        assert not ours, f"{command}: {ours} are no paper's"


def test_readme_names_files_that_exist():
    for text, folder in ((README, ROOT), (RESULTS, ROOT / "results")):
        for name in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (folder / name).exists(), f"a link to {name}"
        headings = re.findall(r"^##+ (.*)$", text, re.M)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                   for heading in headings}
        assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    assert len(COMMANDS) >= 8


def test_readme_is_short():
    """What is not for the first hour stands in results/README.md."""
    assert len(README.split()) <= 2000


def test_readme_python_runs(stopped, monkeypatch, thin):
    """The lines for one's own code, with the run of a test in the place of theirs."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S)
                if "import sfnet" in block]
    load = common.load_checkpoint
    monkeypatch.setattr(common, "load_checkpoint", lambda path: load(stopped))
    names = {}
    exec(block.replace("512, 1024", "64, 128"), names)
    assert names["logits"].shape == (1, 19, 64, 128)
    assert not names["trained"].training and "res5" in names["features"]


def test_readme_numbers_are_those_of_the_tables():
    """Each row of README's results is a line of results/streets.csv."""
    with open(ROOT / "results/streets.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    section = README.partition("## Results\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w:-]+)`.* \| ([\d. ]+) \| ([\d.]+) \|$", section,
                      re.M)
    assert len(rows) >= 6
    for method, seeds, gmacs in rows:
        assert any(line["method"].split()[0] == method and line["each seed"] == seeds
                   and line["GMACs"].startswith(gmacs + " ") for line in lines), method


def test_all_rows_on_streets_are_those_of_the_table():
    with open(ROOT / "results/streets.csv", newline="") as file:
        for row in csv.reader(file):
            assert f"| {' | '.join(row)} |" in RESULTS, row


def test_speeds_are_those_of_the_tables():
    """Each ratio, median and quartile is that of results/speed-*.csv."""
    section = RESULTS.partition("## How fast are they?\n")[2].partition("\n##")[0]
    shown = {method: cells for method, *cells in re.findall(
        r"^\| `([\w:]+)`.* \| ([\d.]+) \| (.*) \| (.*) \| (.*) \| (.*) \|$", section,
        re.M)}
    tables = []
    for name in ("inference", "training", "bf16", "training-bf16"):
        with open(ROOT / f"results/speed-{name}.csv", newline="") as file:
            tables.append({row["method"]: row for row in csv.DictReader(file)})
    assert list(shown) == list(tables[0]) and len(shown) == 7
    for method, (gmacs, *cells) in shown.items():
        assert gmacs == f"{float(tables[0][method]['GMACs']):.1f}"
        for table, cell in zip(tables, cells):
            ms, low, high = (float(table[method][key]) for key in ("ms", "low", "high"))
            ratio = ms / float(table["smp"]["ms"])
            assert cell == f"{ratio:.2f} ({ms:.0f} ms, {low:.0f} to {high:.0f})"


def test_speeds_on_a_gpu_are_those_of_the_tables():
    """The same of results/speed-gpu*.csv, and memory in float32."""
    tables = []
    for name in ("gpu", "gpu-training", "gpu-bf16", "gpu-training-bf16"):
        with open(ROOT / f"results/speed-{name}.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for rows in zip(*tables, strict=True):
        cells = [f"{float(rows[0]['GMACs']):.1f}"]
        for row, table in zip(rows, tables):
            ms, low, high = (float(row[key]) for key in ("ms", "low", "high"))
            ratio = ms / float(table[0]["ms"])
            cells.append(f"{ratio:.2f} ({ms:.1f} ms, {low:.1f} to {high:.1f})")
        cells.append(", ".join(f"{float(row['peak GB']):.2f}" for row in rows[:2]))
        assert f" | {' | '.join(cells)} |" in RESULTS, rows[0]["method"]


def compared(name):
    """The rows of results/compare-NAME.csv, their numbers as numbers."""
    with open(ROOT / f"results/compare-{name}.csv", newline="") as file:
        return [{"method": row.pop("method").split()[0]} | {
            key: float(value) for key, value in row.items()}
            for row in csv.DictReader(file)]


def between(row, what):
    return f"{row[f'{what} low']:+.4f} to {row[f'{what} high']:+.4f}"


def over_seeds(row):
    """A configuration's cells in the tables that have several seeds of each."""
    cells = (f"`{row['method']}`", f"{row['miou']:.4f}", f"{row['seeds']:.4f}",
             f"{row['difference']:+.4f}", between(row, "difference"),
             f"{row['miou within 3 px']:.4f}")
    return " | ".join(cells)


def test_what_a_seed_and_the_inputs_do_is_from_their_tables():
    """compare's sentence about two seeds, and the rows of NRD's Table 4."""
    first, other = compared("seeds")
    said = evaluate.in_words(other, first).partition(": ")[2]
    assert said in " ".join(RESULTS.split())
    for row in compared("inputs"):
        assert f": {over_seeds(row)} |" in RESULTS, row["method"]
    with_m, _, without_m = compared("inputs")
    shown = [f"{with_m[f'iou {name}']:.2f}{words}{without_m[f'iou {name}']:.2f}"
             for name, words in (("sign", " with NRD's guidance map, "),
                                 ("person", ", "), ("vegetation", ", "))]
    assert (f"signs (IoU {shown[0]} without), people ({shown[1]}), vegetation "
            f"({shown[2]};") in " ".join(RESULTS.split())


def test_widths_of_g_are_those_of_the_table():
    """NRD's Table 2: a row per width, and what the text says of small objects."""
    narrow, wide = sorted(compared("width")[1:], key=lambda row: row["miou"])
    nrd = compared("width")[0]
    for row in (narrow, nrd, wide):
        line = f": {over_seeds(row)} | {row['gmacs']:.3f} |"
        assert line in RESULTS, row["method"]
    gain = {name: 100 * (wide[f"iou {name}"] - nrd[f"iou {name}"])
            for name in ("person", "sign", "fence", "car", "wire", "pole")}
    said = ("people ({person:.1f} points), signs ({sign:.1f}), fences ({fence:.1f}) "
            "and cars ({car:.1f}); wires and poles, which are hardly found by any "
            "width, gain {wire:.1f} and {pole:.1f}.")
    assert said.format(**gain) in " ".join(RESULTS.split())


@pytest.mark.parametrize("paper", ["efficientfcn", "dupsampling", "sfnet"])
def test_what_a_decoder_needs_is_from_its_table(paper):
    """A row for each claim of the paper, beside the whole decoder."""
    for row in compared(paper):
        assert f": {over_seeds(row)} |" in RESULTS, row["method"]


def test_learning_rates_are_those_of_the_table():
    """Three of each method; all but DUpsampling are content with that of our recipe."""
    rates, rows = ("0.01", "0.03", "0.09"), {}
    with open(ROOT / "results/learning-rates.csv", newline="") as file:
        for row in csv.DictReader(file):
            method, *_, rate = row["method"].split()
            rows.setdefault(method, {})[rate.removeprefix("lr=")] = row["mIoU"]
    for method, cell in rows.items():
        assert f"| `{method}` | {' | '.join(cell[rate] for rate in rates)} |" in RESULTS
    asks = [method for method, cell in rows.items()
            if max(map(float, cell.values())) - float(cell["0.03"]) > 0.0045]
    assert len(rows) == 6 and asks == ["dupsampling"]
    low, usual, high = (float(rows["dupsampling"][rate]) for rate in rates)
    text = " ".join(RESULTS.split())
    assert (f"0.09 brings {100 * (high - usual):.1f} points, and 0.01 costs "
            f"{100 * (usual - low):.1f}.") in text
    bilinear, usual, fast = compared("learning-rate")
    said = (f"{fast['miou']:.4f} ± {fast['seeds']:.4f}, where two with 0.03 come to "
            f"{usual['miou']:.4f} ± {usual['seeds']:.4f} "
            f"(`compare-learning-rate.csv`): no more than seeds do. Beyond bilinear "
            f"that is {fast['difference']:+.4f}, 95 % interval over images "
            f"{between(fast, 'difference')}; two seeds as far apart as these ask "
            f"{asked_by_seeds(fast, bilinear):.4f}.")
    assert said in text
    assert fast["miou"] - usual["miou"] < asked_by_seeds(fast, usual)


def test_augmentations_are_those_of_the_table():
    """A row of each, none ahead of our recipe, and the one that two seeds tell from it.
    """
    ours, *others = rows = compared("augmentation")
    for row in rows:
        cells = over_seeds(row).partition(" | ")[2]  # all are nrd:bilinear
        assert f" | {cells} |" in RESULTS, cells
    assert max(rows, key=lambda row: row["miou"]) is ours
    colours, still, wide, held = others
    told = [row for row in others
            if -row["difference"] > asked_by_seeds(row, ours)]
    assert told == [wide]
    text = " ".join(RESULTS.split())
    for row, said in ((wide, "{:.1f} points behind, where {:.1f} are asked"),
                      (held, "is behind by {:.1f}, where {:.1f} are asked")):
        assert said.format(-100 * row["difference"],
                           100 * asked_by_seeds(row, ours)) in text
    apart = {f"{100 * row['seeds'] * 2 ** 0.5:.1f}" for row in (held, still)}
    assert apart == {"2.1"} and "two seeds are 2.1 points apart, as are those" in text
    at_boundary = "difference within 3 px"
    assert (f"ahead by {100 * colours[at_boundary]:.1f} points, 95 % interval over "
            f"images {between(colours, at_boundary)}.)") in text


def test_upper_bounds_are_those_of_the_tables():
    """What could be drawn from the labels: on CamVid one seed of each, on streets two.

    A line for each output stride: bilinear, DUpsampling, and at 32 NRD.
    """
    for name in ("labels", "labels-streets"):
        with open(ROOT / f"results/{name}.csv", newline="") as file:
            cell = {row["method"].split()[0]: row["mIoU"]
                    for row in csv.DictReader(file)}
        at_32 = [cell["dupsampling:bilinear-os32"], cell["dupsampling:no-fusion-os32"],
                 cell["nrd:no-guidance"]]
        at_16 = [cell["dupsampling:bilinear"], cell["dupsampling:no-fusion"]]
        assert f"| 32 | {' | '.join(at_32)}" in RESULTS, name
        assert f"| 16 | {' | '.join(at_16)} | |" in RESULTS, name


def test_twice_the_steps_are_those_of_the_table():
    """What fusion costs DUpsampling after 900 steps in the place of 450."""
    without, fused = compared("dupsampling-long")
    said = (f"({fused['miou']:.4f} and {without['miou']:.4f}, 95 % interval "
            f"{between(fused, 'difference')};")
    assert said in " ".join(RESULTS.split())


def test_networks_without_auxiliary_losses_are_those_of_the_table():
    """A row of each, and which neighbours two seeds of each tell apart."""
    rows = sorted(compared("alone"), key=lambda row: -row["miou"])
    for row in rows:
        assert f"| {over_seeds(row)} |" in RESULTS, row["method"]
    assert len(rows) == 7
    methods = [row for row in rows if "unet" not in row["method"]]
    for one, other in itertools.pairwise(methods):
        assert one["miou"] - other["miou"] > asked_by_seeds(one, other)
    nrd, unet, hgd = rows[2:5]
    asked = asked_by_seeds(nrd, unet), asked_by_seeds(unet, hgd)
    apart = nrd["miou"] - unet["miou"], unet["miou"] - hgd["miou"]
    assert apart[0] < asked[0] and apart[1] < asked[1]
    assert (f"neither from NRD ({100 * apart[0]:.1f} points apart, where "
            f"{100 * asked[0]:.1f} are asked) nor from EfficientFCN "
            f"({100 * apart[1]:.2f}, where {100 * asked[1]:.2f} are)"
            ) in " ".join(RESULTS.split())
    with open(ROOT / "results/streets.csv", newline="") as file:
        usual = {row["method"].split()[0]: float(row["mIoU"].split()[0])
                 for row in csv.DictReader(file) if "official" not in row["method"]}
    names = [row["method"] for row in rows]
    assert names == sorted(names, key=lambda name: -usual[name]), "another order"


def test_what_auxiliary_losses_bring_is_from_their_tables():
    whole, alone = compared("sfnet-aux")
    said = (f"SFNet comes to {whole['miou']:.4f} with its three "
            f"(`compare-sfnet-aux.csv`; without them {alone['difference']:+.4f}, "
            f"95 % interval over images {between(alone, 'difference')}, where two "
            f"seeds would have to be {asked_by_seeds(whole, alone):.4f} apart), ")
    whole, alone = compared("deeplab-aux")
    said += (f"DeepLabv3+ to {whole['miou']:.4f} with its one "
             f"(`compare-deeplab-aux.csv`; {alone['difference']:+.4f}, "
             f"{between(alone, 'difference')}).")
    assert said in " ".join(RESULTS.split())


def asked_by_seeds(row, other):
    """Student's t of two seeds each: how far apart the means must be."""
    error = (row["seeds"] ** 2 / 2 + other["seeds"] ** 2 / 2) ** 0.5
    return evaluate.STUDENT[2] * error


def test_six_on_camvid_are_those_of_the_table():
    """Their rows, and what the text says of images and of seeds."""
    at_boundary = "difference within 3 px"
    bilinear, *others = compared("camvid")
    nrd, hgd, deeplab, dupsampling, sfnet = others
    asked = [f"{100 * asked_by_seeds(row, bilinear):.1f}"
             for row in (nrd, deeplab, dupsampling)]
    text = " ".join(RESULTS.split())
    assert f"asks {asked[0]}, {asked[1]} and {asked[2]} points" in text
    apart = [f"{100 * row['seeds'] * 2 ** 0.5:.1f}" for row in (hgd, sfnet)]
    assert f"two seeds are {apart[0]} and {apart[1]} points apart" in text
    assert (f"({100 * (deeplab['miou'] - nrd['miou']):.1f} points apart, where two "
            f"seeds would take {100 * asked_by_seeds(deeplab, nrd):.1f})") in text
    said = {row["method"]: evaluate.in_words(row, bilinear) for row in others}
    for method in ("nrd", "deeplabv3plus", "dupsampling"):
        assert "other trainings" not in said[method], "seeds tell it apart"
    for method in ("efficientfcn", "sfnet"):
        assert "not told apart" in said[method]
    for row in compared("camvid"):
        cells = (f"`{row['method']}`", f"{row['miou']:.4f}", f"{row['seeds']:.4f}",
                 f"{row['difference']:+.4f}", between(row, "difference"),
                 f"{row['images won']:.0f}, {row['images lost']:.0f}",
                 f"{row[at_boundary]:+.4f}", between(row, at_boundary),
                 f"{row['gmacs']:.2f}")
        assert f"| {' | '.join(cells)} |" in RESULTS, row["method"]


def test_drives_are_those_of_the_tables():
    """A row per drive that was left out, and their means; then six on two of them.

    On the third, 0001TP, three.
    """
    at_boundary = "difference within 3 px"
    rows = []
    for drive in ("0001TP", "0006R0", "0016E5"):
        bilinear, nrd = compared(drive)
        rows.append(nrd)
        cells = (drive, f"{nrd['images']:.0f}", f"{bilinear['miou']:.4f}",
                 f"{nrd['miou']:.4f}", f"{nrd['difference']:+.4f}",
                 between(nrd, "difference"), f"{nrd['images won']:.0f}",
                 f"{nrd[at_boundary]:+.4f}", between(nrd, at_boundary))
        assert f"| {' | '.join(cells)} |" in RESULTS, drive
    for what in ("difference", at_boundary):
        gains = [row[what] for row in rows]
        mean = f"{statistics.mean(gains):+.4f} ± {statistics.stdev(gains):.4f}"
        assert f"| {mean} |" in RESULTS, what
    for drive in ("0001TP", "0006R0", "0016E5"):
        for row in compared(f"methods-{drive}"):
            cells = (drive, f"`{row['method']}`", f"{row['miou']:.4f}",
                     f"{row['difference']:+.4f}", between(row, "difference"),
                     f"{row['images won']:.0f}", f"{row[at_boundary]:+.4f}",
                     between(row, at_boundary), f"{row['gmacs']:.2f}")
            assert f"| {' | '.join(cells)} |" in RESULTS, cells
    bilinear, nrd, hgd = dusk = compared("methods-0001TP")
    gains = [f"{100 * row['difference']:.1f}" for row in (nrd, hgd)]
    text = " ".join(RESULTS.split())
    assert (f"ahead of bilinear's, by {gains[0]} and {gains[1]} points; NRD in "
            f"{nrd['images won']:.0f} of the {nrd['images']:.0f} by their own mIoU, "
            f"EfficientFCN in {hgd['images won']:.0f}. Within 3 pixels of a boundary "
            f"NRD is ahead by {100 * nrd[at_boundary]:.1f}, and") in text
    low, high = (hgd[f"{at_boundary} {end}"] for end in ("low", "high"))
    assert low < 0 < high, "told apart"
    for name, said in (("sky", "sky has an IoU of {:.2f} to {:.2f}"),
                       ("road", "road one of {:.2f} to {:.2f}")):
        ious = [row[f"iou {name}"] for row in dusk]
        assert said.format(min(ious), max(ious)) in text
    drive = compared("drive")
    gains = sorted(after["miou"] - before["miou"] for before, after
                   in zip(compared("drive-neighbours"), drive, strict=True))
    shown = f"score {100 * gains[0]:.1f} to {100 * gains[-1]:.1f} points higher"
    assert shown in " ".join(RESULTS.split())
    width = lambda row: row["difference high"] - row["difference low"]
    frames = compared("drive-frames")
    wider = sorted(width(a) / width(b) for a, b in zip(drive[1:], frames[1:]))
    shown = f"become {wider[0]:.1f} to {wider[-1]:.1f} times as wide"
    assert shown in " ".join(RESULTS.split())


def test_readme_loops_over_methods_that_exist():
    loops = re.findall(r"for m in (.*?); do", RESULTS.replace("\\\n", " "))
    assert loops
    for method in " ".join(loops).split():
        common.load_method(method)
