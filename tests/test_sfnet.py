"""What SFNet's paper claims about flow between feature maps, each claim as a test."""
import math

import pytest
import torch
import torch.nn.functional as F

import common
import sfnet
from conftest import SMALL


def warp_slowly(coarse, flow):
    """Eqs. (2) and (3) literally: per position the four neighbours of p_l, weighted."""
    (B, D, q, r), (h, w) = coarse.shape, flow.shape[-2:]
    images = []
    for b in range(B):
        rows = []
        for y in range(h):
            for x in range(w):
                px = (x + flow[b, 0, y, x]) * (r - 1) / (w - 1)
                py = (y + flow[b, 1, y, x]) * (q - 1) / (h - 1)
                left, top = math.floor(px.item()), math.floor(py.item())
                value = torch.zeros(D, dtype=coarse.dtype)
                for ny in (top, top + 1):
                    for nx in (left, left + 1):
                        if 0 <= ny < q and 0 <= nx < r:
                            weight = (1 - (py - ny).abs()) * (1 - (px - nx).abs())
                            value = value + weight * coarse[b, :, ny, nx]
                rows.append(value)
        images.append(torch.stack(rows, 1).view(D, h, w))
    return torch.stack(images)


@pytest.mark.parametrize("h, w", [(5, 7), (6, 8)], ids=["2n-1 rows", "2n rows"])
def test_warp_is_equations_2_and_3(h, w):
    """warp() equals the loop over four neighbours, in value and in both gradients.

    Flows reach 3 fine pixels, so some points lie outside the map (N4).
    """
    coarse0 = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    flow0 = 6 * torch.rand(2, 2, h, w, dtype=torch.float64) - 3
    weight, results = torch.randn(2, 3, h, w, dtype=torch.float64), []
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
    both, literal = [*coarse[0], *fine[0]], torch.zeros(2, 4, 5, dtype=torch.float64)
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


@pytest.mark.parametrize("q, r, h, w", [(33, 17, 65, 33), (4, 5, 8, 9), (1, 2, 2, 4)])
def test_zero_flow_is_bilinear_enlargement(q, r, h, w):
    """Without flow FAM is the ordinary pyramid, at the borders too (N3)."""
    coarse = torch.randn(2, 3, q, r, dtype=torch.float64)
    plain = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=True)
    warped = sfnet.warp(coarse, torch.zeros(2, 2, h, w, dtype=torch.float64))
    torch.testing.assert_close(warped, plain, rtol=0, atol=1e-13,
                               msg="zero flow moved something: align_corners?")


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
    decoder, coarse = model.decoder, context
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
    """`fpn` has every weight of SFNet but FAM's, and computes what zero flow gives."""
    model, context, features = pyramid()
    for fam in model.decoder.align.values():
        torch.nn.init.zeros_(fam.flow.weight)
    fpn = common.build_model("sfnet:fpn", 5, **SMALL).eval()
    left = fpn.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all("align" in k for k in left.unexpected_keys)
    plain, still = (m.decoder(context, features)[0] for m in (fpn, model))
    torch.testing.assert_close(plain, still, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant, levels", [
    ("default", (5, 4, 3)), ("fpn", ()), ("fam-f3", (3,)), ("fam-f5", (5,)),
    ("fam-f4-f5", (5, 4))])
def test_level_l_is_aligned_with_the_next_finer_one(variant, levels):
    """Table 1 (b): the FAM at F_l brings F_l onto F_(l-1), so F_5's works on res4."""
    with torch.device("meta"):
        decoder = common.build_model(f"sfnet:{variant}", 5, **SMALL).decoder
    assert tuple(decoder.align) == tuple(f"res{l - 1}" for l in levels)


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
    """PPM: the branches pool to 1, 2, 3, 6 cells a side and keep negative values."""
    ppm = sfnet.PPM(4, 3).eval()
    x = torch.randn(1, 4, 12, 12)
    for side, branch in zip((1, 2, 3, 6), ppm.branches, strict=True):
        cell = 12 // side
        pooled = x.view(1, 4, side, cell, side, cell).mean((3, 5))
        torch.testing.assert_close(branch[0](x), pooled)
    assert (ppm.branches[3](x) < 0).any(), "no ReLU after the pooled 1x1"
    assert ppm.project[0].in_channels == 4 + 4 * 3, "the map itself goes in, too"


def test_correlation_scores_every_offset():
    """correlation() literally: mean over channels of coarse(p + o) * fine(p)."""
    (h, w), reach = (4, 5), 1
    coarse, fine = (torch.randn(1, 3, h, w, dtype=torch.float64) for _ in range(2))
    literal = torch.zeros(1, 9, h, w, dtype=torch.float64)
    for i, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    match = coarse[0, :, y + dy, x + dx] * fine[0, :, y, x]
                    literal[0, i, y, x] = match.mean()
    torch.testing.assert_close(sfnet.correlation(coarse, fine, reach=reach), literal)


def test_deformable_rival_starts_as_an_ordinary_convolution():
    """N12: offsets are zero at first, of both maps, and still receive a gradient."""
    layer = sfnet.Deformable(4)
    coarse, fine = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 5, 5)
    both = torch.cat([sfnet.enlarge(coarse, (5, 5)), fine], 1)
    plain = F.conv2d(both, layer.convolution.weight, layer.convolution.bias, padding=1)
    out = layer(coarse, fine)
    torch.testing.assert_close(out, plain)
    out.square().sum().backward()
    assert layer.offsets.weight.grad.any() and layer.offsets.bias.grad.any()


@pytest.mark.parametrize("upsampling", ["nearest", "deconv"])
@pytest.mark.parametrize("h, w", [(5, 7), (6, 8)])
def test_other_enlargements_reach_the_fine_size(upsampling, h, w):
    """Table 2 (a): only the input of the flow changes; 2n-1 and 2n rows both fit."""
    fam = sfnet.FAM(4, upsampling=upsampling)
    coarse, fine = torch.randn(1, 4, 3, 4), torch.randn(1, 4, h, w)
    assert fam(coarse, fine).shape == (1, 4, h, w)
    torch.nn.init.zeros_(fam.flow.weight)
    torch.testing.assert_close(fam(coarse, fine), sfnet.enlarge(coarse, (h, w)))


def test_non_local_is_a_weighted_mean_over_all_positions():
    """y_i = sum_j softmax_j(theta_i . phi_j) g_j, position by position."""
    layer, x = sfnet.NonLocal(4, 3).double().eval(), torch.randn(1, 4, 2, 3).double()
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
    right, left, none = sfnet.flow_colours(flow)[0].tolist()
    assert (right, left, none) == ([1, 0, 0], [0, 1, 1], [1, 1, 1])
    fpn = common.build_model("sfnet:fpn", 5, **SMALL).eval()
    with pytest.raises(common.UserError, match="no flow"):
        sfnet.explain(fpn, torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("option", ["context", "align", "upsampling", "decoder"])
def test_unknown_parts_are_refused(option):
    with pytest.raises(common.UserError, match=f"{option}='x': must be one of"):
        common.build_model("sfnet", 5, **SMALL, **{option: "x"})
