"""Streets, labels and layouts, augmentation and randomness of the data sets."""
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import data
import train
from common import UserError
from conftest import RAW_IDS, VOC, draw_tree, save, tree_files, voc_colour

# --- streets -------------------------------------------------------------------------


def test_a_street_depends_on_split_and_index_only():
    """Same scene every time, another one for another index or split."""
    image, ids = data.draw_street("train", 3)
    again = data.draw_street("train", 3)
    assert np.array_equal(image, again[0]) and np.array_equal(ids, again[1])
    for other in (("train", 4), ("val", 3)):
        assert not np.array_equal(ids, data.draw_street(*other)[1])
    assert image.shape == (128, 256, 3) and image.dtype == ids.dtype == np.uint8


def test_streets_hold_every_class_often_and_thin_things_too():
    """Over 30 scenes: every class in at least 60 %, thin ones over 0.5 % of pixels."""
    masks = np.stack([data.draw_street("val", i)[1] for i in range(30)])
    for c, name in enumerate(data.STREETS_CLASSES):
        assert (masks == c).any((1, 2)).mean() >= 0.6, f"{name} is too rare"
        assert (masks == c).mean() >= 0.005, f"{name} covers too few pixels"
    assert masks.max() < len(data.STREETS_CLASSES)


def test_difficulty_makes_classes_look_alike_and_leaves_labels_alone():
    """Whoever guesses each pixel's class from its colour errs ever more often."""
    right = []
    for difficulty in (0.0, 0.5, 1.0):
        scenes = [data.draw_street("val", i, difficulty=difficulty) for i in range(8)]
        colours = np.concatenate([s[0].reshape(-1, 3)[::7] for s in scenes]).astype(int)
        ids = np.concatenate([s[1].ravel()[::7] for s in scenes])
        means = np.stack([colours[ids == c].mean(0) for c in range(11)])
        guess = np.square(colours[:, None] - means).sum(2).argmin(1)
        right.append((guess == ids).mean())
        assert np.array_equal(scenes[5][1], data.draw_street("val", 5)[1])
    assert right[0] > right[1] + 0.05 > right[2] + 0.1, right


def test_streets_are_drawn_faster_than_they_are_eaten():
    """A training step takes over 40 ms an image on two cores; a scene about 5."""
    seconds = []
    for i in range(10):
        start = time.process_time()
        data.draw_street("train", i)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.04, "training would wait for its pictures"


# --- Layouts, values and names -------------------------------------------------------

