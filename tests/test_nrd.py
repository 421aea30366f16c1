"""What NRD's paper claims about its decoder, each claim as a test."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import nrd
from conftest import SMALL
from test_deeplabv3plus import (ASPPHead, AuxiliaryHead, Block, DeepLabHead, Restated,
                                assert_drawn_by_mmsegmentation, assert_same_function,
                                named_as_ours, official_backbone, plotted,
                                random_features, scramble, without_dropout)


def represent_slowly(theta, inputs, widths):
    """The literal reading of Sec. 2.2: for every cell, for every point, run g_theta."""
    B, P, h, w = theta.shape
    s = inputs.shape[-1] // w
    out = torch.empty(B, widths[-1], s * h, s * w, dtype=theta.dtype)
    for b in range(B):
        for row in range(h):
            for column in range(w):
                layers = layers_of_one_cell(theta[b, :, row, column], widths)
                for y in range(row * s, row * s + s):
                    for x in range(column * s, column * s + s):
                        out[b, :, y, x] = g(layers, inputs[b, :, y, x])
    return out


def layers_of_one_cell(theta, widths):
    """theta (P,) -> a weight (out, in) and a bias (out,) per layer, in N4's order."""
    layers = []
    at = 0
    for fan_in, fan_out in zip(widths, widths[1:]):
        weight = theta[at:at + fan_in * fan_out].view(fan_out, fan_in)
        at += fan_in * fan_out
        bias = theta[at:at + fan_out]
        at += fan_out
        layers.append((weight, bias))
    assert at == len(theta), "some of theta's numbers are in no layer"
    return layers


def g(layers, v):
    """The network of one cell at one of its points: ReLU between the layers only."""
    for depth, (weight, bias) in enumerate(layers):
        v = weight @ v + bias
        if depth < len(layers) - 1:
            v = v.relu()
    return v


