"""What SFNet's paper claims about flow between feature maps, each claim as a test.

The last part holds the module against the official code, SFSegNets, restated here.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import common
import sfnet
from conftest import SMALL


def warp_slowly(coarse, flow):
    """Eqs. (2) and (3) literally: per position the four neighbours of p_l, weighted."""
    B, D, h, w = coarse.shape
    q, r = flow.shape[-2:]
    images = []
    for b in range(B):
        rows = []
        for y in range(q):
            for x in range(r):
                px = (x + flow[b, 0, y, x]) * (w - 1) / (r - 1)
                py = (y + flow[b, 1, y, x]) * (h - 1) / (q - 1)
                left, top = math.floor(px.item()), math.floor(py.item())
                value = torch.zeros(D, dtype=coarse.dtype)
                for ny in (top, top + 1):
                    for nx in (left, left + 1):
                        if 0 <= ny < h and 0 <= nx < w:
                            weight = (1 - (py - ny).abs()) * (1 - (px - nx).abs())
                            value = value + weight * coarse[b, :, ny, nx]
                rows.append(value)
        images.append(torch.stack(rows, 1).view(D, q, r))
    return torch.stack(images)


@pytest.mark.parametrize("q, r", [(5, 7), (6, 8)], ids=["2n-1 rows", "2n rows"])
def test_warp_is_equations_2_and_3(q, r):
    """warp() equals the loop over four neighbours, in value and in both gradients.

    Flows reach 3 fine pixels, so some points lie outside the map (N4).
    """
    coarse0 = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    flow0 = 6 * torch.rand(2, 2, q, r, dtype=torch.float64) - 3
    weight = torch.randn(2, 3, q, r, dtype=torch.float64)
    results = []
    for function in (sfnet.warp, warp_slowly):
        coarse, flow = coarse0.clone().requires_grad_(), flow0.clone().requires_grad_()
        out = function(coarse, flow)
        (out * weight).sum().backward()
        results.append((out, coarse.grad, flow.grad))
    for fast, slow, name in zip(*results, ("warped", "d coarse", "d flow")):
        torch.testing.assert_close(fast, slow, msg=lambda m: f"{name}: {m}")


def test_points_are_halved_exactly():
    """Eq. (2): p_l = (p + flow) / 2, to the last bit, where 129 rows meet 65."""
    flow = torch.randint(-8, 9, (1, 2, 129, 257)).double()
    y, x = torch.meshgrid(torch.arange(129), torch.arange(257), indexing="ij")
    literal = (torch.stack([x, y]) + flow) / 2
    assert torch.equal(sfnet.source_points(flow, (65, 129)), literal), (
        "p_l is not (p + flow) / 2: half of the *fine* position, x before y")


def test_flow_is_predicted_from_both_maps():
    """Eq. (1): a 3x3 convolution of cat(F_l, F_(l-1)), coarse channels first."""
    coarse, fine = (torch.randn(1, 2, 4, 5, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    both = [*coarse[0], *fine[0]]
    literal = torch.zeros(2, 4, 5, dtype=torch.float64)
    for o in range(2):
        for y in range(4):
            for x in range(5):
                for c in range(4):
                    for i in range(3):
                        for j in range(3):
                            if 0 <= y + i - 1 < 4 and 0 <= x + j - 1 < 5:
                                literal[o, y, x] += (weight[o, c, i, j]
                                                     * both[c][y + i - 1, x + j - 1])
    flow = sfnet.predict_flow(coarse, fine, lambda x: F.conv2d(x, weight, padding=1))
    torch.testing.assert_close(flow[0], literal)


@pytest.mark.parametrize("h, w, q, r", [(33, 17, 65, 33), (4, 5, 8, 9), (1, 2, 2, 4)])
def test_zero_flow_is_bilinear_enlargement(h, w, q, r):
    """Without flow FAM is the ordinary pyramid, at the borders too (N3)."""
    coarse = torch.randn(2, 3, h, w, dtype=torch.float64)
    plain = F.interpolate(coarse, (q, r), mode="bilinear", align_corners=True)
    warped = sfnet.warp(coarse, torch.zeros(2, 2, q, r, dtype=torch.float64))
    torch.testing.assert_close(warped, plain, rtol=0, atol=1e-13,
                               msg="zero flow moved something: align_corners?")
    fine = torch.empty(2, 3, q, r, dtype=torch.float64)  # only its size is used
    assert torch.equal(sfnet.ZeroFlow()(coarse, fine), plain)


@pytest.mark.parametrize("channel, axis", [(0, 3), (1, 2)], ids=["x", "y"])
def test_one_unit_of_flow_is_one_fine_pixel(channel, axis):
    """Flow 1 in channel 0 fetches from the right, in channel 1 from below (N2)."""
    coarse = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    flow = torch.zeros(1, 2, 17, 17, dtype=torch.float64)
    plain = sfnet.warp(coarse, flow)
    flow[:, channel] = 1
    moved = sfnet.warp(coarse, flow)
    torch.testing.assert_close(
        moved.narrow(axis, 0, 16), plain.narrow(axis, 1, 16),
        msg=f"flow 1 in channel {channel} is not one pixel along axis {axis}")


def test_flow_out_of_the_picture_fetches_nothing():
    """N4: neighbours outside the map are zeros, not a repeated border."""
    flow = torch.zeros(1, 2, 5, 5)
    flow[:, 0] = 100
    assert not sfnet.warp(torch.ones(1, 1, 3, 3), flow).any()


@pytest.mark.parametrize("spec, backbone, without, with_heads", [
    ("sfnet", "resnet18s", 12_869_715, 13_320_588),
    ("sfnet", "resnet50s", 31_325_139, 33_111_564),
    ("sfnet", "resnet101s", 50_317_267, 52_103_692),
    ("sfnet", "shufflenet_v2_x1_5", 4_047_027, 4_047_027 + 2 * 150_291),
    ("sfnet:pspnet", "resnet101s", 65_707_475, 65_707_475 + 2_364_691)])
def test_parameters_of_the_network(spec, backbone, without, with_heads):
    """Exact counts of the released configurations, 19 classes; 12.87 M, 50.32 M and
    PSPNet's 65.7 M in the paper's Table 4 are those without auxiliary heads.
    """
    for aux, count in ((False, without), (True, with_heads)):
        with torch.device("meta"):
            model = common.build_model(spec, 19, backbone=backbone, aux=aux)
        assert sum(p.numel() for p in model.parameters()) == count


def test_parameters_of_fam_by_hand():
    """N1: 128 -> 64 twice, then 3x3 from 128 to 2, nothing has a bias."""
    fam = sfnet.FAM(128)
    assert sum(p.numel() for p in fam.parameters()) == 2 * 128 * 64 + 9 * 128 * 2


@pytest.mark.parametrize("ceil_mode, sizes", [(True, (257, 129, 65, 33)),
                                              (False, (256, 128, 64, 32))])
def test_pooling_decides_the_sizes(ceil_mode, sizes):
    """N5: rounded up, an image of 1024 gives 2n-1 rows over n, the half of Eq. (2)."""
    with torch.device("meta"):
        model = common.build_model("sfnet", 19, backbone="resnet18s",
                                   ceil_mode=ceil_mode).eval()
        features = model.encoder(torch.empty(1, 3, 1024, 1024))
    assert tuple(x.shape[-1] for x in list(features.values())[1:]) == sizes


def pyramid(spec="sfnet", **options):
    model = common.build_model(spec, 5, **SMALL, **options).eval()
    features = model.encoder(torch.randn(1, 3, 64, 96))
    return model, model.context(features["res5"]), features


def test_the_way_down_takes_the_sum_unsmoothed():
    """N7: each sum is lateral + aligned coarser *sum*; the 3x3 never gets into it."""
    model, context, features = pyramid()
    decoder = model.decoder
    coarse = context
    for stage, got in zip(("res4", "res3", "res2"),
                          decoder.top_down(context, features), strict=True):
        fine = decoder.laterals[stage](features[stage])
        coarse = fine + decoder.align[stage](coarse, fine)
        torch.testing.assert_close(got, coarse, msg=f"{stage}: not the plain sum")
    before = [x.clone() for x in decoder.top_down(context, features)]
    logits = decoder(context, features)[0]
    for smooth in decoder.smooth.values():
        torch.nn.init.normal_(smooth[0].weight)
    after = decoder.top_down(context, features)
    assert all(map(torch.equal, before, after)), "smoothing changed the way down"
    assert not torch.equal(logits, decoder(context, features)[0]), "smoothing is unused"


def test_pyramid_without_fam_is_fam_with_zero_flow():
    """`fpn` has every weight of SFNet but FAM's, and computes what zero flow gives.

    It has a ZeroFlow at every level, where SFNet has a FAM.
    """
    model, context, features = pyramid()
    for fam in model.decoder.align.values():
        torch.nn.init.zeros_(fam.flow.weight)
    fpn = common.build_model("sfnet:fpn", 5, **SMALL).eval()
    assert all(isinstance(m, sfnet.ZeroFlow) for m in fpn.decoder.align.values())
    left = fpn.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all("align" in k for k in left.unexpected_keys)
    plain, still = (m.decoder(context, features)[0] for m in (fpn, model))
    torch.testing.assert_close(plain, still, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant, levels", [
    ("default", (5, 4, 3)), ("fpn", ()), ("fam-f3", (3,)), ("fam-f5", (5,)),
    ("fam-f4-f5", (5, 4))])
def test_level_l_is_aligned_with_the_next_finer_one(variant, levels):
    """Table 1 (b): the FAM at F_l brings F_l onto F_(l-1), so F_5's works on res4.

    Where there is no FAM there is a ZeroFlow, and never neither.
    """
    with torch.device("meta"):
        align = common.build_model(f"sfnet:{variant}", 5, **SMALL).decoder.align
    fams = [stage for stage, m in align.items() if isinstance(m, sfnet.FAM)]
    assert fams == [f"res{l - 1}" for l in levels]
    assert list(align) == ["res4", "res3", "res2"]
    assert all(isinstance(align[stage], sfnet.ZeroFlow) for stage in {*align} - {*fams})


@pytest.mark.parametrize("backbone, heads",
                         [("resnet18", 3), ("shufflenet_v2_x1_5", 2)])
def test_auxiliary_heads_only_in_training(backbone, heads):
    """Sec. 3.3: one head per sum, enlarged to the image by SFNet; gone in eval."""
    model = common.build_model("sfnet", 5, backbone=backbone, channels=16)
    images = torch.randn(2, 3, 64, 96)
    aux = model(images)["aux"]
    assert [x.shape for x in aux] == [(2, 5, 64, 96)] * heads
    assert model.eval()(images)["aux"] == []


def test_pyramid_pooling_averages_1_4_9_and_36_cells():
    """PPM: the branches pool to 1, 2, 3, 6 cells a side and keep negative values.

    PSPNet's own has a ReLU behind each, at no cost in parameters (N15).
    """
    ppm = sfnet.PPM(4, 3).eval()
    x = torch.randn(1, 4, 12, 12)
    for side, branch in zip((1, 2, 3, 6), ppm.branches, strict=True):
        cell = 12 // side
        pooled = x.view(1, 4, side, cell, side, cell).mean((3, 5))
        torch.testing.assert_close(branch[0](x), pooled)
    assert (ppm.branches[3](x) < 0).any(), "no ReLU after the pooled 1x1"
    assert ppm.project[0].in_channels == 4 + 4 * 3, "the map itself goes in, too"
    rectified = sfnet.PPM(4, 3, relu=True).eval()
    rectified.load_state_dict(ppm.state_dict())
    for plain, branch in zip(ppm.branches, rectified.branches, strict=True):
        torch.testing.assert_close(branch(x), plain(x).relu())


@pytest.mark.parametrize("spec, relus", [
    ("sfnet", 0), ("sfnet:fpn", 0), ("sfnet:pspnet", 4)])
def test_who_has_a_relu_in_pyramid_pooling(spec, relus):
    """N15: SFNet as its code without, PSPNet as its own code with one per branch."""
    with torch.device("meta"):
        context = common.build_model(spec, 5, **SMALL).context
        option = common.build_model("sfnet", 5, **SMALL, context="ppm-relu").context
    for ppm, number in ((context, relus), (option, 4)):
        found = [m for m in ppm.branches.modules() if isinstance(m, torch.nn.ReLU)]
        assert len(found) == number


def test_correlation_scores_every_offset():
    """correlation() literally: mean over channels of coarse(p + o) * fine(p)."""
    q, r = 4, 5
    coarse, fine = (torch.randn(1, 3, q, r, dtype=torch.float64) for _ in range(2))
    literal = torch.zeros(1, 9, q, r, dtype=torch.float64)
    for i, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        for y in range(q):
            for x in range(r):
                if 0 <= y + dy < q and 0 <= x + dx < r:
                    match = coarse[0, :, y + dy, x + dx] * fine[0, :, y, x]
                    literal[0, i, y, x] = match.mean()
    torch.testing.assert_close(sfnet.correlation(coarse, fine, reach=1), literal)


def test_deformable_rival_starts_as_an_ordinary_convolution():
    """N12: it convolves both maps, its offsets start at 0 and do get a gradient."""
    layer = sfnet.Deformable(4)
    coarse = torch.randn(1, 4, 3, 3)
    fine = torch.randn(1, 4, 5, 5)
    both = torch.cat([sfnet.enlarge(coarse, (5, 5)), fine], 1)
    plain = F.conv2d(both, layer.convolution.weight, layer.convolution.bias, padding=1)
    out = layer(coarse, fine)
    torch.testing.assert_close(out, plain)
    out.square().sum().backward()
    assert layer.offsets.weight.grad.any() and layer.offsets.bias.grad.any()


@pytest.mark.parametrize("upsampling", ["nearest", "deconv"])
@pytest.mark.parametrize("q, r", [(5, 7), (6, 8)])
def test_other_enlargements_reach_the_fine_size(upsampling, q, r):
    """Table 2 (a): only the input of the flow changes; 2n-1 and 2n rows both fit."""
    fam = sfnet.FAM(4, upsampling=upsampling)
    coarse = torch.randn(1, 4, 3, 4)
    fine = torch.randn(1, 4, q, r)
    assert fam(coarse, fine).shape == (1, 4, q, r)
    torch.nn.init.zeros_(fam.flow.weight)
    torch.testing.assert_close(fam(coarse, fine), sfnet.enlarge(coarse, (q, r)))


def test_non_local_is_a_weighted_mean_over_all_positions():
    """y_i = sum_j softmax_j(theta_i . phi_j) g_j, position by position."""
    layer = sfnet.NonLocal(4, 3).double().eval()
    x = torch.randn(1, 4, 2, 3).double()
    theta, phi, g = layer.split(x)[0].flatten(1).split(2)
    y = torch.zeros(2, 6, dtype=torch.float64)
    for i in range(6):
        scores = torch.stack([theta[:, i] @ phi[:, j] for j in range(6)]).softmax(0)
        for j in range(6):
            y[:, i] += scores[j] * g[:, j]
    torch.testing.assert_close(layer(x),
                               layer.project(x + layer.back(y.view(1, 2, 2, 3))))


def test_warp_stays_in_float32_under_autocast():
    """Half precision would round positions beyond 256 to quarters of a pixel."""
    fam = sfnet.FAM(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped = fam(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 5, 5))
    assert warped.dtype == torch.float32


def test_colours_tell_directions_apart():
    """Fig. 5: right is red, no flow white, and opposite flows have opposite hues."""
    flow = torch.tensor([[[2.0, -2.0, 0.0]], [[0.0, 0.0, 0.0]]])
    right, left, none = sfnet.flow_colours(flow, 2)[0].tolist()
    assert (right, left, none) == ([1, 0, 0], [0, 1, 1], [1, 1, 1])
    fpn = common.build_model("sfnet:fpn", 5, **SMALL).eval()
    with pytest.raises(common.UserError, match="no flow"):
        sfnet.explain(fpn, torch.randn(1, 3, 64, 96))


@pytest.fixture
def explained():
    """An untrained model whose flows are of some pixels, an image, and the picture."""
    torch.manual_seed(0)
    model = common.build_model("sfnet", 5, **SMALL).eval()
    for fam in model.decoder.align.values():
        fam.flow.weight.data.mul_(30)
    image = torch.randn(1, 3, 64, 96)
    figure = sfnet.explain(model, image, classes=["sky", "road", "car", "sign", "pole"])
    return model, image, figure


def titled(figure, title):
    """The axis of that title."""
    return next(axis for axis in figure.axes if axis.get_title(loc="left") == title)


def picture(figure, title):
    """The tensor that is drawn under that title."""
    return torch.tensor(titled(figure, title).images[0].get_array().data)


def test_the_arrows_are_the_flow_of_the_model_in_pixels_of_the_image(explained):
    """Read back from the picture: what FAM predicts, times the image's pixels a cell.

    17 x 25 cells lie on 64 x 96 pixels, so a flow of 1 is 95 / 24 pixels to the right
    or 63 / 16 down. The arrows are of true length, and the colours are of the same.
    """
    model, image, figure = explained
    predicted = []
    model.decoder.align["res2"].flow.register_forward_hook(
        lambda _, __, flow: predicted.append(flow[0]))
    with torch.no_grad():
        model(image)
    x, y = predicted[0]
    quiver = titled(figure, "The flow as arrows").collections[0]
    assert quiver.scale == 1 and quiver.angles == quiver.scale_units == "xy"
    torch.testing.assert_close(torch.tensor(quiver.U.data), (x * 95 / 24).flatten())
    torch.testing.assert_close(torch.tensor(quiver.V.data), (y * 63 / 16).flatten())
    flow = torch.stack([x * 95 / 24, y * 63 / 16])
    longest = flow.norm(dim=0).quantile(0.99).item()
    torch.testing.assert_close(picture(figure, "The flow in colours"),
                               sfnet.flow_colours(flow, longest))


def test_the_maps_in_the_picture_are_the_models(explained):
    """One channel of what the finest FAM gets and gives, and of plain enlargement."""
    model, image, figure = explained
    seen = []
    model.decoder.align["res2"].register_forward_hook(
        lambda _, inputs, aligned: seen.extend([inputs[0], aligned]))
    with torch.no_grad():
        model(image)
    coarse, aligned = seen
    bar = next(axis.get_ylabel() for axis in figure.axes if axis.get_ylabel())
    channel = int(bar.split()[-1])
    for title, x in (("Coarse map", coarse),
                     ("Enlarged without flow", sfnet.enlarge(coarse, (17, 25))),
                     ("Fetched along the flow", aligned)):
        assert torch.equal(picture(figure, title), x[0, channel]), title


def test_the_labels_without_flow_are_those_of_zero_flow(explained):
    """Setting the flow to zero is having ZeroFlow in every FAM's place."""
    model, image, figure = explained
    colours = common.label_colours(None, 5)
    for title in ("Labels with flow", "Labels without flow"):
        with torch.no_grad():
            labels = model(image)["out"][0].argmax(0)
        assert torch.equal(picture(figure, title), colours[labels]), title
        for stage in model.decoder.align:
            model.decoder.align[stage] = sfnet.ZeroFlow()
    entries = [text.get_text() for axis in figure.axes if axis.get_legend()
               for text in axis.get_legend().get_texts()]
    assert entries and set(entries) <= {"sky", "road", "car", "sign", "pole"}


