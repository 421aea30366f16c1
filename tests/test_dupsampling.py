"""What DUpsampling's paper claims about labels and their reconstruction, as tests."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import common
import data
import dupsampling
from conftest import SMALL


def small_labels(count=12, *, size=(20, 27), classes=3):
    """Label maps of rectangles with some ignored pixels; sizes 4 does not divide."""
    maps = []
    for _ in range(count):
        labels = torch.zeros(size, dtype=torch.uint8)
        for _ in range(6):
            y = torch.randint(size[0], ()).item()
            x = torch.randint(size[1], ()).item()
            value = torch.randint(classes, ()).item()
            labels[y:y + 9, x:x + 7] = value
        labels[torch.rand(size) < 0.02] = 255
        maps.append(labels)
    return maps


def vectors_slowly(maps, classes, r):
    """v of Sec. 3.1, literally: every window, pixel by pixel; float64 (M, N)."""
    rows = []
    for labels in maps:
        for top in range(0, labels.shape[0], r):
            for left in range(0, labels.shape[1], r):
                v = torch.zeros(classes, r, r, dtype=torch.float64)
                for i in range(r):
                    for j in range(r):
                        if top + i < labels.shape[0] and left + j < labels.shape[1]:
                            k = labels[top + i, left + j].item()
                            if k != 255:
                                v[k, i, j] = 1
                rows.append(v.flatten())
    return torch.stack(rows)


def reconstruction_error(v, W, mean):
    """Eq. (3), for the P that is best for this W: mean squared distance of v and v~."""
    Q = torch.linalg.qr(W.double())[0]
    centred = v - mean.double()
    return (centred - centred @ Q @ Q.T).square().sum(1).mean().item()


# --- Eq. (3): the reconstruction matrix ----------------------------------------------


def test_streamed_pca_equals_a_dense_svd():
    """W loses as little as the SVD of all windows does, and no random matrix less."""
    maps = small_labels()
    K, r, E = 3, 4, 10
    W, mean, lost = dupsampling.principal_components(
        maps, K, ratio=r, components=E, passes=8)
    v = vectors_slowly(maps, K, r)
    torch.testing.assert_close(mean.double(), v.mean(0), rtol=1e-5, atol=1e-6)
    singular = torch.linalg.svdvals(v - v.mean(0)).square() / len(v)
    ours = reconstruction_error(v, W, mean)
    best = singular[E:].sum().item()
    assert best <= ours * (1 + 1e-5) and ours == pytest.approx(best, rel=2e-3)
    assert lost == pytest.approx((singular[E:].sum() / singular.sum()).item(), abs=1e-3)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(K * r * r, E))[0]
        assert reconstruction_error(v, other, mean) > 1.5 * ours


def test_columns_of_w_are_orthonormal():
    """W^T W = I, so that P = W^T is the best projection (Eq. (3))."""
    W, _, _ = dupsampling.principal_components(
        small_labels(), 3, ratio=4, components=6, passes=3)
    torch.testing.assert_close(W.T @ W, torch.eye(6), rtol=1e-4, atol=1e-4)


def test_mean_is_taken_off_before_the_pca():
    """W's first column is that of a PCA of centred vectors.

    Without centring it would be near the mean: one direction of E would be wasted.
    """
    maps = small_labels()
    W, mean, _ = dupsampling.principal_components(
        maps, 3, ratio=4, components=6, passes=8)
    v = vectors_slowly(maps, 3, 4)
    leading = torch.linalg.svd(v - v.mean(0), full_matrices=False)[2][0]
    alike = (W[:, 0].double() @ leading).abs()
    assert alike == pytest.approx(1, abs=1e-3)


def test_windows_of_one_class_are_counted_not_dropped():
    """`vectors` gives equal windows once, with their number as weight.

    The weighted sum of what it gives is the sum over every window on its own.
    """
    maps = small_labels(4)
    total = torch.zeros(48, dtype=torch.float64)
    for _, v, weight in dupsampling.vectors(maps, 3, ratio=4, chunk=10):
        total += (v.to_dense() * weight[:, None]).sum(0).double()
    torch.testing.assert_close(total, vectors_slowly(maps, 3, 4).sum(0))


def test_more_numbers_than_a_window_has_are_refused():
    """3 classes of 4x4 pixels are 48 numbers, so there are 48 directions, not 49."""
    with pytest.raises(common.UserError, match="48 numbers only"):
        dupsampling.principal_components(small_labels(2), 3, ratio=4, components=49)


# --- Eqs. (2), (6): drawing ----------------------------------------------------------


def decompress_slowly(x, W, r):
    """Eq. (2) literally: v~ = W x at each location, reshaped to its window."""
    B, E, h, w = x.shape
    K = W.shape[0] // r**2
    out = torch.zeros(B, K, h * r, w * r, dtype=x.dtype)
    for b in range(B):
        for row in range(h):
            for column in range(w):
                window = (W @ x[b, :, row, column]).reshape(K, r, r)
                out[b, :, row * r:row * r + r, column * r:column * r + r] = window
    return out


def test_dupsampling_is_w_times_x_at_every_location():
    """1x1 convolution and depth-to-space draw each window in its place, h != w too."""
    x0 = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    W0 = torch.randn(3 * 16, 5, dtype=torch.float64)
    results = []
    weight = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    for function in (lambda x, W: dupsampling.decompress(x, W, ratio=4),
                     lambda x, W: decompress_slowly(x, W, 4)):
        x = x0.clone().requires_grad_()
        W = W0.clone().requires_grad_()
        out = function(x, W)
        (out * weight).sum().backward()
        results.append((out, x.grad, W.grad))
    for fast, slow, name in zip(*results, ("v~", "d x", "d W")):
        torch.testing.assert_close(fast, slow, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("H, W", [(16, 16), (20, 27), (9, 33)])
def test_what_is_compressed_is_drawn_again(H, W):
    """With all components, W P v + mean is v: compress and draw share their order (N4).

    The likely mistake is to flatten windows as (row, column, class) in one place and
    as (class, row, column) in the other: the picture comes out shredded.
    """
    maps = small_labels(30, size=(H, W))
    basis, mean, lost = dupsampling.principal_components(
        maps, 3, ratio=4, components=48, passes=2)
    labels = torch.stack(maps[:2])
    x = dupsampling.compress(labels, basis, mean, num_classes=3, ratio=4)
    assert x.shape == (2, 48, math.ceil(H / 4), math.ceil(W / 4))
    drawn = dupsampling.decompress(x, basis, ratio=4) + mean.reshape(
        3, 4, 4).tile(x.shape[-2:])
    torch.testing.assert_close(drawn[..., :H, :W], common.one_hot(labels, 3),
                               rtol=0, atol=1e-3)


def softmax_slowly(z, T):
    """Eq. (6): exp(z_i / T) / sum_j exp(z_j / T)."""
    powers = [math.e ** (z[i] / T) for i in range(len(z))]
    return torch.stack([p / sum(powers) for p in powers])


def test_temperature_softmax_is_equation_6():
    """In value, in the gradient of z, and in the gradient of log T (N11)."""
    z0 = torch.randn(5, dtype=torch.float64)
    results = []
    layer = dupsampling.Temperature().double()
    assert torch.equal(layer(z0), z0), "T starts at 1 (Sec. 4)"
    log_T = torch.tensor(-1.2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.log_T.fill_(-1.2)
    for function, t in ((lambda z: layer(z).softmax(0), layer.log_T),
                        (lambda z: softmax_slowly(z, math.e ** log_T), log_T)):
        z = z0.clone().requires_grad_()
        out = function(z)
        (out * torch.arange(5)).sum().backward()
        results.append((out, z.grad, t.grad))
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow)


def test_a_lower_temperature_sharpens():
    """Logits 0 and 1 are too even at T = 1; a small T makes them certain (Sec. 3.2)."""
    z = torch.tensor([0.0, 1.0])
    layer = dupsampling.Temperature()
    even = layer(z).softmax(0)
    with torch.no_grad():
        layer.log_T.fill_(math.log(0.2))
    assert layer(z).softmax(0)[1] > 0.99 > 0.75 > even[1]


def test_the_layer_draws_adds_the_mean_and_divides_by_t():
    """DUpsample is W x, plus the mean in every window if asked (N2), divided by T."""
    x = torch.randn(2, 5, 2, 3)
    for mean in (False, True):
        layer = dupsampling.DUpsample(components=5, num_classes=3, ratio=4,
                                      learn=False, mean=mean, temperature=True)
        with torch.no_grad():
            layer.temperature.log_T.fill_(math.log(0.5))
            layer.mean.normal_()
        drawn = decompress_slowly(x, layer.W, 4)
        for row in range(2 if mean else 0):
            for column in range(3):
                drawn[..., row * 4:row * 4 + 4, column * 4:column * 4 + 4] += (
                    layer.mean.view(3, 4, 4))
        torch.testing.assert_close(layer(x), drawn / 0.5)


# --- The module ----------------------------------------------------------------------


def prepared(variant="no-fusion", **options):
    """A small model with a W from drawn labels, and what `prepare` says of it."""
    model = common.build_model(f"dupsampling:{variant}", 3, **SMALL, components=12,
                               **options)
    line = dupsampling.prepare(model, small_labels(6, size=(64, 96)))
    return model, line


def test_prepare_fits_w_and_a_checkpoint_carries_it():
    """W and the mean are in the state dict, so evaluation needs no training labels."""
    model, line = prepared(mean=True)
    assert "labels' variance" in line and model.decoder.dupsample.fitted
    other = common.build_model("dupsampling:no-fusion", 3, **SMALL, components=12,
                               mean=True)
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 65, 97)
    assert torch.equal(model.eval()(images)["out"], other.eval()(images)["out"])


def test_w_is_frozen_unless_asked():
    """N1: a step of SGD leaves W as the labels made it, `learn_upsampling` moves it."""
    for learn in (False, True):
        model, _ = prepared(learn_upsampling=learn)
        W = model.decoder.dupsample.W
        before = W.detach().clone()
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = F.cross_entropy(model(torch.randn(2, 3, 64, 64))["out"],
                               torch.randint(3, (2, 64, 64)))
        loss.backward()
        step.step()
        assert torch.equal(before, W) != learn


def test_training_with_a_random_w_is_said():
    """A model that was never prepared warns when it is trained; a prepared one not."""
    model = common.build_model("dupsampling", 3, **SMALL)
    with pytest.warns(UserWarning, match="W is random"):
        model(torch.randn(2, 3, 64, 64))
    model, _ = prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 64, 64))


def test_new_layers_start_with_the_papers_gaussian():
    """N8: variance 0.01 in context and decoder; the encoder keeps its own start."""
    model = common.build_model("dupsampling", 3, backbone="resnet18", channels=64)
    project = model.context.project[0].weight
    assert project.std().item() == pytest.approx(0.1, rel=0.05)
    assert model.encoder.res5[0].conv1.weight.std() < 0.05


def test_features_are_fused_on_the_coarse_map_in_the_given_order():
    """Eq. (8): stage by stage, each downsampled to res5's size before it is seen."""
    model, _ = prepared("default", fuse=("stem", "res4"))
    model.eval()
    seen = []
    for fusion in model.decoder.fusions:
        fusion.reduce.register_forward_hook(lambda m, x, y: seen.append(
            (x[0].shape[1], tuple(y.shape[-2:]))))
    model(torch.randn(1, 3, 65, 97))
    assert seen == [(64, (5, 7)), (256, (5, 7))], "stem first, then res4, both at 1/16"