PUBLISHED = sorted(set(data.SOURCES) - {"folder"})
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
TABLES = {  # raw value -> class id; whatever is missing is illegal
    "camvid": {i: i for i in range(11)} | {11: 255, 255: 255},
    "cityscapes": {i: 255 for i in range(34)} | {255: 255} | {
        7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10,
        24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
    "voc": {i: i for i in range(21)} | {255: 255},
    "voc-aug": {i: i for i in range(21)} | {255: 255},
    "coco-voc": {i: i for i in range(21)} | {255: 255},
    "ade20k": {0: 255} | {i: i - 1 for i in range(1, 151)},
    "mapillary": {i: i for i in range(65)} | {65: 255},
    "context59": {0: 255, 255: 255} | {i: i - 1 for i in range(1, 60)},
    "context60": {i: i for i in range(60)} | {255: 255},
    "folder": {0: 0, 1: 1, 2: 2, 255: 255},
}
NAMES = {  # how many classes; some of them and their colours
    "camvid": (11, {0: ("sky", (128, 128, 128)), 10: ("bicyclist", (0, 128, 192))}),
    "cityscapes": (19, {0: ("road", (128, 64, 128)), 18: ("bicycle", (119, 11, 32))}),
    "voc": (21, {0: ("background", (0, 0, 0)), 1: ("aeroplane", (128, 0, 0)),
                 2: ("bicycle", (0, 128, 0)), 3: ("bird", (128, 128, 0)),
                 4: ("boat", (0, 0, 128)), 8: ("cat", (64, 0, 0)),
                 15: ("person", (192, 128, 128)), 20: ("tvmonitor", (0, 64, 128))}),
    "ade20k": (150, {0: ("wall", (120, 120, 120)), 1: ("building", (180, 120, 120)),
                     7: ("bed", (204, 5, 255)), 12: ("person", (150, 5, 61)),
                     44: ("chest of drawers", (6, 51, 255)),
                     149: ("flag", (92, 0, 255))}),
    "mapillary": (65, {0: ("Bird", (165, 42, 42)), 13: ("Road", (128, 64, 128)),
                       19: ("Person", (220, 20, 60)), 55: ("Car", (0, 0, 142)),
                       64: ("Ego Vehicle", (120, 10, 10))}),
    "context59": (59, {0: ("aeroplane", (180, 120, 120)), 54: ("tvmonitor", None),
                       57: ("window", None), 58: ("wood", (31, 0, 255))}),
    "context60": (60, {0: ("background", (120, 120, 120)), 1: ("aeroplane", None),
                       2: ("bag", (6, 230, 230)), 55: ("tvmonitor", None),
                       58: ("window", None), 59: ("wood", (31, 0, 255))}),
}


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"coco-voc"}))  # has no masks
def test_raw_values_become_class_ids(tmp_path, name):
    """Every value that a distributed mask may hold, by a table written by hand."""
    root = draw_tree(tmp_path, name)
    for split in ("train", "val"):
        dataset = data.open_dataset(name, split, root=str(root))
        table = TABLES[name]
        raw = np.array(Image.open(dataset.pairs[0][1]))
        labels = dataset.load(0)[1].numpy()
        assert set(np.unique(raw)) == set(RAW_IDS[name])
        for value in np.unique(raw):
            got = set(labels[raw == value].tolist())
            assert got == {table[value]}, f"{name}: {value} in the file became {got}"
        legal = set(np.flatnonzero(dataset.lut >= 0))
        assert legal == set(table), f"{name}: {legal ^ set(table)} wrongly (il)legal"


@pytest.mark.parametrize("name", [*NAMES, "voc-aug", "coco-voc"])
def test_classes_have_their_names_and_colours(tmp_path, name):
    """Issue 1940 of mmsegmentation: ids 55 and 58 of Context are tvmonitor, window."""
    root = draw_tree(tmp_path, name)
    info = data.open_dataset(name, "val", root=str(root)).info
    count, some = NAMES["voc" if "voc" in name else name]
    assert info.name == name and len(info.classes) == len(info.palette) == count
    assert len(set(info.classes)) == count, "a class twice"
    assert all(label == label.strip() for label in info.classes)
    for label, (text, colour) in some.items():
        assert info.classes[label] == text
        assert info.palette[label] == (colour or info.palette[label])
    if "context" in name:
        named = [text for text in info.classes if text != "background"]
        assert named == sorted(named), "the files are numbered alphabetically"


def test_voc_palette_is_the_bit_shuffle():
    """A palette PNG of VOC has the colours of the devkit's loop."""
    for label, colour in enumerate(data.SOURCES["voc"].palette):
        assert list(colour) == voc_colour(label), f"class {label}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_raw_values_invert_the_table(name):
    """What is written for a test server is what the masks of the data set hold."""
    count = len(data.SOURCES[name].classes)
    raw = data.raw_values(name, count)
    assert raw.dtype == np.uint8
    assert [TABLES[name][value] for value in raw] == list(range(count))
    by_hand = {"cityscapes": list(CITY_IDS), "ade20k": list(range(1, 151)),
               "voc": list(range(21))}
    assert raw.tolist() == by_hand.get(name, raw.tolist())
    assert data.raw_values("folder", 3).tolist() == [0, 1, 2]


