"""What DeepLabv3+'s paper claims about its encoder and decoder."""
import pytest
import torch

import common
import deeplabv3plus
from conftest import SMALL


def atrous_slowly(x, weight, rate):
    """Eq. (1) literally: add up nine shifted copies of the map."""
    B, C, h, w = x.shape
    out = torch.zeros(B, weight.shape[0], h, w, dtype=x.dtype)
    for ky in range(3):
        for kx in range(3):
            for y in range(h):
                for z in range(w):
                    sy, sx = y + rate * (ky - 1), z + rate * (kx - 1)
                    if 0 <= sy < h and 0 <= sx < w:
                        out[:, :, y, z] += x[:, :, sy, sx] @ weight[:, :, ky, kx].T
    return out


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_atrous_convolution_is_equation_1(rate):
    results = []
    x0 = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    w0 = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for function in (lambda x, w: deeplabv3plus.atrous_convolution(x, w, rate=rate),
                     lambda x, w: atrous_slowly(x, w, rate)):
        x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
        out = function(x, w)
        out.square().sum().backward()
        results.append((out, x.grad, w.grad))
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow)


def test_layers_use_the_same_convolution():
    """nn.Conv2d inside ASPP is atrous_convolution with the layer's weight."""
    aspp = common.ASPP(4, 6, rates=(2,), separable=False)
    conv, x = aspp.branches[1][0], torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(
        conv(x), deeplabv3plus.atrous_convolution(x, conv.weight, rate=2))


def test_rates_follow_the_output_stride():
    """N2: 6, 12, 18 at stride 16, doubled at 8; 3, 6, 9 without dilation."""
    assert [deeplabv3plus.atrous_rates(s) for s in (32, 16, 8)] == [
        (3, 6, 9), (6, 12, 18), (12, 24, 36)]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_dilation_keeps_resolution_and_parameters(backbone, stride):
    """A dilated encoder has the weights of the plain one and a finer last map."""
    encoder = common.Encoder(backbone, output_stride=stride).eval()
    plain = common.Encoder(backbone)
    assert [p.shape for p in encoder.parameters()] == [
        p.shape for p in plain.parameters()]
    features = encoder(torch.randn(1, 3, 65, 97))
    expected = (-(-65 // stride), -(-97 // stride))
    assert features["res5"].shape[-2:] == expected, (
        f"stride {stride} gives another size")


def test_dilated_stage_still_sees_the_same_pixels():
    """Dilation replaces stride, with the same weights.

    The first 3x3 of a dilated stage still works on the old grid, so its dilation is 1:
    read at every second position it gives what the strided one gives. From the second
    convolution on neighbours are two positions apart.
    """
    torch.manual_seed(0)
    plain = common.Encoder("resnet18").eval()
    dilated = common.Encoder("resnet18", output_stride=16).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        a, b = plain(x)["res4"], dilated(x)["res4"]
        torch.testing.assert_close(a, b)
        first_conv = dilated.res5[0].conv1
        assert first_conv.stride == (1, 1) and first_conv.dilation == (1, 1), (
            "the first 3x3 of a dilated stage sees the old grid, dilation 1 here")
        thin = torch.nn.functional.conv2d(a, first_conv.weight, stride=2, padding=1)
        torch.testing.assert_close(first_conv(b)[..., ::2, ::2], thin)
        assert dilated.res5[0].conv2.dilation == (2, 2)
        assert dilated.res5[1].conv1.dilation == (2, 2)


@pytest.mark.parametrize("spec, classes, count", [
    ("deeplabv3plus:undilated", 19, 41_225_187),
    ("deeplabv3plus:dilated", 150, 41_292_390),
    ("nrd:deeplabv3plus", 19, 41_225_187)])
def test_parameters_of_the_network(spec, classes, count):
    """Exact counts of mmsegmentation's configurations, without the auxiliary head."""
    with torch.device("meta"):
        model = common.build_model(spec, classes, backbone="resnet50c", aux=False)
    assert sum(p.numel() for p in model.parameters()) == count


def test_decoder_reads_low_level_features_at_a_quarter():
    """The decoder's output lives on res2's grid, also at sizes 4 does not divide."""
    for stride in (8, 16, 32):
        model = common.build_model("deeplabv3plus", 5, **SMALL,
                                   output_stride=stride).eval()
        features = model.encoder(torch.randn(1, 3, 65, 97))
        logits = model.decoder(model.context(features["res5"]), features)
        assert logits.shape == (1, 5, 17, 25)
