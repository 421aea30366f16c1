"""COCO's objects as masks of VOC's classes: outlines, run lengths, what is ignored.

Likely mistakes that were planted, and are found: an outline that is filled where it
winds twice, or the pieces of one object filled by the parity of both; runs along rows;
a sign, a second digit, or the sum of differences left out in the compressed form; a
category's id taken for a class; crowds or small objects learned; a table in front of
what stands on it.
"""

import numpy as np
import pytest

import data
from common import UserError
from conftest import box, draw_coco, save, thing

CLASSES = data.SOURCES["voc"].classes
PERSON, SOFA, TABLE, BOTTLE = map(
    CLASSES.index, ("person", "sofa", "diningtable", "bottle"))


def painted(root, *objects) -> np.ndarray:
    """The labels (64, 96) of one image of val that has these objects."""
    draw_coco(root, "val", [list(objects)])
    return data.open_dataset("coco-voc", "val", root=str(root)).load(0)[1].numpy()


def drawn(region: np.ndarray) -> str:
    """A mask as text, # where it is true: a failure shows both pictures."""
    rows = ("".join(".#"[value] for value in row) for row in region.astype(int))
    return "\n".join(rows)


# --- Where an object is --------------------------------------------------------------


def test_an_outline_that_winds_twice_leaves_a_hole():
    """By parity: who crosses the outline twice on the way in is outside again.

    One line around the outer square, along a bridge, and around the inner one; that
    both go round in the same direction must not matter.
    """
    ring = [*box(1, 1, 7, 6), 1, 1, *box(3, 3, 5, 5), 3, 3]
    assert drawn(data.region([ring], 7, 9)) == "\n".join([
        ".........",
        ".######..",
        ".######..",
        ".##..##..",
        ".##..##..",
        ".######..",
        "........."])


def test_the_pieces_of_one_object_are_joined():
    """Where two of its outlines overlap is no hole: parity is of one outline alone."""
    pieces = [box(0, 0, 4, 3), box(2, 1, 6, 4)]
    assert drawn(data.region(pieces, 5, 7)) == "\n".join([
        "####...",
        "######.",
        "######.",
        "..####.",
        "......."])


def crossed_before(corners, x, y) -> int:
    """How often a walk along row y, from far left to x, crosses the outline."""
    count = 0
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
        if min(y0, y1) <= y < max(y0, y1):
            count += x0 + (x1 - x0) * (y - y0) / (y1 - y0) <= x
    return count


def test_a_pixel_is_inside_if_its_centre_is():
    """Pixel by pixel with the literal twin; outlines reach beyond every border."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.uniform((-4, -4), (20, 15), (7, 2))
        literal = [[crossed_before(corners.tolist(), x + 0.5, y + 0.5) % 2 == 1
                    for x in range(16)] for y in range(11)]
        assert drawn(data.inside_polygon(corners, 11, 16)) == drawn(np.array(literal))


def test_run_lengths_go_down_the_columns():
    """First what is outside, then what is inside; a third row's pixel is the third."""
    runs = {"size": [3, 4], "counts": [2, 2, 4, 1, 3]}
    expected = "\n".join([".#..", "....", "#.#."])
    assert drawn(data.region(runs, 3, 4)) == expected


def compressed(counts) -> str:
    """COCO's compressed form, by its definition: the inverse of run_lengths."""
    text = ""
    for i, count in enumerate(counts):
        rest = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            digit = rest & 31
            rest >>= 5
            more = rest != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
    return text


@pytest.mark.parametrize("counts, text", [
    ([5, 3, 15], "53?"), ([16], "`0"),  # 16 alone would read as -16
    ([1000], "Xo0"), ([5, 3, 7, 3], "5370"),  # the fourth is a difference, 3 - 3
    ([5, 3, 7, 1], "537N"), ([0, 40, 2, 1000, 2], None)],
    ids=["one digit each", "a second digit", "three digits", "a difference",
         "a negative one", "all of it"])
def test_the_compressed_form_says_the_same(counts, text):
    """Digits of 5 bits, a sign, differences from the fourth number on (maskApi.c)."""
    assert text in (None, compressed(counts)), "the test's own twin"
    assert data.run_lengths(compressed(counts)) == counts


def test_both_forms_of_run_lengths_are_drawn_alike(tmp_path):
    """A crowd is as large in the compressed form as in the list."""
    rng = np.random.default_rng(1)
    cuts = np.sort(rng.choice(64 * 96, 40, replace=False))
    counts = np.diff([0, *cuts, 64 * 96]).tolist()
    masks = [painted(tmp_path / str(i), thing("sheep", runs={"size": [64, 96],
                                                             "counts": form}))
             for i, form in enumerate((counts, compressed(counts)))]
    sheep = CLASSES.index("sheep")
    assert np.array_equal(*masks) and (masks[0] == sheep).sum() == sum(counts[1::2])


# --- What is learned, what is ignored ------------------------------------------------


def test_objects_have_the_ids_of_voc(tmp_path):
    """COCO's couch, category 63, is VOC's sofa, class 18; its bear is background."""
    labels = painted(tmp_path, thing("couch", box(0, 0, 40, 64)),
                     thing("person", box(50, 0, 60, 64)),
                     thing("bear", box(70, 0, 80, 64)))
    assert set(labels[:, :40].flat) == {SOFA} and set(labels[:, 50:60].flat) == {PERSON}
    assert not labels[:, 60:].any() and not labels[:, 40:50].any()