def test_cityscapes_train_ids_are_read_when_they_are_all_there_is(tmp_path):
    """.. and a submission still holds labelIds; a mixture would misread one split."""
    root = draw_tree(tmp_path, "cityscapes")
    opened = data.open_dataset("cityscapes", "val", root=str(root))
    before = opened.load(0)[1]
    for index, (_, path) in enumerate(opened.pairs):
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")),
             opened.labels(index).numpy())
        path.unlink()
    after = data.open_dataset("cityscapes", "val", root=str(root)).load(0)[1]
    assert torch.equal(before, after)
    assert data.raw_values("cityscapes", 19).tolist() == list(CITY_IDS)
    with pytest.raises(UserError, match="keep one kind"):
        data.open_dataset("cityscapes", "trainval", root=str(root))


def test_folder_takes_names_and_colours_from_classes_txt(tmp_path):
    root = draw_tree(tmp_path, "folder")
    made_up = data.open_dataset("folder", "train", root=str(root)).info
    assert made_up.classes == ("class0", "class1", "class2")
    (root / "classes.txt").write_text(
        "0 road 1 2 3\n2 traffic light 7 8 9\n1 car 4 5 6\n")
    info = data.open_dataset("folder", "train", root=str(root)).info
    assert info.classes == ("road", "car", "traffic light")
    assert info.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    (root / "classes.txt").write_text("0 road 1 2 3\n1 car 4 5 6\n")
    with pytest.raises(UserError,
                       match="illegal label values 2 .* legal are 0..1 and 255"):
        data.open_dataset("folder", "train", root=str(root)).load(0)


def test_two_classes_of_one_colour_cannot_be_told_apart_by_it(tmp_path):
    """Masks of ids do not mind; an RGB mask is refused, not read as one of the two."""
    root = draw_tree(tmp_path, "folder")
    (root / "classes.txt").write_text("0 a 1 2 3\n1 b 1 2 3\n2 c 7 8 9\n")
    folder = data.open_dataset("folder", "train", root=str(root))
    assert folder.load(0)[1].max() <= 255
    mask = folder.pairs[0][1]
    Image.fromarray(np.full((8, 8, 3), (1, 2, 3), np.uint8)).save(mask)
    with pytest.raises(UserError, match="if each class has a colour of its own"):
        folder.load(0)


def test_a_palette_that_contradicts_its_numbers_is_refused(tmp_path):
    """Some programs save a mask of colours as numbers of their own with a palette."""
    colours = {(1, 2, 3): 0, (4, 5, 6): 1}
    ids = np.array([[0, 1]], np.uint8)
    for palette, fits in (([1, 2, 3, 4, 5, 6], True), ([4, 5, 6, 1, 2, 3], False),
                          ([9, 9, 9, 8, 8, 8], True),  # colours of no class: numbers
                          ([1, 2, 3, 1, 2, 3], True)):  # no palette to speak of
        mask = Image.fromarray(ids, "P")
        mask.putpalette(palette)
        mask.save(tmp_path / "m.png")
        if fits:
            assert (data.read_mask(tmp_path / "m.png", colours) == ids).all()
            continue
        with pytest.raises(UserError, match="colours are classes.txt's, but those of"):
            data.read_mask(tmp_path / "m.png", colours)


def test_folder_overlooks_what_is_hidden(tmp_path):
    """Editors and file managers leave previews there, whose names start with a dot."""
    root = draw_tree(tmp_path, "folder")
    before = data.open_dataset("folder", "train", root=str(root)).pairs
    for hidden in (".0.png", ".previews/0.png"):
        save(root / "train" / "images" / hidden, np.zeros((8, 8), np.uint8))
    assert data.open_dataset("folder", "train", root=str(root)).pairs == before


@pytest.mark.parametrize("name", TABLES)
def test_trainval_is_train_then_val(tmp_path, name):
    root = str(draw_tree(tmp_path, name))
    train, val, both = (data.open_dataset(name, split, root=root)
                        for split in ("train", "val", "trainval"))
    assert both.pairs == train.pairs + val.pairs, "not train, then val"
    assert torch.equal(both.load(3)[1], val.load(1)[1])
    assert both.info == train.info and not set(train.pairs) & set(val.pairs)