def test_batched_g_equals_the_loop_over_cells_and_pixels():
    """represent() is Sec. 2.2 read literally, in value and in both gradients."""
    widths = (5, 4, 4, 3)
    B, h, w, s = 2, 2, 3, 4
    theta = torch.randn(B, nrd.theta_length(widths), h, w, dtype=torch.float64)
    inputs = torch.randn(B, 5, s * h, s * w, dtype=torch.float64)
    weight = torch.randn(B, 3, s * h, s * w, dtype=torch.float64)
    results = []
    for function in (lambda t, x: nrd.represent(t, x, widths=widths),
                     lambda t, x: represent_slowly(t, x, widths)):
        t, x = theta.clone().requires_grad_(), inputs.clone().requires_grad_()
        out = function(t, x)
        (out * weight).sum().backward()
        results.append((out, t.grad, x.grad))
    for fast, slow, name in zip(*results, ("logits", "d theta", "d inputs")):
        torch.testing.assert_close(fast, slow, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("classes, with_guidance, without",
                         [(19, 899, 643), (150, 3126, 2870), (60, 1596, 1340)])
def test_parameters_of_g(classes, with_guidance, without):
    """P for Cityscapes, ADE20K, Context. Sec. 2.2 prints 899 for the first of them."""
    assert nrd.theta_length((18, 16, 16, classes)) == with_guidance
    assert nrd.theta_length((2, 16, 16, classes)) == without


@pytest.mark.parametrize("spec, backbone, classes, count", [
    ("nrd", "resnet50c", 19, 43_573_367), ("nrd", "resnet101c", 60, 62_923_056),
    ("nrd", "resnext101_64x4d", 150, 102_594_826),
    ("nrd:no-guidance", "resnet50c", 19, 43_330_531),
    ("nrd:no-guidance-published", "resnet50c", 19, 41_889_131)])
def test_parameters_of_the_network(spec, backbone, classes, count):
    """Exact counts of the released configurations, without the auxiliary head."""
    with torch.device("meta"):
        model = common.build_model(spec, classes, backbone=backbone, aux=False)
    assert sum(p.numel() for p in model.parameters()) == count


def test_parts_have_their_known_size():
    """ASPP, controller, guidance map and auxiliary head, one by one (19 classes)."""
    with torch.device("meta"):
        model = common.build_model("nrd", 19, backbone="resnet50c")
    size = lambda part: sum(p.numel() for p in part.parameters())
    assert size(model.context) == 17_113_088
    assert size(model.decoder.controller) == 2_821_507
    assert size(model.decoder.guidance) == 111_472
    assert size(model.decoder.norm) == 36
    assert size(model.aux_heads) == 2_364_691


def test_coordinates_run_along_x_then_y_and_leave_out_one():
    """Q: channel 0 is x, it grows to the right; values 0, 1/8, .., 7/8 (N3)."""
    x, y = nrd.coordinate_map(8)
    eighths = [i / 8 for i in range(8)]
    assert x[0].tolist() == eighths, "channel 0 must grow to the right"
    assert y[:, 0].tolist() == eighths, "channel 1 must grow downwards"


def test_cells_and_back_is_the_identity():
    """from_cells puts back what to_cells has cut, on a map that is no square."""
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(nrd.from_cells(nrd.to_cells(x, 4), 2, 2, 3), x)


def small_decoder(**options):
    defaults = dict(controller_channels=8, hidden_channels=4, guidance_channels=3,
                    guidance=True, coordinates=True, standardise=False, points=8,
                    init="mlp")
    return nrd.NRDDecoder(6, 5, 3, **(defaults | options)).eval()


def test_a_location_draws_its_own_patch_and_no_other():
    """Changing theta at one location changes the s x s points of its own cell only."""
    widths = (2, 4, 4, 3)
    theta = torch.randn(1, nrd.theta_length(widths), 3, 4)
    inputs = torch.randn(1, 2, 24, 32)
    before = nrd.represent(theta, inputs, widths=widths)
    theta[:, :, 1, 2] += 1
    changed = (nrd.represent(theta, inputs, widths=widths) != before).any(1)[0]
    block = torch.zeros(24, 32, dtype=torch.bool)
    block[8:16, 16:24] = True
    assert changed[block].all() and not changed[~block].any()


@pytest.mark.parametrize("H, W", [(64, 96), (65, 97), (33, 65), (100, 36), (95, 127)])
def test_guidance_lines_up_with_the_cells_at_any_size(H, W):
    """Position (y, x) of the 1/4 map reaches g at point (y, x), whatever H and W are.

    The likely mistake is to resize the map to (8h, 8w): at 65x97 it slides the map
    under the cells by up to 7 positions.
    """
    decoder = small_decoder(coordinates=False)
    q, r = math.ceil(H / 4), math.ceil(W / 4)
    h, w = math.ceil(H / 32), math.ceil(W / 32)
    res2 = torch.randn(1, 5, q, r)
    m = decoder.guidance(res2)
    fitted = decoder.fit(m, h, w)
    assert fitted.shape[-2:] == (8 * h, 8 * w)
    torch.testing.assert_close(fitted[..., :q, :r], m,
                               msg="guidance slid under the cells")


@pytest.mark.parametrize("points", [1, 4, 8, 16, 32])
def test_any_number_of_points_per_cell(points):
    """s changes the resolution at which g is asked, not the size of the result."""
    model = common.build_model("nrd", 5, **SMALL, points=points).eval()
    logits, _ = model.decode(torch.randn(1, 3, 65, 97))
    assert logits.shape == (1, 5, 3 * points, 4 * points)  # 3 x 4 cells
    assert model(torch.randn(1, 3, 65, 97))["out"].shape == (1, 5, 65, 97)


@pytest.mark.parametrize("option, message", [
    ({"points": 5}, "points=5: points per side of a cell, must divide the 32 pixels"),
    ({"decoder": "x"}, "decoder='x': must be one of nrd, deeplabv3plus"),
    ({"context": "x"}, "context='x': must be one of aspp, conv, none"),
    ({"init": "x"}, "init='x': must be 'mlp' or 'official'"),
    ({"guidance": False, "coordinates": False}, "g needs an input")])
def test_options_that_make_no_network_are_refused(option, message):
    """The message says what was received and what is possible."""
    with pytest.raises(common.UserError, match=message):
        common.build_model("nrd", 5, **SMALL, **option)


def test_initialisations_differ_in_what_g_can_learn():
    """N2: the official start leaves g near zero, its first layer without gradient."""
    gradient = {}
    for init in ("mlp", "official"):
        torch.manual_seed(0)
        decoder = small_decoder(init=init).train()
        context, res2 = torch.randn(4, 6, 2, 3), torch.randn(4, 5, 16, 24)
        logits = decoder(context, {"res2": res2})
        F.cross_entropy(logits, torch.randint(3, (4, 16, 24))).backward()
        first_layer = decoder.widths[0] * decoder.widths[1]
        gradient[init] = decoder.controller.theta.bias.grad[:first_layer].norm().item()
    assert gradient["official"] < 1e-2 * gradient["mlp"], gradient


def test_a_step_moves_theta_as_far_as_its_gradient_says():
    """N2: with "mlp", a step of SGD on the controller's 1x1 moves theta about as far as
    a step on theta itself would. Without the scale it goes hundreds of times as far.
    """
    distance = {}
    for init in ("mlp", "official"):
        torch.manual_seed(0)
        controller = nrd.Controller(6, 512, (2, 4, 4, 3), init=init).train()
        context = torch.randn(4, 6, 1, 1)
        before = controller(context)
        wanted = torch.zeros_like(before)
        wanted[0] = torch.randn_like(before[0])  # the gradient of one cell's theta
        before.backward(wanted)
        with torch.no_grad():
            for p in controller.theta.parameters():
                p -= p.grad
            moved = before[0] - controller(context)[0]
        distance[init] = (moved.norm() / wanted[0].norm()).item()
    assert 1 < distance["mlp"] < 3 and distance["official"] > 100, distance


def test_carafe_is_a_weighted_mean_of_5x5_neighbours():
    """Read literally: out(y, x) = sum_k softmax(weights)_k * feature_k, where k runs
    over the 5x5 neighbours of the location in which the point (y, x) lies.
    """
    decoder = nrd.CARAFEDecoder(4, 3, factor=2, compressed=5).double()
    context = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    weights = decoder.predict(decoder.compress(context))
    weights = weights.reshape(1, 25, 4, 3, 4).softmax(1)
    padded = F.pad(context, (2, 2, 2, 2))
    up = torch.zeros(1, 4, 6, 8, dtype=torch.float64)
    for y in range(6):
        for x in range(8):
            for k in range(25):
                value = padded[0, :, y // 2 + k // 5, x // 2 + k % 5]
                weight = weights[0, k, y % 2 * 2 + x % 2, y // 2, x // 2]
                up[0, :, y, x] += weight * value
    torch.testing.assert_close(decoder(context, {}), decoder.classify(up))


def test_bilinear_row_may_classify_before_or_after_enlarging():
    """N6: the 1x1 at 1/4 costs 1.3 GMACs, and gives what the 1x1 at 1/32 would."""
    decoder = nrd.BilinearDecoder(6, 3).double()
    context = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    late = decoder(context, {"res2": torch.empty(1, 1, 16, 24)})
    early = common.upsample(decoder.classify(context), 8, (16, 24))
    torch.testing.assert_close(late, early)


@pytest.mark.parametrize("variant", ["no-guidance", "no-guidance-published", "no-aspp"])
def test_without_guidance_g_gets_the_papers_coordinates(variant):
    """N1: 0, 1/8, .., 7/8 where no batch norm follows; `standardise` is the option."""
    decoder = common.build_model(f"nrd:{variant}", 5, **SMALL).decoder
    assert torch.equal(decoder.coordinates, nrd.coordinate_map(8))
    assert isinstance(decoder.norm, nn.Identity)
    for decoder in (
            common.build_model(f"nrd:{variant}", 5, **SMALL, standardise=True).decoder,
            common.build_model("nrd", 5, **SMALL).decoder):
        q = decoder.coordinates
        assert q.mean().abs() < 1e-6 and q.var(correction=0) == pytest.approx(1)


def test_standardised_coordinates_are_another_g():
    """N1: without a batch norm the same theta draws another patch."""
    theta = torch.randn(1, nrd.theta_length((2, 16, 16, 19)), 3, 4)
    raw, standardised = small_decoder(guidance=False, hidden_channels=16), (
        small_decoder(guidance=False, hidden_channels=16, standardise=True))
    a, b = (nrd.represent(theta, decoder.inputs_of_g(None, theta),
                          widths=(2, 16, 16, 19)) for decoder in (raw, standardised))
    assert not torch.allclose(a, b, atol=0.1)


# --- The authors' head, restated -----------------------------------------------------


class Writer(nn.Module):
    """The controller; in the release it is a module within a module."""

    def __init__(self, channels, length):
        super().__init__()
        self.classifier = nn.Sequential(Block(channels, channels, 3),
                                        nn.Conv2d(channels, length, 1))

    def forward(self, x):
        return self.classifier(x)


class WithoutNorm(nn.Module):
    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x):
        return self.conv(x)


class RestatedNRD(ASPPHead):
    """Raw coordinates 0, 1/8, .. beside m, one batch norm over both, then cell by cell.

    `conv_seg` is in the checkpoints and is not used.
    """

    def __init__(self, fan_in, low, channels, num_classes):
        super().__init__(fan_in, channels, num_classes)
        self.widths = (18, 16, 16, num_classes)
        self.classifier = Writer(channels, nrd.theta_length(self.widths))
        self.c1_bottleneck = nn.Sequential(Block(low, 48, 3), WithoutNorm(48, 16))
        self.cat_norm = nn.BatchNorm2d(18)

    def forward(self, features):
        theta = self.classifier(self.context(features["res5"]))
        m = self.c1_bottleneck(features["res2"])
        steps = torch.arange(8, dtype=torch.float64) / 8
        B, P, h, w = theta.shape
        x = steps.repeat(w).expand(B, 1, 8 * h, 8 * w)  # grows to the right
        y = steps.repeat(h)[:, None].expand(B, 1, 8 * h, 8 * w)  # grows downwards
        inputs = self.cat_norm(torch.cat([x, y, m], dim=1))
        rows = []
        for row in range(h):
            cells = []
            for column in range(w):
                cells.append(torch.stack([
                    self.draw(theta[b, :, row, column],
                              inputs[b, :, 8 * row:8 * row + 8,
                                     8 * column:8 * column + 8]) for b in range(B)]))
            rows.append(torch.cat(cells, dim=3))
        return torch.cat(rows, dim=2)

    def draw(self, theta, inputs):
        """g of one cell as three 1x1 convolutions."""
        for depth, (weight, bias) in enumerate(layers_of_one_cell(theta, self.widths)):
            inputs = F.conv2d(inputs[None], weight[:, :, None, None], bias)[0]
            if depth < 2:
                inputs = F.relu(inputs)
        return inputs


def restated_nrd(num_classes=5):
    return Restated(RestatedNRD(512, 64, 16, num_classes),
                    AuxiliaryHead(256, num_classes))


@pytest.mark.parametrize("init", ["official", "mlp"])
def test_it_is_the_authors_head_with_the_same_weights(init, monkeypatch):
    """convert: a released checkpoint gives its logits and gradients (N13).

    In the batch norm the running statistics of x and y are other numbers here, and the
    weight makes up for the eps (N1). Its gradient is smaller by that factor.
    """
    torch.manual_seed(0)
    model = without_dropout(common.build_model("nrd", 5, backbone="resnet18c",
                                               channels=16, controller_channels=16,
                                               init=init))
    model.decoder.coordinates = nrd.standardised(nrd.coordinate_map(8).double())
    restated = scramble(restated_nrd())
    with torch.no_grad():  # logits of size 1, where 1e-10 means something
        restated.decode_head.classifier.classifier[1].weight.div_(2)
    norm = restated.decode_head.cat_norm
    norm.running_mean[:2] = torch.tensor([0.4375, 0.4376], dtype=torch.float64)
    norm.running_var[:2] = torch.tensor([0.0821, 0.0820], dtype=torch.float64)
    donor = scramble(common.Encoder("resnet18c"))
    state = restated.state_dict() | official_backbone(donor)
    model.load_state_dict(nrd.convert({"state_dict": state}, model))
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # stay in float64
    grown = (model.decoder.norm.weight / norm.weight).detach()
    assert (1 - grown[:2] > 1e-5).all() and (1 - grown[:2] < 1e-4).all()
    assert (grown[2:] == 1).all(), "m comes to the norm as it came to the authors'"
    names = nrd.shared_names() | {
        "decode_head.classifier.classifier.1": "decoder.controller.theta",
        "decode_head.c1_bottleneck.1.conv": "decoder.guidance.layers.3",
        "decode_head.cat_norm": "decoder.norm"}
    names |= nrd.block_names("decode_head.classifier.classifier.0",
                             "decoder.controller.features")
    names |= nrd.block_names("decode_head.c1_bottleneck.0", "decoder.guidance.layers")

    def corrected(gradients):
        gradients = named_as_ours(gradients, names)
        gradients["decoder.norm.weight"] = gradients["decoder.norm.weight"] / grown
        key = "decoder.controller.theta.weight"
        gradients[key] = gradients[key] * model.decoder.controller.scale
        return gradients

    assert_same_function(model, restated, random_features(donor.channels, 2, 3),
                         gradients=corrected)


def test_unconverted_statistics_would_spoil_a_checkpoint():
    """N1: with the names alone, eval gives other logits."""
    torch.manual_seed(0)
    model = without_dropout(common.build_model(
        "nrd", 5, backbone="resnet18c", channels=16, controller_channels=16)).eval()
    restated = scramble(restated_nrd()).eval()
    norm = restated.decode_head.cat_norm
    norm.running_mean[:2] = 0.4375
    norm.running_var[:2] = 0.082
    state = restated.state_dict() | official_backbone(model.encoder)
    converted = nrd.convert(state, model)
    for kind in ("running_mean", "running_var", "weight"):
        converted[f"decoder.norm.{kind}"] = state[f"decode_head.cat_norm.{kind}"]
    model.load_state_dict(converted)
    features = random_features(model.encoder.channels, 1, 2)
    ours = model.decoder(model.context(features["res5"]), features)
    official = restated(features)[0]
    assert (ours - official).abs().max() > 0.1 * official.abs().max()


def test_convert_of_the_rival_and_of_what_was_not_released():
    """Table 1's DeepLabv3+ by mmsegmentation's names; no other decoder is released."""
    rival = common.build_model("nrd:deeplabv3plus", 5, backbone="resnet18c",
                               channels=16)
    state = Restated(DeepLabHead(512, 64, 16, 5), AuxiliaryHead(256, 5)).state_dict()
    state |= official_backbone(rival.encoder)
    rival.load_state_dict(nrd.convert(state, rival))
    for variant in ("no-guidance", "guidance-only", "bilinear", "duc"):
        other = common.build_model(f"nrd:{variant}", 5, **SMALL)
        with pytest.raises(common.UserError, match="no other decoder"):
            nrd.convert(state, other)
    with pytest.raises(common.UserError, match="tensors have no place"):
        nrd.convert(state, common.build_model("nrd", 5, **SMALL))


@pytest.mark.parametrize("variant", nrd.VARIANTS)
def test_official_start(variant):
    """N11: with init=official every head is drawn as mmsegmentation draws it."""
    torch.manual_seed(0)
    model = common.build_model(f"nrd:{variant}", 19, backbone="resnet18")
    for part in (model.context, model.decoder, model.aux_heads):
        assert_drawn_by_mmsegmentation(part)
    classifiers = [model.aux_heads[0].layers[-1]]
    if hasattr(model.decoder, "classify"):
        last = model.decoder.classify
        classifiers.append(last[-1] if isinstance(last, nn.Sequential) else last)
    elif model.decoder.guidance is not None:
        last = model.decoder.guidance.layers[-1]
        assert last.weight.std().item() == pytest.approx(
            (2 / last.out_channels)**0.5, rel=0.15)
        assert not last.bias.any()
    for classifier in classifiers:
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not classifier.bias.any()


def test_mlp_start_is_torchs_own():
    """N11: init=mlp, of short runs and from scratch, redraws no convolution."""
    model = common.build_model("nrd", 19, backbone="resnet18", init="mlp")
    with pytest.raises(AssertionError):
        assert_drawn_by_mmsegmentation(model.context)


def test_recipes_say_where_each_value_stands():
    """Sec. 3, the tables' captions and the code, value by value (N12)."""
    shared = {"batch": 16, "momentum": 0.9, "power": 0.9, "min_lr": 1e-4,
              "warmup": 4000, "warmup_from": 0.01, "scale": (0.5, 2.0),
              "photometric": True, "aux_weight": 0.4}
    for dataset, expected in {
            "cityscapes": {"lr": 0.01, "weight_decay": 5e-4, "crop": (512, 1024),
                           "iterations": 84_000, "backbone": "resnet50"},
            "ade20k": {"lr": 0.01, "weight_decay": 5e-4, "crop": (512, 512),
                       "iterations": 164_000, "backbone": "resnet101",
                       "base_size": (2048, 512)},
            "context60": {"lr": 0.004, "weight_decay": 1e-4, "crop": (480, 480),
                          "iterations": 84_000, "backbone": "resnet101",
                          "base_size": (520, 520)}}.items():
        recipe = nrd.RECIPES[dataset]
        expected = expected | shared
        assert {name: recipe[name][0] for name in expected} == expected
        assert recipe["lr"][1] == recipe["crop"][1] == "paper, Sec. 3"
        assert recipe["backbone"][1].startswith("Table")
        assert "Table 3: 4k of warm-up" in recipe["iterations"][1]
        assert recipe["photometric"][1].startswith("mmsegmentation")
        assert all(source for _, source in recipe.values())
    assert "base_size" not in nrd.RECIPES["cityscapes"], "all images are 1024x2048"


# --- The picture ---------------------------------------------------------------------


@pytest.mark.parametrize("variant, size", [
    ("default", (64, 96)), ("default", (65, 97)), ("default", (32, 32)),
    ("no-guidance", (64, 64)), ("guidance-only", (64, 96))])
def test_the_picture_shows_the_models_own_patches(variant, size):
    """What is plotted as a cell's patch is that block of the network's own logits."""
    model = common.build_model(f"nrd:{variant}", 5, **SMALL, init="mlp").eval()
    image = torch.randn(1, 3, *size)
    figure = nrd.explain(model, image, classes=list("abcde"))
    with torch.no_grad():
        logits = model.decode(image)[0][0]
    said = logits.argmax(0)
    planes = common.one_hot(said[None], 5)[0]
    cells = nrd.cells_that_differ(planes, 8, size[0] // 32, size[1] // 32)
    colours = common.label_colours(None, 5)
    patches = plotted(figure, "own θ")
    assert len(patches) == len(cells) == min(3, size[0] // 32 * (size[1] // 32))
    for patch, cell in zip(patches, cells):
        assert torch.equal(patch, colours[said[nrd.block(*cell, 8)]])
    (maps,) = plotted(figure, "Logits →")  # all five: two columns, four rows
    first = logits[(slice(None), *nrd.block(*cells[0], 8))]
    for k in range(5):
        y = k // 2 * 9
        x = k % 2 * 9
        assert torch.allclose(maps[y:y + 8, x:x + 8], first[k], atol=1e-5)


def test_layers_of_the_picture_are_those_of_the_literal_g():
    """Hidden units of a cell after their ReLU, and its drawing by another's theta."""
    widths = (4, 3, 6, 5)
    B, h, w, s = 1, 2, 3, 2
    theta = torch.randn(B, nrd.theta_length(widths), h, w, dtype=torch.float64)
    inputs = torch.randn(B, 4, s * h, s * w, dtype=torch.float64)
    units, logits = nrd.layers_of_g(theta, inputs, widths)
    assert torch.equal(logits, nrd.represent(theta, inputs, widths=widths))
    layers = layers_of_one_cell(theta[0, :, 1, 2], widths)
    point = inputs[0, :, 3, 4]  # the lower left of the four points of cell (1, 2)
    for depth in (1, 2):
        assert torch.allclose(units[depth - 1][0, :, 3, 4],
                              g(layers[:depth], point).relu())
    beside = nrd.represent(nrd.of_the_cell_beside(theta), inputs, widths=widths)
    for cell, other in (((0, 0), (0, 1)), ((1, 1), (1, 2)), ((1, 2), (1, 1))):
        rows, columns = nrd.block(*cell, s)
        drawn = nrd.g_of_another_cell(theta, inputs, widths, cell, other)
        assert torch.allclose(drawn, beside[:, :, rows, columns])
        literal = g(layers_of_one_cell(theta[(0, slice(None), *other)], widths),
                    inputs[0, :, cell[0] * s, cell[1] * s])
        assert torch.allclose(drawn[0, :, 0, 0], literal)


def test_the_chosen_cells_differ_and_are_mixed():
    """Two kinds of mixture, one of them twice, among cells of a single class."""
    labels = torch.zeros(4 * 8, 6 * 8, dtype=torch.uint8)
    labels[:4, :8] = 1  # cell (0, 0): half of it is 1
    labels[8:12, :8] = 1  # cell (1, 0), beside it, too
    labels[24:28, 40:] = 2  # cell (3, 5): half of it is 2
    labels[:4, 40:44] = 3  # cell (0, 5): four quarters
    labels[:4, 44:] = 4
    labels[4:8, 40:44] = 5
    chosen = nrd.cells_that_differ(common.one_hot(labels[None], 6)[0], 8, 4, 6)
    assert chosen[0] == (0, 5) and set(chosen[1:]) <= {(0, 0), (1, 0), (3, 5)}
    assert (3, 5) in chosen
    pure = common.one_hot(torch.zeros(1, 16, 16, dtype=torch.uint8), 2)[0]
    assert len(set(nrd.cells_that_differ(pure, 8, 2, 2))) == 3


def test_seams_are_the_changes_where_cells_meet():
    labels = torch.arange(3).repeat_interleave(4).expand(5, 12)
    changes, border = nrd.class_changes(labels, 4)
    assert border.nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(changes, border.expand(5, 11))
    changes, border = nrd.class_changes(labels, 3)
    assert not (changes & border).any()
    # 4 x 12 points, cells of 4 x 4: 2 columns of 4 pairs where cells meet, all differ
    assert nrd.seam_shares(labels[:4], 4).tolist() == [0, 1]
    # the other way round, and one point of its own inside a cell: 4 of 72 pairs
    labels = labels[:4].T.clone()
    labels[1, 1] = 5
    assert torch.allclose(nrd.seam_shares(labels, 4), torch.tensor([4 / 72, 1]))


def test_the_demo_saves_its_picture(thin, tmp_path, capsys):
    nrd.demo(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "untrained" in capsys.readouterr().out


def test_mosaic_and_farthest_points():
    maps = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    whole = common.mosaic(maps, 2)
    assert whole.shape == (5, 5) and (whole[3:, :2] == 2).all()
    assert (whole[:2, 3:] == 1).all() and whole[2].isnan().all()
    x = torch.tensor([[0.0], [1], [10], [5.4], [10]])
    assert common.farthest_points(x, 3, 0) == [0, 2, 3]
    assert common.farthest_points(torch.zeros(2, 3), 4, 1) == [1, 0]
