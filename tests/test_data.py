"""Labels, layouts, augmentation and randomness of the data sets."""
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import data
from common import UserError
from conftest import draw_tree, save

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
    """A training step takes over 40 ms an image on two cores; a scene far under 30."""
    data.draw_street("train", 0)
    start = time.process_time()
    for i in range(10):
        data.draw_street("train", i)
    assert (time.process_time() - start) / 10 < 0.03


# --- Layouts -------------------------------------------------------------------------


def test_camvid_void_is_ignored_and_classes_keep_their_ids(tmp_path):
    dataset = data.open_dataset("camvid", "val",
                                root=str(draw_tree(tmp_path, "camvid")))
    raw = np.array(Image.open(dataset.pairs[0][1]))
    labels = dataset.load(0)[1].numpy()
    assert (labels[raw == 11] == 255).all()
    assert (labels[raw < 11] == raw[raw < 11]).all()
    assert len(dataset.info.classes) == len(dataset.info.palette) == 11


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    """Official table: 7 road -> 0, 11 building -> 2, 33 bicycle -> 18, void -> 255."""
    dataset = data.open_dataset("cityscapes", "val",
                                root=str(draw_tree(tmp_path, "cityscapes")))
    raw = np.array(Image.open(dataset.pairs[0][1]))
    labels = dataset.load(0)[1].numpy()
    table = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10,
             24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for value in np.unique(raw):
        expected = table.get(int(value), 255)
        assert (labels[raw == value] == expected).all(), f"labelId {value}"
    assert dataset.info.classes[0] == "road" and dataset.info.classes[18] == "bicycle"


def test_cityscapes_train_ids_are_read_when_they_are_all_there_is(tmp_path):
    root = draw_tree(tmp_path, "cityscapes")
    before = data.open_dataset("cityscapes", "val", root=str(root)).load(0)[1]
    opened = data.open_dataset("cityscapes", "val", root=str(root))
    for index, (_, path) in enumerate(opened.pairs):
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")),
             opened.labels(index).numpy())
        path.unlink()
    after = data.open_dataset("cityscapes", "val", root=str(root)).load(0)[1]
    assert torch.equal(before, after)


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


# --- Faults: each one sentence that names the file and the cause ---------------------

MASKS = {
    "illegal value": (np.full((64, 96), 200, np.uint8),
                      r"illegal label values 200 \(6144 px\)"),
    "colour": (np.zeros((64, 96, 3), np.uint8), "mode RGB.*colour-coded"),
    "16 bit": (np.zeros((64, 96), np.uint16), "mode I;16.*16- or 32-bit"),
    "other size": (np.zeros((32, 96), np.uint8), r"mask is \(32, 96\) but its image"),
    "labelIds": (np.full((64, 96), 26, np.uint8), "Cityscapes labelIds"),
}


@pytest.mark.parametrize("fault", MASKS)
def test_bad_mask_is_named_with_its_cause(tmp_path, fault):
    dataset = data.open_dataset("camvid", "train",
                                root=str(draw_tree(tmp_path, "camvid")))
    mask, message = MASKS[fault]
    path = save(dataset.pairs[1][1], mask)
    with pytest.raises(UserError, match=message) as caught:
        data.check_some(dataset)
    assert str(path) in str(caught.value)


def test_binary_mask_is_recognised():
    assert "binary" in data.likely_cause(np.array([0, 255]))


@pytest.mark.parametrize("content, message", [(b"", "not an image"),
                                              (b"hello", "not an image"),
                                              (None, "truncated")])
def test_unreadable_file_is_named(tmp_path, content, message):
    dataset = data.open_dataset("camvid", "train",
                                root=str(draw_tree(tmp_path, "camvid")))
    path = dataset.pairs[0][0]
    path.write_bytes(path.read_bytes()[:4000] if content is None else content)
    with pytest.raises(UserError, match=message) as caught:
        dataset.load(0)
    assert str(path) in str(caught.value)


def test_missing_parts_print_the_expected_tree(tmp_path):
    with pytest.raises(UserError, match="needs --data-root(.|\n)*trainannot/NAME.png"):
        data.open_dataset("camvid", "train")
    with pytest.raises(UserError, match="no folder"):
        data.open_dataset("camvid", "train", root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError,
                       match="no images for split 'val'(.|\n)*leftImg8bit/val"):
        data.open_dataset("cityscapes", "val", root=str(tmp_path))
    root = draw_tree(tmp_path / "c", "camvid")
    (root / "valannot" / "0000.png").unlink()
    with pytest.raises(UserError, match="1 of 2 images have no mask.*0000.png"):
        data.open_dataset("camvid", "val", root=str(root))
    root = draw_tree(tmp_path / "f", "folder")
    (root / "train" / "images" / "1.jpg").unlink()
    with pytest.raises(UserError, match="masks without an image: 1"):
        data.open_dataset("folder", "train", root=str(root))


def test_unusual_images_are_read_upright_in_rgb(tmp_path):
    """Grey, RGBA, palette and EXIF-rotated pictures all become (3, H, W)."""
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    for mode in ("L", "RGBA", "P"):
        picture.convert(mode).save(tmp_path / f"{mode}.png")
        assert data.read_image(tmp_path / f"{mode}.png").shape == (3, 4, 6)
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 6, 4)


def test_palette_mask_keeps_its_ids(tmp_path):
    """Mode P must not be converted: grey values would replace the ids."""
    mask = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8), mode="P")
    mask.putpalette([9, 9, 9, 200, 30, 30, 30, 200, 30] + [77] * 759)
    mask.save(tmp_path / "p.png")
    assert data.read_mask(tmp_path / "p.png").tolist() == [[0, 1, 2, 255]]


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