def test_crowds_are_ignored_where_no_object_is(tmp_path):
    """.. whatever comes first in the file; crowds of other categories do not count."""
    everywhere = {"size": [64, 96], "counts": [0, 64 * 96]}
    left = {"size": [64, 96], "counts": [0, 64 * 48, 64 * 48]}
    labels = painted(tmp_path, thing("bottle", box(8, 8, 20, 20)),
                     thing("bear", runs=everywhere, iscrowd=1, area=9000),
                     thing("person", runs=left, iscrowd=1, area=500))
    assert set(labels[8:20, 8:20].flat) == {BOTTLE}, "the crowd lies over an object"
    assert (labels[:, :48] == 255).sum() == 64 * 48 - 12 * 12
    assert not labels[:, 48:].any(), "a crowd of bears is background"


def test_the_smaller_object_is_in_front(tmp_path):
    """A bottle's table is outlined as if it were empty."""
    table = thing("dining table", box(0, 0, 96, 64), area=6144)
    bottle = thing("bottle", box(10, 10, 50, 40), area=1200)
    for i, order in enumerate(((table, bottle), (bottle, table))):
        labels = painted(tmp_path / str(i), *order)
        assert set(labels[10:40, 10:50].flat) == {BOTTLE}
        assert (labels == TABLE).sum() == 64 * 96 - 30 * 40


def test_objects_below_a_thousand_pixels_are_ignored(tmp_path):
    """At 1,000 they count. `area` decides, which the file has of each object."""
    labels = painted(tmp_path, thing("person", box(0, 0, 30, 30), area=999.9),
                     thing("couch", box(40, 0, 80, 25), area=1000))
    assert set(labels[:30, :30].flat) == {255} and set(labels[:25, 40:80].flat) == {18}


def test_train_leaves_out_images_with_nothing_to_learn(tmp_path):
    """Nothing at all, other categories, crowds, small objects; val has them all."""
    runs = {"size": [64, 96], "counts": [0, 64 * 96]}
    images = [[], [thing("bear", box(0, 0, 50, 50), area=2500)],
              [thing("person", runs=runs, iscrowd=1, area=6144)],
              [thing("person", box(0, 0, 9, 9), area=81)] * 20,
              [thing("person", box(0, 0, 9, 9), area=81),
               thing("dog", box(20, 20, 60, 60), area=1600)]]
    for split in ("train", "val"):
        draw_coco(tmp_path, split, images)
    train, val, both = (data.open_dataset("coco-voc", split, root=str(tmp_path))
                        for split in ("train", "val", "trainval"))
    assert [path.stem for path, _ in train.pairs] == ["000000000004"]
    assert len(val) == 5 and len(both) == 6 and not val.labels(0).any()


# --- What is wrong with a file -------------------------------------------------------


@pytest.mark.parametrize("content, message", [
    ("{\"images\": [{\"id\": 1, \"file", "Unterminated .*an incomplete download"),
    ("[]", "TypeError.*an incomplete download"),
    ("{\"images\": [], \"annotations\": []}", "KeyError: 'categories'"),
    ("{\"images\": [], \"annotations\": [], \"categories\": [{\"id\": 1, \"name\": "
     "\"person\"}]}", "no category 'aeroplane'")],
    ids=["half of it", "a list", "captions", "person keypoints"])
def test_broken_annotations_are_named(tmp_path, content, message):
    """The file, what is wrong, a likely cause: before an image is opened."""
    draw_coco(tmp_path, "val", [[]])
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        data.open_dataset("coco-voc", "val", root=str(tmp_path))
    assert str(error.value).startswith(f"{path}: "), error.value


@pytest.mark.parametrize("segmentation, message", [
    ({"size": [64, 96], "counts": [5, 3]}, "run lengths of 8 pixels in an image of 61"),
    ({"size": [96, 64], "counts": [64 * 96]}, r"size \[96, 64\].* of \[64, 96\], H W"),
    ({"size": [64, 96], "counts": "zzz"}, "run lengths of"),
    ({"counts": [64 * 96]}, "'size'"), ([[1, 2, 3, 4, 5]], "cannot reshape"),
    ([["a", 1]], "could not convert"), (None, "NoneType")],
    ids=["too short", "turned", "no digits", "no size", "odd", "letters", "nothing"])
def test_a_segmentation_that_cannot_be_drawn_is_named(tmp_path, segmentation, message):
    """The annotations' path and the image's name, for there are thousands."""
    draw_coco(tmp_path, "val", [[thing("dog") | {"segmentation": segmentation}]])
    dataset = data.open_dataset("coco-voc", "val", root=str(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        dataset.load(0)
    path = tmp_path / "annotations" / "instances_val2017.json"
    assert str(error.value).startswith(f"{path}, image 000000000000.jpg: "), error.value


def test_an_image_of_another_size_than_its_annotations_is_named(tmp_path):
    draw_coco(tmp_path, "val", [[thing("dog", box(0, 0, 50, 50))]])
    save(tmp_path / "val2017" / "000000000000.jpg", np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(UserError, match=r"2017.json, image 000000000000.jpg: mask is "
                                        r"\(64, 96\) but its image is \(32, 48\)"):
        data.open_dataset("coco-voc", "val", root=str(tmp_path)).load(0)


def test_images_that_were_not_downloaded_are_named(tmp_path):
    """The annotations list an image that train2017/ does not have."""
    draw_coco(tmp_path, "train", [[thing("dog", box(0, 0, 50, 50))]] * 2)
    (tmp_path / "train2017" / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match="1 of 2 listed images are not there: 0000000000"
                                        "01; an incomplete download"):
        data.open_dataset("coco-voc", "train", root=str(tmp_path))