@pytest.mark.parametrize("name", ["cityscapes", "voc", "ade20k"])
def test_test_splits_have_images_alone(tmp_path, name):
    """No labels are made up for them; not even from Cityscapes' dummy masks."""
    root = str(draw_tree(tmp_path, name, splits=("test",)))
    test = data.open_dataset(name, "test", root=root)
    assert not test.has_labels and test.image(1).shape == (3, 64, 96)
    for read in (test.load, test.labels):
        with pytest.raises(UserError, match=f"{name} test has no public labels; pred"):
            read(0)


def test_data_with_labels_says_so(tmp_path):
    root = str(draw_tree(tmp_path, "camvid", splits=("train", "val", "test")))
    for dataset in (data.open_dataset("camvid", "test", root=root),
                    data.open_dataset("streets", "val")):
        assert dataset.has_labels and torch.equal(dataset.image(1), dataset.load(1)[0])


def test_voc_aug_reads_both_kinds_of_lists_and_masks(tmp_path):
    """trainaug.txt with bare names; VOC's own masks for images that SBD lacks."""
    root = draw_tree(tmp_path, "voc-aug")
    base = root / VOC
    before = data.open_dataset("voc-aug", "train", root=str(root))
    lists = base / "ImageSets" / "Segmentation"
    names = [path.stem for path, _ in before.pairs]
    (lists / "train_aug.txt").unlink()
    (lists / "trainaug.txt").write_text("\n".join(names))
    after = data.open_dataset("voc-aug", "train", root=str(root))
    assert after.pairs == before.pairs
    assert all("SegmentationClassAug" in str(mask) for _, mask in after.pairs)
    own = base / "SegmentationClass" / f"{names[0]}.png"
    save(own, np.zeros((64, 96), np.uint8))
    both = data.open_dataset("voc-aug", "train", root=str(root))
    assert both.pairs == after.pairs, "SBD's masks are what the list names"
    (base / "SegmentationClassAug" / own.name).rename(own)
    masks = [mask for _, mask in
             data.open_dataset("voc-aug", "train", root=str(root)).pairs]
    assert masks == [own, after.pairs[1][1]]
    val = data.open_dataset("voc-aug", "val", root=str(root))
    assert all("SegmentationClass/" in str(mask) for _, mask in val.pairs)


def test_mapillary_reads_the_labels_of_both_downloads(tmp_path):
    """2.0 has 1.2's labels in a folder of their own, beside 124 other classes."""
    root = draw_tree(tmp_path, "mapillary")
    before = data.open_dataset("mapillary", "val", root=str(root))
    mask = before.pairs[0][1]
    expected = before.labels(0)
    assert (expected == 255).any() and expected[expected < 255].max() == 64
    moved = mask.parents[1] / "v1.2" / "labels"
    moved.parent.mkdir()
    mask.parent.rename(moved)
    save(mask.parents[1] / "v2.0" / "labels" / mask.name,
         np.full((64, 96), 123, np.uint8))
    after = data.open_dataset("mapillary", "val", root=str(root))
    assert after.pairs[0][1] == moved / mask.name
    assert torch.equal(after.labels(0), expected)