def test_a_hook_of_explain_does_not_stay(explained):
    model, _, _ = explained
    assert not any(layer._forward_hooks for layer in model.modules())


def test_the_window_lies_where_labels_change():
    """Else where the flow is longest; and it is a third of the image on each side."""
    changed = torch.zeros(48, 96, dtype=torch.bool)
    changed[40:, 70:80] = True
    top, left, height, width = sfnet.busiest(changed, torch.ones(12, 24))
    assert (height, width) == (16, 32) and top + height > 40
    assert left <= 70 and left + width >= 80
    length = torch.zeros(12, 24)
    length[1, 2] = 1.0
    top, left, _, _ = sfnet.busiest(changed & False, length)
    assert top <= 4 and left <= 8


@pytest.mark.thorough
def test_demo_saves_the_picture(tmp_path, capsys):
    sfnet.demo(str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "evaluate.py cost sfnet" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["context", "align", "upsampling", "decoder",
                                    "flow_unit"])
def test_unknown_parts_are_refused(option):
    with pytest.raises(common.UserError, match=f"{option}='x': must be one of"):
        common.build_model("sfnet", 5, **SMALL, **{option: "x"})


# --- The paper's recipe --------------------------------------------------------------


SETTING = {"momentum": 0.9, "weight_decay": 5e-4, "power": 0.9, "min_lr": 0.0,
           "scale": (0.75, 2.0), "photometric": False, "batch": 16, "warmup": 0,
           "ohem": 0.1, "ohem_threshold": 0.0, "aux_weight": 1.0,
           "weights": "imagenet"}


