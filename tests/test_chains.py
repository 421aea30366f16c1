"""Trained on one data set after the other: the commands of results/README.md, small.

Likely mistakes that were planted, and are found: the recipe of a first run for one that
goes on, or the other way round; weights of ImageNet in the recipe of a run that begins
with others; the first run's weights not taken over at all.
"""
import json
import shlex

import pytest
import torch

import train
from common import load_checkpoint
from conftest import ROOT, draw_tree, launch

# What makes a command of the papers small; the last value of an option counts.
SMALL_RUN = ["--backbone", "resnet18", "--weights", "none", "--set", "channels=16",
             "--batch", "2", "--crop", "64", "64", "--iterations", "1", "--workers",
             "0"]
SMALLER = {"mapillary": ["--base-size", "128", "128"]}
# Method, and for each run: data set, learning rate, who says so, number of classes.
CHAINS = {
    "sfnet": [("mapillary", 0.01, "paper, Sec. 4.1", 65),
              ("cityscapes", 0.01, "paper, Sec. 4.1", 19)],
    "dupsampling": [("coco-voc", 0.007, "paper, Sec. 4.2", 21),
                    ("voc-aug", 0.001, "paper, Sec. 4.2", 21),
                    ("voc", 0.0001, "paper, Sec. 4.2", 21)],
    "efficientfcn": [("coco-voc", 0.002, "not stated; the paper's for VOC, Sec. 4.1",
                      21), ("voc-aug", 0.002, "paper, Sec. 4.1", 21)]}


def commands(method) -> list[list[str]]:
    """The words of the runs of a chain, as results/README.md has them."""
    lines = (ROOT / "results/README.md").read_text().splitlines()
    runs = [line for line in lines
            if line.startswith(f"python train.py --method {method} ")]
    goes_on = [i for i, line in enumerate(runs) if "--finetune-from" in line]
    return [shlex.split(line)[2:] for line in runs[goes_on[0] - 1:goes_on[-1] + 1]]


@pytest.mark.parametrize("method", CHAINS)
def test_the_runs_of_a_chain_go_on_from_each_other(method, tmp_path, thin, monkeypatch,
                                                   capsys):
    """Each begins with the last one's weights and has its own recipe, with sources.

    What has the shape of other classes is dropped, and it is said; with the same
    classes everything is taken over, W of DUpsampling as well.
    """
    monkeypatch.chdir(tmp_path)  # so that runs/ of the commands is here
    chain, before, classes_before = commands(method), None, None
    assert len(chain) == len(CHAINS[method])
    for words, (dataset, rate, source, classes) in zip(chain, CHAINS[method]):
        root = draw_tree(tmp_path / dataset, dataset)
        folder = words[words.index("--out") + 1] if "--out" in words else "runs/end"
        launch(*[root if word == "DIR" else word for word in words], *SMALL_RUN,
               *SMALLER.get(dataset, []), "--out", folder)
        said = capsys.readouterr().out
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["dataset"], len(config["classes"])) == (dataset, classes)
        assert config["recipe"]["lr"] == {"value": rate, "source": source}
        start = load_checkpoint(f"{folder}/prev.pt")
        assert start["iteration"] == 0
        if before:
            assert config["recipe"]["weights"]["source"].startswith("--finetune-from")
            fits = {name for name, x in start["model"].items()
                    if x.shape == before[name].shape}
            assert f"{len(fits)} of {len(start['model'])} tensors taken over" in said
            assert all(torch.equal(start["model"][n], before[n]) for n in fits)
            assert ("dropped: " in said) == (classes != classes_before)
            assert "of the labels' variance" not in said, "a W that was not used"
        before, classes_before = load_checkpoint(folder)["model"], classes


def test_only_a_run_that_goes_on_has_the_recipe_of_one():
    """`finetuned ..` needs --finetune-from; without such a recipe the usual one is it.
    """
    def rate(*more):
        argv = ["--method", "dupsampling", "--backbone", "xception65", "--dataset"]
        return train.make_recipe(train.parse([*argv, *more]))["lr"][0]
    goes_on = ["--finetune-from", "runs/x"]
    assert (rate("voc"), rate("voc", *goes_on)) == (0.007, 0.0001)
    assert (rate("voc-aug"), rate("voc-aug", *goes_on)) == (0.007, 0.001)
    assert rate("context59") == rate("context59", *goes_on) == 0.007
    assert rate("voc", *goes_on, "--lr", "0.5") == 0.5