def test_mapillary_is_made_2048_long_before_it_is_augmented():
    """Large and small images alike, upright ones too; the random scale comes on top."""
    base_size = train.make_recipe(
        train.parse(["--dataset", "mapillary"]))["base_size"][0]
    for size, expected in (((300, 400), (1536, 2048)), ((200, 100), (2048, 1024))):
        image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
        labels = tv_tensors.Mask(torch.zeros(*size, dtype=torch.uint8))
        scaled = data.random_scale(image, labels, (1.0, 1.0), base_size)
        assert scaled[0].shape[-2:] == scaled[1].shape == expected
        scaled = data.random_scale(image, labels, (0.5, 0.5), base_size)
        assert scaled[1].shape == tuple(n // 2 for n in expected)


EXPECTED = {"camvid": (367, 101, 233), "cityscapes": (2975, 500, 1525),
            "voc": (1464, 1449, 1456), "voc-aug": (10582, 1449, 1456),
            "coco-voc": (None, 5000), "ade20k": (20210, 2000, 3352),
            "mapillary": (18000, 2000),
            "context59": (4998, 5105), "context60": (4998, 5105)}


def test_splits_have_their_published_sizes():
    for name in PUBLISHED:
        counts = zip(("train", "val", "test"), EXPECTED[name])
        known = {split: n[0] if n else None
                 for split, n in data.SOURCES[name].counts.items()}
        assert known == dict(counts), name


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "voc"])
def test_the_right_number_of_images_is_silent_and_another_is_not(tmp_path, name, capsys,
                                                                monkeypatch):
    """Whole val splits of empty files: listed, counted, and none of them opened."""
    expected, lists = EXPECTED[name][1], {}
    for i in range(expected):
        *files, listed = tree_files(name, "val", i)
        for path in [tmp_path / file for file in files]:
            if i == 0:
                path.parent.mkdir(parents=True)
            path.touch()
        lists.setdefault(listed, []).append(f"{path.stem}\n")
    for listed in filter(None, lists):
        (tmp_path / listed).parent.mkdir(parents=True)
        (tmp_path / listed).write_text("".join(lists[listed]))
    few = draw_tree(tmp_path / "few", name)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    started = time.process_time()
    data.open_dataset(name, "val", root=str(tmp_path))
    assert time.process_time() - started < 5, "each file must not be searched for"
    assert capsys.readouterr().err == ""
    data.open_dataset(name, "val", root=str(few))
    warning = f"warning: {name} val: 2 images, the data set has {expected}"
    assert capsys.readouterr().err.startswith(warning)


# --- Augmentation and randomness -----------------------------------------------------


def augmented(seed=0, **more):
    options = dict(crop=(64, 96), scale=(0.5, 2.0), photometric=True) | more
    return data.Augmented(data.open_dataset("streets", "train"), seed=seed, **options)


def test_augmentation_never_invents_an_id():
    """Nearest for masks: a mask of ids 0 and 10 never gets a 5 where they meet."""
    class TwoIds(data.Streets):
        def load(self, index):
            image, labels = super().load(index)
            return image, (labels > 3).byte() * 10
    samples = data.Augmented(TwoIds("train", difficulty=0.5), seed=0, crop=(96, 200),
                             scale=(0.3, 1.5), photometric=True)
    for index in range(6):
        image, labels = samples[0, index]
        assert set(labels.unique().tolist()) <= {0, 10, 255}, "ids were blended"
        assert image.shape == (3, 96, 200) and labels.shape == (96, 200)


def test_padding_is_the_mean_colour_and_ignored():
    """A picture smaller than the crop: padding is about 0 when normalised, and 255."""
    image, labels = augmented(crop=(300, 300), scale=(1.0, 1.0),
                              photometric=False)[0, 0]
    assert (labels == 255).sum() == 300 * 300 - 128 * 256
    assert image[:, labels == 255].abs().max() < 0.02