def test_downsampling_keeps_the_grid():
    """A linear ramp stays where it was: cell i covers fine positions f*i .. f*i+f-1.

    Squeezing a map of 33 positions into 5 cells of 8 instead shifts the ramp.
    """
    ramp = torch.arange(33.0).expand(1, 1, 33, 33)
    small = dupsampling.downsample(ramp, 8, (5, 5))[0, 0, 0]
    torch.testing.assert_close(small[:4], torch.arange(4) * 8 + 3.5)


@pytest.mark.parametrize("rows", [(0, 65), (0, 16), (15, 17), (20, 30), (48, 65)])
def test_rows_are_drawn_from_their_own_windows(rows):
    """Eq. (5): rows lo to hi-1 need only the windows that they pass through.

    What the other windows say is replaced by NaN. It must not reach these rows, and
    they must be those of the whole picture.
    """
    model, _ = prepared(mean=True)
    lo, hi = rows
    said = torch.randn(2, 12, 5, 7)
    with torch.no_grad():
        whole = model.to_pixels(said, (65, 97))
        assert whole.shape == (2, 3, 65, 97)
        said[:, :, :lo // 16] = math.nan
        said[:, :, math.ceil(hi / 16):] = math.nan
        part = model.to_pixels(said, (65, 97), rows)
        torch.testing.assert_close(part, whole[:, :, lo:hi])


def test_decoder_says_compressed_labels_and_to_pixels_draws_them():
    """F has E numbers per window; drawn and cut it is what the whole model gives."""
    model, _ = prepared("default")
    model.eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        features = model.encoder(images)
        said = model.decoder(model.context(features["res5"]), features)
        assert said.shape == (2, 12, 5, 7)
        torch.testing.assert_close(model.decode(images)[0], said)
        drawn = model.decoder.dupsample(said)[..., :65, :97]
        torch.testing.assert_close(model(images)["out"], drawn)


def test_regression_loss_is_equation_4():
    """||F - Y~||^2 per number, and its gradient reaches the encoder.

    A variant without W has no compressed labels to regress, and says so.
    """
    model, _ = prepared()
    model.eval()
    images = torch.randn(2, 3, 64, 96)
    labels = torch.stack(small_labels(2, size=(64, 96)))
    last = model.decoder.dupsample
    said, _ = model.decode(images)
    target = dupsampling.compress(labels, last.W, last.mean, num_classes=3, ratio=16)
    by_hand = (said - target).square().sum() / target.numel()
    loss = dupsampling.pretrain_loss(model, images, labels)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert model.encoder.res5[0].conv1.weight.grad.abs().sum() > 0
    with pytest.raises(common.UserError, match="no compressed labels"):
        dupsampling.pretrain_loss(
            common.build_model("dupsampling:bilinear", 3, **SMALL), images, labels)


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("spec", ["dupsampling:no-fusion", "dupsampling:bilinear"])
def test_upper_bound_reads_the_labels(spec, stride):
    """Table 1, mIoU*: with --backbone labels the input is the one-hot ground truth.

    Five convolutions bring it to the output stride; the decoder draws it again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # W is random
        model = common.build_model(spec, 3, backbone="labels", channels=16,
                                   output_stride=stride)
        labels = torch.randint(3, (2, 65, 97))
        labels[:, :5] = 255
        inputs = common.one_hot(labels, 3)
        assert inputs[:, :, :5].sum() == 0, "ignored pixels are zero in every class"
        assert model(inputs)["out"].shape == (2, 3, 65, 97)
        assert len(model.encoder.layers) == 5
        features = model.encoder(inputs)["res5"]
        assert features.shape[-2:] == (math.ceil(65 / stride), math.ceil(97 / stride))


def test_upper_bound_without_a_context_module():
    """N13: `aspp=False` puts the upsampling right on the five convolutions."""
    for variant in ("no-fusion", "bilinear"):
        model = common.build_model(f"dupsampling:{variant}", 3, backbone="labels",
                                   aspp=False)
        assert not list(model.context.parameters())
        weights = [layer.weight for layer in model.modules()
                   if isinstance(layer, torch.nn.Conv2d)]
        assert len(weights) == 5 + 1, "five, and the one that says the numbers"
        for weight in weights:
            assert weight.std().item() == pytest.approx(0.1, rel=0.2), "N8"
    learner = common.build_model("dupsampling:no-fusion", 3, backbone="labels",
                                 init="torch")
    assert learner.encoder.layers[-1][0].weight.std() < 0.02


def test_a_decoder_that_reads_more_than_res5_refuses_the_labels():
    """A finer map of the ground truth would give the answer away."""
    for spec in ("nrd", "dupsampling", "deeplabv3plus", "sfnet", "efficientfcn"):
        with pytest.raises(common.UserError, match="reads res5 alone"):
            common.build_model(spec, 3, backbone="labels")


def test_fusion_is_on_the_grid_of_res4():
    """r = 8 needs res4 at 1/8: with it at 1/16, a quarter of an image was drawn."""
    with pytest.raises(common.UserError, match="must be 16 or 32"):
        common.build_model("dupsampling:vanilla-res4", 3, output_stride=8)


def test_label_maps_are_read_again_in_every_pass():
    """The stream that the PCA passes over: all maps in order, each time."""
    streets = data.open_dataset("streets", "val", difficulty=0.5)
    some = torch.utils.data.Subset(streets, range(3))
    some.labels = streets.labels
    maps = data.LabelMaps(some, 0)
    for _ in range(2):
        read = list(maps)
        assert len(read) == len(maps) == 3
        assert all(torch.equal(a, streets.labels(i)) for i, a in enumerate(read))


# --- Recipes -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, place, stated", [
    ("voc", "Sec. 4", {"lr": 0.007, "iterations": 30_000, "batch": 48,
                       "weight_decay": 1e-4, "backbone": "resnet50",
                       "weights": "imagenet", "scale": (0.5, 2.0),
                       "photometric": False}),
    ("voc:xception65", "Sec. 4", {"lr": 0.007, "iterations": 30_000, "batch": 32,
                                  "weight_decay": 4e-5, "backbone": "xception65"}),
    ("voc:labels", "Sec. 4.1.1", {"lr": 0.07, "iterations": 100_000, "weights": "none",
                                  "backbone": "labels"}),
    ("voc:labels", "Sec. 4", {"batch": 48, "weight_decay": 1e-4}),
    ("cityscapes:xception71", "Sec. 4.1.3", {"lr": 0.01, "iterations": 90_000,
                                             "backbone": "xception71"}),
    ("cityscapes:xception71", "Sec. 4", {"batch": 32, "weight_decay": 4e-5}),
    ("cityscapes", "Sec. 4.1.3", {"lr": 0.01, "iterations": 90_000}),
    ("cityscapes", "Sec. 4", {"batch": 48, "weight_decay": 1e-4}),
    ("context60:xception71", "Sec. 4", {"batch": 32, "weight_decay": 4e-5}),
    # Table 5, in three rounds
    ("coco-voc:xception65", "Sec. 4.2", {"lr": 0.007, "iterations": 500_000}),
    ("finetuned voc-aug:xception65", "Sec. 4.2", {"lr": 0.001, "iterations": 30_000}),
    ("finetuned voc:xception65", "Sec. 4.2", {"lr": 0.0001, "iterations": 30_000}),
    ("finetuned voc:xception65", "Sec. 4", {"batch": 32, "backbone": "xception65"}),
    ("coco-voc", "Sec. 4.2", {"lr": 0.007, "iterations": 500_000}),
    ("finetuned voc-aug", "Sec. 4.2", {"lr": 0.001, "iterations": 30_000}),
    ("finetuned voc", "Sec. 4.2", {"lr": 0.0001, "iterations": 30_000})])
def test_recipes_are_what_the_paper_states(recipe, place, stated):
    """Sec. 4 and its parts: each value, and a source that says where it is (N12)."""
    for name, value in stated.items():
        is_value, source = dupsampling.RECIPES[recipe][name]
        assert is_value == value, name
        assert source.startswith(f"paper, {place}"), f"{name}: {source}"


@pytest.mark.parametrize("recipe, names", [
    ("cityscapes", ["backbone"]), ("context60", ["backbone", "lr", "iterations"]),
    ("context60:xception65", ["lr", "iterations"]), ("coco-voc", ["backbone"])])
def test_what_the_paper_does_not_state_is_marked_ours(recipe, names):
    """No ResNet on Cityscapes or Context, and no schedule for Context (N12)."""
    for name in names:
        assert dupsampling.RECIPES[recipe][name][1].startswith("ours"), name


# --- Costs ---------------------------------------------------------------------------


def test_flops_of_the_upsampling_alone():
    """Table 2, N/A: 0.80 billion FLOPs, by hand and by the counter (N9).

    33x33 windows; per window 256*64 products for F, 64*5376 for W, and a division by T
    for each of the 5376 = 21*16*16 logits. A product is two FLOPs.
    """
    model, image = common.shapes_only("dupsampling:no-fusion", 21, (513, 513),
                                      backbone="resnet50c")
    products = (256 * 64 + 64 * 5376) * 33 * 33
    divisions = 5376 * 33 * 33
    plain = common.count_cost(model, image)["decoder"]["gmacs"]
    assert plain * 1e9 == pytest.approx(products)
    with_T = common.count_cost(model, image, divisions=True)["decoder"]["gmacs"]
    assert with_T * 1e9 == pytest.approx(products + divisions)
    assert round(2 * with_T, 2) == 0.80


@pytest.mark.thorough
def test_the_cost_of_the_whole_network_is_that_of_six_scales():
    """N10: 897.94 of Sec. 4.2, at DeepLabv3+'s scales of 513x513, each mirrored, too.

    A scaled side has 512 * scale + 1 pixels, odd as the crop.
    """
    model, _ = common.shapes_only("dupsampling:fuse-res4", 21, (65, 65),
                                  backbone="xception65", components=128)
    sides = [int(512 * scale) + 1 for scale in (0.5, 0.75, 1, 1.25, 1.5, 1.75)]
    images = [torch.empty(1, 3, side, side, device="meta") for side in sides]
    costs = [common.count_cost(model, image)["total"]["gmacs"] for image in images]
    assert round(2 * sum(costs), 2) == 897.17
    assert 2 * sum(costs) == pytest.approx(897.94, rel=1e-3)


# --- The picture ---------------------------------------------------------------------


@pytest.mark.parametrize("variant, size", [("default", (64, 96)), ("default", (65, 97)),
                                           ("no-temperature", (32, 32)),
                                           ("no-fusion-os32", (64, 64))])
def test_the_picture_shows_the_models_own_numbers(variant, size):
    """The bars are F of window A; its labels are those that W draws of them."""
    model = common.build_model(f"dupsampling:{variant}", 5, **SMALL).eval()
    image = torch.randn(1, 3, *size)
    figure = dupsampling.explain(model, image, classes=list("abcde"))
    by_title = {axis.get_title(loc="left"): axis for axis in figure.axes}
    last = model.decoder.dupsample
    r = last.ratio
    with torch.no_grad():
        said, _ = model.decode(image)
        labels = model.to_pixels(said, size).argmax(1)
        code = dupsampling.compress(labels, last.W, last.mean, num_classes=5, ratio=r)
    row, column = dupsampling.windows_that_differ(labels[0], code[0], r, size[0] // r,
                                                  size[1] // r)[0]
    bars = [bar.get_height() for bar in by_title["What is said of window A"].patches]
    assert torch.equal(torch.tensor(bars), said[0, :, row, column])
    drawn = [axis.images[0].get_array() for axis in figure.axes
             if axis.get_title(loc="left") == "drawn"]
    window = labels[0][dupsampling.window_at(row, column, r)]
    assert torch.equal(torch.as_tensor(drawn[0].data),
                       common.label_colours(None, 5)[window])


def test_all_components_rebuild_all_labels():
    """And the first column alone is an SVD of rank one, plus the mean."""
    K, r = 3, 2
    labels = torch.randint(K, (1, 5, 7))
    N = K * r * r
    W = torch.linalg.qr(torch.randn(N, N)).Q
    mean = torch.rand(N)
    options = {"num_classes": K, "ratio": r}
    assert torch.equal(dupsampling.rebuild(labels, W, mean, **options), labels)
    one = dupsampling.rebuild(labels[:, :2, :2], W[:, :1], mean, **options)
    v = common.one_hot(labels[:, :2, :2], K).flatten()
    near = mean + W[:, 0] * (W[:, 0] @ (v - mean))
    assert torch.equal(one[0], near.reshape(K, r, r).argmax(0))
    assert dupsampling.component_counts(64) == [1, 2, 4, 8, 16, 32, 64]
    assert dupsampling.component_counts(12) == [1, 2, 4, 8, 12]


def test_a_column_is_tinted_by_the_class_it_speaks_for():
    """White where it says nothing, full colour at its largest number, sign by sign."""
    colours = torch.tensor([[255, 0, 0], [0, 0, 255]])
    window = torch.tensor([[[1.0, 0.0]], [[-0.5, -2.0]]])
    assert torch.equal(dupsampling.tinted(window, colours),
                       torch.tensor([[[1, 0.5, 0.5], [1, 1, 1]]]))
    assert torch.equal(dupsampling.tinted(-window, colours),
                       torch.tensor([[[0.75, 0.75, 1], [0, 0, 1]]]))


@pytest.mark.thorough
def test_the_demo_saves_its_picture(thin, tmp_path, capsys):
    dupsampling.demo(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "untrained" in capsys.readouterr().out