@pytest.mark.parametrize("dataset, stated, section", [
    ("cityscapes", {"iterations": 50_000, "lr": 0.01, "crop": (1024, 1024)}, "4.1"),
    ("ade20k", {"epochs": 120, "lr": 0.01, "crop": (512, 512)}, "8"),
    ("context60", {"epochs": 120, "lr": 0.001, "crop": (512, 512)}, "8"),
    ("camvid", {"epochs": 120, "lr": 0.001, "crop": (640, 640)}, "8")])
def test_recipes_are_the_papers(dataset, stated, section):
    """Sec. 4.1 and Sec. 8, number by number, and each says where it stands (N14)."""
    recipe = dict(sfnet.RECIPES[dataset])
    backbone, source = recipe.pop("backbone")
    assert backbone in ("resnet18", "resnet50") and "deep stem" in source
    assert {name: value for name, (value, _) in recipe.items()} == SETTING | stated
    for name in {*stated, "batch"}:
        assert recipe[name][1] == f"paper, Sec. {section}"
    for name, (_, source) in recipe.items():
        assert source.startswith(("paper, Sec.", "official code", "the paper names "))
        if section == "8" and name in ("weight_decay", "power", "scale", "momentum"):
            assert source == "paper, Sec. 4.1, since Sec. 8 names none"