def test_the_upper_bound_reads_its_labels():
    """One plane of 0 and 1 per class; where nothing is labelled, all of them are 0.

    Else it is the image, normalised. The loaders hand on what was asked for, and after
    scale, crop and flip the planes are still those of the labels beside them.
    """
    info = data.Info("three", ("a", "b", "c"), ((0, 0, 0),) * 3)
    image = torch.full((3, 1, 4), 255, dtype=torch.uint8)
    labels = torch.tensor([[0, 2, 255, 1]], dtype=torch.uint8)
    planes = data.network_input(image, labels, info, True)
    assert planes.dtype == torch.float32
    assert planes.tolist() == [[[1, 0, 0, 0]], [[0, 0, 0, 1]], [[0, 1, 0, 0]]]
    white = [(1 - mean) / std for mean, std in zip(data.MEAN, data.STD)]
    seen = data.network_input(image, labels, info, False)
    assert torch.allclose(seen, torch.tensor(white)[:, None, None].expand(3, 1, 4))
    streets = data.open_dataset("streets", "val")
    plan = data.Batches(100, 2, start=0, stop=1, seed=0)
    augmentation = dict(crop=(160, 96), scale=(0.5, 2.0), photometric=True)
    for batches in (
            data.train_loader(streets, plan, workers=0, upper_bound=True,
                              **augmentation),
            data.val_loader(streets, workers=0, upper_bound=True),
            data.whole_loader(streets, [0, 1], 2, workers=0, upper_bound=True)):
        planes, labels = next(iter(batches))
        assert planes.shape[1] == 11
        assert torch.equal(planes.sum(1), (labels != 255).float())
        assert torch.equal(planes.argmax(1)[labels != 255],
                           labels[labels != 255].long())


def test_image_and_labels_move_together():
    """An image that shows its own labels still does after scale, crop and flip."""
    ids = torch.from_numpy(data.draw_street("train", 1)[1])
    image = tv_tensors.Image(ids.expand(3, -1, -1) * 20)
    labels = tv_tensors.Mask(ids)
    for seed in range(5):
        torch.manual_seed(seed)
        scaled = data.random_scale(image, labels, (1.5, 1.5))
        a, b = data.FLIP(*data.random_crop(*scaled, (64, 96)))
        agree = (a[0].int() - 20 * b.int()).abs() <= 10
        assert agree.float().mean() > 0.75, "labels slid against the image"


@pytest.mark.parametrize("factor", [0.75, 0.8, 1.3, 1.5])
def test_labels_are_not_moved_against_the_image_by_a_scale(factor):
    """The centres of white squares stay those of their labels, on average.

    torch's "nearest" and OpenCV's read pixel floor(i / factor), half a pixel beside it.
    """
    offsets = []
    for top, left in torch.randint(5, 35, (40, 2)).tolist():
        labels = torch.zeros(61, 83, dtype=torch.uint8)
        labels[top:top + 20, left:left + 24] = 1
        image = tv_tensors.Image(labels.expand(3, -1, -1) * 255)
        image, labels = data.random_scale(image, tv_tensors.Mask(labels),
                                          (factor, factor))
        offsets.append(centre(labels) - centre(image[0]))
    offset = torch.stack(offsets).mean(0)
    assert offset.abs().max() < 0.2, f"labels lie {offset.tolist()} pixels beside"


def centre(mass):
    """(row, column) of the centre of gravity."""
    mass = mass.double()
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in mass.shape)
    return torch.stack([(mass.sum(1) * rows).sum(), (mass.sum(0) * columns).sum()]
                       ) / mass.sum()


def test_a_crop_of_nothing_but_void_is_not_taken():
    """As mmsegmentation's rule; at the first try more than half hold no label."""
    labels = torch.full((64, 64), 255, dtype=torch.uint8)
    labels[:32, :32] = torch.arange(32) % 3
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    for seed in range(20):
        torch.manual_seed(seed)
        _, crop = data.random_crop(image, tv_tensors.Mask(labels), (16, 16), tries=200)
        assert (crop != 255).any()


