"""What NRD's paper claims about its decoder, each claim as a test."""
import pytest
import torch
import torch.nn.functional as F

import common
import nrd
from conftest import SMALL


def represent_slowly(theta, inputs, widths):
    """The literal reading of Sec. 2.2: for every cell, for every point, run g_theta."""
    B, P, h, w = theta.shape
    s = inputs.shape[-1] // w
    out = torch.empty(B, widths[-1], s * h, s * w, dtype=theta.dtype)
    for b in range(B):
        for row in range(h):
            for column in range(w):
                mine, layers, at = theta[b, :, row, column], [], 0
                for i, o in zip(widths, widths[1:]):
                    weight = mine[at:at + i * o].view(o, i)
                    bias = mine[at + i * o:at + i * o + o]
                    layers.append((weight, bias))
                    at += i * o + o
                assert at == P
                for y in range(row * s, row * s + s):
                    for x in range(column * s, column * s + s):
                        v = inputs[b, :, y, x]
                        for depth, (weight, bias) in enumerate(layers):
                            v = weight @ v + bias
                            v = v.relu() if depth < len(layers) - 1 else v
                        out[b, :, y, x] = v
    return out


def test_batched_g_equals_the_loop_over_cells_and_pixels():
    """represent() is Sec. 2.2 read literally, in value and in both gradients."""
    widths, (B, h, w, s) = (5, 4, 4, 3), (2, 2, 3, 4)
    theta = torch.randn(B, nrd.theta_length(widths), h, w, dtype=torch.float64)
    inputs = torch.randn(B, 5, s * h, s * w, dtype=torch.float64)
    weight, results = torch.randn(B, 3, s * h, s * w, dtype=torch.float64), []
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
    """Sec. 2.2: 899 parameters with guidance map; Sec. 3.1: 643 without, 19 classes."""
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
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(nrd.from_cells(nrd.to_cells(x, 4), 2, 2, 3), x)


def small_decoder(**options):
    defaults = dict(controller_channels=8, hidden_channels=4, guidance_channels=3,
                    guidance=True, coordinates=True, patch=8, init="mlp")
    return nrd.NRDDecoder(6, 5, 3, **(defaults | options)).eval()


def test_a_location_draws_its_own_patch_and_no_other():
    """Changing theta at one location changes its s x s block of the output only."""
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
    q, r, h, w = -(-H // 4), -(-W // 4), -(-H // 32), -(-W // 32)
    res2 = torch.randn(1, 5, q, r)
    m = decoder.guidance(res2)
    fitted = decoder.fit(m, h, w)
    assert fitted.shape[-2:] == (8 * h, 8 * w)
    torch.testing.assert_close(fitted[..., :q, :r], m,
                               msg="guidance slid under the cells")


@pytest.mark.parametrize("patch", [1, 4, 8, 16, 32])
def test_any_number_of_points_per_cell(patch):
    """s changes the resolution that g is asked at, not the size of the result."""
    model = common.build_model("nrd", 5, **SMALL, patch=patch).eval()
    assert model(torch.randn(1, 3, 65, 97))["out"].shape == (1, 5, 65, 97)


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
    """N2: with "mlp" a step of the 1x1's weights and bias moves theta about as if SGD
    worked on theta itself. Without the scale it goes hundreds of times as far.
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
    """CARAFE, read literally: out(y, x) = sum_k softmax(weights)_k * feature_k."""
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