def test_mapillary_and_then_cityscapes_have_the_same_setting():
    """Sec. 7: 50,000 steps on each; Mapillary's longer sides are 2048 first (N17)."""
    cityscapes = sfnet.RECIPES["cityscapes"]
    steps = {"iterations": (50_000, "paper, Sec. 7")}
    assert sfnet.RECIPES["finetuned cityscapes"] == cityscapes | steps
    assert sfnet.RECIPES["mapillary"] == cityscapes | steps | {
        "base_size": ((2048, 2048), "paper, Sec. 7: the longer side")}


# --- The official code, restated -----------------------------------------------------


def official_shapes(deep: bool, K: int, D: int) -> dict[str, tuple]:
    """Names and shapes in a checkpoint of SFSegNets, on ResNet-18 or ResNet-50."""
    shapes = {}

    def convolution(name, outputs, inputs, kernel, bias=False):
        shapes[f"{name}.weight"] = outputs, inputs, kernel, kernel
        if bias:
            shapes[f"{name}.bias"] = outputs,

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = channels,
        shapes[f"{name}.num_batches_tracked"] = ()

    for i, (inputs, outputs) in enumerate([(3, 64), (64, 64), (64, 128)]):
        convolution(f"layer0.0.{3 * i}", outputs, inputs, 3)
        norm(f"layer0.0.{3 * i + 1}" if i < 2 else "layer0.1", outputs)
    inputs = 128
    widths = []
    for level, count in enumerate((3, 4, 6, 3) if deep else (2, 2, 2, 2)):
        width = 64 * 2**level
        outputs = 4 * width if deep else width
        sides = (1, 3, 1) if deep else (3, 3)
        for block in range(count):
            name = f"layer{level + 1}.{block}"
            if block == 0 and (level > 0 or inputs != outputs):
                convolution(f"{name}.downsample.0", outputs, inputs, 1)
                norm(f"{name}.downsample.1", outputs)
            for i, side in enumerate(sides, 1):
                last = outputs if i == len(sides) else width
                convolution(f"{name}.conv{i}", last, inputs if i == 1 else width, side)
                norm(f"{name}.bn{i}", last)
            inputs = outputs
        widths.append(outputs)
    for i in range(4):
        convolution(f"head.ppm.stages.{i}.1", D, widths[3], 1)
        norm(f"head.ppm.stages.{i}.2", D)
    convolution("head.ppm.bottleneck.0", D, widths[3] + 4 * D, 1)
    norm("head.ppm.bottleneck.1", D)
    for i in range(3):
        convolution(f"head.fpn_in.{i}.0", D, widths[i], 1, bias=True)
        norm(f"head.fpn_in.{i}.1", D)
        convolution(f"head.fpn_out.{i}.0.0", D, D, 3)
        norm(f"head.fpn_out.{i}.0.1", D)
        convolution(f"head.fpn_out_align.{i}.down_h", D // 2, D, 1)
        convolution(f"head.fpn_out_align.{i}.down_l", D // 2, D, 1)
        convolution(f"head.fpn_out_align.{i}.flow_make", 2, D, 3)
        convolution(f"head.dsn.{i}.0", D, D, 3, bias=True)
        norm(f"head.dsn.{i}.1", D)
        convolution(f"head.dsn.{i}.4", K, D, 1, bias=True)
    convolution("head.conv_last.0.0", D, 4 * D, 3)
    norm("head.conv_last.0.1", D)
    convolution("head.conv_last.1", K, D, 1, bias=True)
    return shapes


def random_checkpoint(deep=False, K=5, D=16) -> dict[str, torch.Tensor]:
    """Random weights in float64 under which signals keep their size and flows do not.

    The convolutions of the flow are large, so that it is pixels long.
    """
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in official_shapes(deep, K, D).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
            continue
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        if len(shape) == 4:
            x = x * (2 / math.prod(shape[1:])) ** 0.5
        elif name.endswith(("running_var", "weight")):
            x = 1 + 0.5 * x.tanh()
        else:
            x = 0.1 * x
        state[name] = 3 * x if "flow_make" in name else x
    return state


class Official:
    """SFSegNets' network on named tensors: what it computes, step by step.

    `dilated` is its variant D. Dropout is left out. In training the running statistics
    in `state` are updated.
    """

    def __init__(self, state, *, training, dilated=True):
        self.state, self.training, self.dilated = state, training, dilated

    def conv(self, x, name, stride=1, dilation=1):
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2 * dilation
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding,
                        dilation)

    def norm(self, x, name):
        mean, var, weight, bias = (self.state[f"{name}.{part}"] for part in (
            "running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, self.training)

    def block(self, x, name, stride, dilation):
        """A residual block: conv2 is dilated, the stride is in the first 3x3."""
        deep = f"{name}.conv3.weight" in self.state
        y = self.conv(x, f"{name}.conv1", 1 if deep else stride)
        y = self.norm(y, f"{name}.bn1").relu()
        y = self.conv(y, f"{name}.conv2", stride if deep else 1, dilation)
        y = self.norm(y, f"{name}.bn2")
        if deep:
            y = self.norm(self.conv(y.relu(), f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.state:
            x = self.conv(x, f"{name}.downsample.0", stride)
            x = self.norm(x, f"{name}.downsample.1")
        return (x + y).relu()

    def stages(self, images):
        x = self.norm(self.conv(images, "layer0.0.0", 2), "layer0.0.1").relu()
        x = self.norm(self.conv(x, "layer0.0.3"), "layer0.0.4").relu()
        x = self.norm(self.conv(x, "layer0.0.6"), "layer0.1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        outputs = []
        for level, dilation in ((1, 1), (2, 1), (3, 2), (4, 4)):
            block = 0
            while f"layer{level}.{block}.conv1.weight" in self.state:
                stride = 2 if level > 1 and block == 0 else 1
                x = self.block(x, f"layer{level}.{block}", stride,
                               dilation if self.dilated else 1)
                block += 1
            outputs.append(x)
        return outputs

    def enlarge(self, x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)

    def pooling(self, x):
        parts = []
        for i, side in enumerate((1, 2, 3, 6)):
            y = self.conv(F.adaptive_avg_pool2d(x, side), f"head.ppm.stages.{i}.1")
            parts.append(self.enlarge(self.norm(y, f"head.ppm.stages.{i}.2"), x))
        y = self.conv(torch.cat([*parts, x], 1), "head.ppm.bottleneck.0")
        return self.norm(y, "head.ppm.bottleneck.1").relu()

    def align(self, fine, coarse, name):
        """The flow, divided by (width, height), is added to a grid from -1 to 1."""
        q, r = fine.shape[-2:]
        both = torch.cat([self.enlarge(self.conv(coarse, f"{name}.down_h"), fine),
                          self.conv(fine, f"{name}.down_l")], 1)
        flow = self.conv(both, f"{name}.flow_make")
        x = torch.linspace(-1, 1, r, dtype=fine.dtype) + flow[:, 0] / r
        y = torch.linspace(-1, 1, q, dtype=fine.dtype)[:, None] + flow[:, 1] / q
        return F.grid_sample(coarse, torch.stack([x, y], -1), align_corners=True)

    def __call__(self, images):
        """-> logits, and those of the auxiliary heads from coarse to fine."""
        stages = self.stages(images)
        coarse = self.pooling(stages[3])
        levels, aux = [coarse], []
        for i in (2, 1, 0):
            fine = self.conv(stages[i], f"head.fpn_in.{i}.0")
            fine = self.norm(fine, f"head.fpn_in.{i}.1").relu()
            coarse = fine + self.align(fine, coarse, f"head.fpn_out_align.{i}")
            smooth = self.conv(coarse, f"head.fpn_out.{i}.0.0")
            levels.insert(0, self.norm(smooth, f"head.fpn_out.{i}.0.1").relu())
            y = self.norm(self.conv(coarse, f"head.dsn.{i}.0"), f"head.dsn.{i}.1")
            aux.append(self.enlarge(self.conv(y.relu(), f"head.dsn.{i}.4"), images))
        x = torch.cat([self.enlarge(level, levels[0]) for level in levels], 1)
        x = self.norm(self.conv(x, "head.conv_last.0.0"), "head.conv_last.0.1").relu()
        return self.enlarge(self.conv(x, "head.conv_last.1"), images), aux


def released(backbone="resnet18s", **options):
    """The variant `released` in float64, without dropout."""
    model = common.build_model("sfnet:released", 5, backbone=backbone, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return model.double()


def basic_block(i, o, stride):
    """Parameters of a block of ResNet-18: two 3x3, a 1x1 where the shortcut changes."""
    shortcut = i * o + 2 * o if stride > 1 or i != o else 0
    return 9 * i * o + 9 * o * o + 4 * o + shortcut


@pytest.mark.parametrize("name, total, blocks", [
    ("df1", 8_020_128, [(64, 3, 2), (128, 3, 2), (256, 3, 2), (512, 1, 1)]),
    ("df2", 17_474_208, [(64, 2, 2), (128, 1, 1), (128, 10, 2), (256, 1, 1),
                         (256, 4, 2), (512, 2, 1)])])
def test_df_networks_have_the_parameters_of_their_blocks(name, total, blocks):
    """N18: added up by hand: two 3x3 of stride 2, then blocks, without any pooling."""
    count = 9 * 3 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64
    width = 64
    for wide, number, stride in blocks:
        for k in range(number):
            count += basic_block(width, wide, stride if k == 0 else 1)
            width = wide
    assert count == total
    with torch.device("meta"):
        encoder = common.make_encoder(name, 3)
    assert sum(p.numel() for p in encoder.parameters()) == count


@pytest.mark.parametrize("name, sizes", [("df1", [(3, 4), (5, 7)]),
                                         ("df2", [(5, 7), (9, 13)])])
def test_the_pyramid_on_df_has_three_levels(name, sizes):
    """N18: 512, 256 and 128 channels; DF1's two coarsest lie on one grid of 1/32."""
    with torch.device("meta"):
        model = common.build_model("sfnet", 19, backbone=name)
        images = torch.empty(2, 3, 65, 97)
        features = model.encoder(images)
        widths = [features[stage].shape[1] for stage in model.decoder.stages]
        assert widths == [256, 128]
        sums = model.decoder.top_down(model.context(features["res5"]), features)
    assert [tuple(x.shape[-2:]) for x in sums] == sizes
    parts = common.count_cost(model, images)
    params = parts["total"]["params"] - parts["aux_heads"]["params"]
    assert params == pytest.approx({"df1": 9.242, "df2": 18.696}[name], abs=6e-4)


@pytest.mark.parametrize("backbone, dilated, size", [
    ("resnet18s", True, (65, 97)), ("resnet18s", False, (96, 64)),
    pytest.param("resnet50s", True, (64, 64), marks=pytest.mark.thorough)])
def test_released_network_is_the_official_one(backbone, dilated, size, monkeypatch):
    """Equal weights, equal logits, gradients and statistics: N1 to N10 in one.

    An unequal flow unit, order of levels or dilation changes the first digit.
    """
    deep = backbone == "resnet50s"
    state = random_checkpoint(deep)
    model = released(backbone, extra_dilation=dilated, channels=16)
    model.load_state_dict(sfnet.convert(state, model))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # FAM's float32: not here
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    close = dict(rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        logits, _ = Official(state, training=False, dilated=dilated)(images)
        torch.testing.assert_close(model.eval()(images)["out"], logits, **close)

    learned = {name: x.requires_grad_() for name, x in state.items()
               if name.endswith(("weight", "bias"))}
    logits, aux = Official(state, training=True, dilated=dilated)(images)
    ours = model.train()(images)
    torch.testing.assert_close(ours["out"], logits, **close)
    assert len(aux) == 3
    for a, b in zip(ours["aux"], aux, strict=True):
        torch.testing.assert_close(a, b, **close)
    for out, others in ((ours["out"], ours["aux"]), (logits, aux)):
        sum(x.sin().mean() for x in (out, *others)).backward()
    gradients = sfnet.convert(state | {n: x.grad for n, x in learned.items()}, model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **close)
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffer, gradients[name], **close)


def test_the_flow_unit_of_the_release():
    """N2: 1 is (r - 1) / (2 r) fine pixels along x, (q - 1) / (2 q) along y.

    With weights multiplied by that, the paper's unit gives the same function.
    """
    q, r = 9, 17
    flow = sfnet.in_pixels(torch.ones(1, 2, q, r), "released")
    torch.testing.assert_close(flow[0, 0], torch.full((q, r), (r - 1) / (2 * r)))
    torch.testing.assert_close(flow[0, 1], torch.full((q, r), (q - 1) / (2 * q)))
    ours, theirs = sfnet.FAM(4), sfnet.FAM(4, flow_unit="released")
    theirs.load_state_dict(ours.state_dict())
    coarse, fine = torch.randn(1, 4, 5, 9), torch.randn(1, 4, q, r)
    assert (ours(coarse, fine) - theirs(coarse, fine)).abs().max() > 0.01
    with torch.no_grad():
        ours.flow.weight[0] *= (r - 1) / (2 * r)
        ours.flow.weight[1] *= (q - 1) / (2 * q)
    torch.testing.assert_close(ours(coarse, fine), theirs(coarse, fine))


def test_a_checkpoint_without_flow_is_the_ordinary_pyramid():
    """SFSegNets' UperNetHead has all names but FAM's, as our variant `fpn` has."""
    state = {f"module.{name}": x for name, x in random_checkpoint().items()
             if "align" not in name}
    model = common.build_model("sfnet:fpn", 5, backbone="resnet18s", channels=16,
                               ceil_mode=False, extra_dilation=True)
    model.load_state_dict(sfnet.convert({"state_dict": state}, model))


@pytest.mark.parametrize("spec, options, change, said", [
    ("sfnet", {}, {}, "released unit"),
    ("sfnet", {"flow_unit": "released"}, {}, "rounds down"),
    ("sfnet:released", {"aux": False}, {}, "head.dsn.0.0.weight"),
    ("sfnet:released", {"backbone": "resnet18"}, {}, "layer0.0.weight"),
    ("sfnet:released", {"num_classes": 6}, {}, "head.conv_last.1.weight"),
    ("sfnet:released", {"align": "dcn"}, {}, "decoder.align.res4.offsets.weight"),
    ("sfnet:released", {}, {"head.edge.weight": torch.zeros(1)}, "head.edge.weight")])
def test_what_does_not_fit_is_named(spec, options, change, said):
    """Nothing is loaded in part, and nothing of the checkpoint is left over."""
    state = {name: torch.empty(shape, device="meta")
             for name, shape in official_shapes(deep=False, K=5, D=16).items()}
    options = {"backbone": "resnet18s", "channels": 16, "num_classes": 5} | options
    with torch.device("meta"):
        model = common.build_model(spec, **options)
    with pytest.raises(common.UserError) as error:
        sfnet.convert(state | change, model)
    assert said in str(error.value)


@pytest.mark.parametrize("backbone, options, said", [
    ("resnet18", {"aligned": (2, 3, 4)}, r"the levels are \[5, 4, 3\]"),
    ("df2", {"aligned": (3,)}, r"the levels are \[5, 4\]"),
    ("df1", {"upsampling": "deconv"}, "equally large")])
def test_levels_that_the_pyramid_lacks_are_refused(backbone, options, said):
    """Left out in silence, a FAM at a missing level would make an FPN of SFNet."""
    with pytest.raises(common.UserError, match=said), torch.device("meta"):
        common.build_model("sfnet", 5, backbone=backbone, **options)


@pytest.mark.parametrize("options", [{"backbone": "shufflenet_v2_x1_5"},
                                     {"backbone": "resnet18", "output_stride": 8}])
def test_extra_dilation_needs_a_resnet_with_its_strides(options):
    with pytest.raises(common.UserError, match="extra_dilation is for a ResNet"):
        common.build_model("sfnet", 5, extra_dilation=True, **options)