def test_crop_avoids_one_class_filling_it():
    """75 % rule: a corner of other classes is found though most crops are one class."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:32, :32] = torch.arange(32) % 3
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    share = []
    for seed in range(20):
        torch.manual_seed(seed)
        _, crop = data.random_crop(image, tv_tensors.Mask(labels), (32, 32), tries=100)
        share.append((crop == 0).float().mean().item())
    assert max(share) <= 0.75, share


def test_samples_do_not_depend_on_the_number_of_workers():
    """Same batches with 0, 1 and 2 workers; another seed or epoch gives others."""
    def batches(workers, seed=0):
        plan = data.Batches(600, 4, start=148, stop=152, seed=seed)
        return [b for pair in data.train_loader(
            data.open_dataset("streets", "train"), plan, workers=workers, crop=(64, 96),
            scale=(0.5, 2.0), photometric=True) for b in pair]
    alone = batches(0)
    for workers in (1, 2):
        assert all(map(torch.equal, alone, batches(workers))), (
            f"{workers} workers differ")
    assert not torch.equal(alone[0], batches(0, seed=1)[0])


def test_augmentation_leaves_the_global_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augmented()[0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_every_epoch_is_a_permutation_and_can_start_anywhere():
    plan = lambda start: list(data.Batches(10, 3, start=start, stop=9, seed=0))
    whole = plan(0)
    first_epoch = [i for batch in whole[:3] for _, i in batch]
    assert len(set(first_epoch)) == 9 and {e for b in whole[:3] for e, _ in b} == {0}
    assert whole[3][0][0] == 1 and [i for _, i in whole[3]] != [i for _, i in whole[0]]
    assert plan(4) == whole[4:], "resuming at 4 must see what a straight run sees"
    with pytest.raises(UserError, match="batch 11 is larger"):
        data.Batches(10, 11, start=0, stop=1, seed=0)


# --- Pictures ------------------------------------------------------------------------


def test_a_mosaic_shows_every_tile_whole_and_as_it_is():
    """Tiles of all sizes apart from each other on white, the legend below them."""
    info = data.Info("two", ("road", "sky"), ((1, 2, 3), (4, 5, 6)))
    sizes = [[(30, 120), (50, 90)], [(40, 100)]]
    rows = [[np.full((*size, 3), 50 + i, np.uint8) for i, size in enumerate(row)]
            for row in sizes]
    sheet = np.array(data.mosaic(rows, info, titles=("image", "labels")))
    below = data.legend(info, 218)  # 120 + 90, and 4 beside each tile
    assert sheet.shape == (20 + 54 + 44 + len(below), 218, 3)
    assert np.array_equal(sheet[-len(below):], below)
    shown = [(slice(22, 52), slice(2, 122)), (slice(22, 72), slice(126, 216)),
             (slice(76, 116), slice(2, 102))]
    for where, tile in zip(shown, sum(rows, [])):
        assert np.array_equal(sheet[where], tile)
        sheet[where] = 255
    assert (sheet[:20] != 255).any(), "no titles"
    assert (sheet[20:-len(below)] == 255).all(), "something else than the tiles"


def test_a_title_stands_over_its_column():
    """In a row of small pictures, too: all tiles of a column begin at one place."""
    info = data.Info("two", ("road", "sky"), ((1, 2, 3), (4, 5, 6)))
    rows = [[np.full((20, width, 3), 50, np.uint8)] * 2 for width in (40, 160)]
    sheet = np.array(data.mosaic(rows, info, titles=("a", "b")))
    for top in (22, 46):  # of the first and the second row
        assert (sheet[top, [2, 166]] == 50).all()
        assert (sheet[top, [1, 165]] == 255).all()
    written = (sheet[:20] != 255).any((0, 2)).nonzero()[0]
    assert written.min() < 20 and 166 <= written.max() < 190


@pytest.mark.parametrize("base_size, expected", [
    ((0, 0), (120, 200)), ((2048, 512), (512, 853)), ((400, 300), (240, 400)),
    ((300, 400), (240, 400)), ((608, 608), (365, 608))])
def test_an_image_is_made_to_fit_before_it_is_scaled(base_size, expected):
    """mmsegmentation's img_scale: the ratio stays, neither side exceeds its limit."""
    image = tv_tensors.Image(torch.zeros(3, 120, 200, dtype=torch.uint8))
    labels = tv_tensors.Mask(torch.zeros(120, 200, dtype=torch.uint8))
    scaled = data.random_scale(image, labels, (1.0, 1.0), base_size)
    assert scaled[0].shape[-2:] == scaled[1].shape == expected
