"""What DeepLabv3+'s paper claims about its encoder and decoder."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import deeplabv3plus
from conftest import SMALL


def atrous_slowly(x, weight, rate):
    """Eq. (1) literally: add up nine shifted copies of the map."""
    B, C, h, w = x.shape
    out = torch.zeros(B, weight.shape[0], h, w, dtype=x.dtype)
    for ky in range(3):
        for kx in range(3):
            for row in range(h):
                for column in range(w):
                    source_row = row + rate * (ky - 1)
                    source_column = column + rate * (kx - 1)
                    if 0 <= source_row < h and 0 <= source_column < w:
                        source = x[:, :, source_row, source_column]
                        out[:, :, row, column] += source @ weight[:, :, ky, kx].T
    return out


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_atrous_convolution_is_equation_1(rate):
    """atrous_convolution is Eq. (1), in value and in both gradients."""
    results = []
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    kernels = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for function in (lambda x, w: deeplabv3plus.atrous_convolution(x, w, rate=rate),
                     lambda x, w: atrous_slowly(x, w, rate)):
        x, weight = maps.clone().requires_grad_(), kernels.clone().requires_grad_()
        out = function(x, weight)
        out.square().sum().backward()
        results.append((out, x.grad, weight.grad))
    for fast, slow, name in zip(*results, ("output", "d map", "d weight")):
        torch.testing.assert_close(fast, slow, msg=lambda m: f"{name}: {m}")


def test_layers_use_the_same_convolution():
    """nn.Conv2d inside ASPP is atrous_convolution with the layer's weight."""
    aspp = common.ASPP(4, 6, rates=(2,), separable=False)
    conv = aspp.branches[1][0]  # branch 0 is the 1x1
    x = torch.randn(1, 4, 9, 9)
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
    expected = (math.ceil(65 / stride), math.ceil(97 / stride))
    assert features["res5"].shape[-2:] == expected, (
        f"stride {stride} gives another size")


def separable(i, o):
    """Parameters of a separable 3x3 from i to o channels, and of its two norms."""
    return 9 * i + 2 * i + i * o + 2 * o


def xception_unit(i, widths, *, shortcut):
    count = sum(separable(a, b) for a, b in zip((i, *widths), widths))
    return count + (i * widths[-1] + 2 * widths[-1] if shortcut else 0)


@pytest.mark.parametrize("name, entry", [
    ("xception65", [(64, 128), (128, 256), (256, 728)]),
    ("xception71", [(64, 128), (128, 256), (256, 256), (256, 728), (728, 728)])])
def test_xception_has_the_parameters_of_its_figure(name, entry):
    """Fig. 4 added up by hand: 37.9 and 40.3 million, at every output stride.

    A shortcut's 1x1 too many, or ReLU's place taken for a norm, shows here.
    """
    root = 9 * 3 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64
    units = sum(xception_unit(i, (o, o, o), shortcut=True) for i, o in entry)
    units += 16 * xception_unit(728, (728, 728, 728), shortcut=False)
    units += xception_unit(728, (728, 1024, 1024), shortcut=True)
    units += xception_unit(1024, (1536, 1536, 2048), shortcut=False)
    assert root + units == {"xception65": 37_867_312, "xception71": 40_289_736}[name]
    for output_stride in (32, 16, 8):
        with torch.device("meta"):
            encoder = common.make_encoder(name, 3, output_stride=output_stride)
        assert sum(p.numel() for p in encoder.parameters()) == root + units


def test_xception_dilates_what_follows_the_stride_that_it_gives_up():
    """N10: at 16 the last unit alone is dilated, at 8 the middle flow by 2, it by 4.

    The unit that gives up its stride itself still works on the finer grid undilated.
    """
    def dilations(output_stride):
        with torch.device("meta"):
            encoder = common.make_encoder("xception65", 3, output_stride=output_stride)
        units = encoder.entry[-1], encoder.middle[0], *encoder.exit
        return [{layer.dilation[0] for layer in unit.modules()
                 if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1}
                for unit in units]
    assert dilations(32) == [{1}, {1}, {1}, {1}]
    assert dilations(16) == [{1}, {1}, {1}, {2}]
    assert dilations(8) == [{1}, {2}, {2}, {4}]


def test_xception_reads_its_relus_where_the_code_has_them():
    """A ReLU in front of each separable convolution, in the last unit behind halves.

    So res5 has no negative number, and the low-level features, which end with a norm,
    do.
    """
    torch.manual_seed(0)
    encoder = common.make_encoder("xception65", 3).eval()
    features = encoder(torch.randn(1, 3, 64, 64))
    assert features["res5"].min() >= 0, "the last unit ends with a ReLU"
    assert features["res2"].min() < 0, "no ReLU behind the second convolution"
    unit = encoder.entry[1]
    x = torch.randn(1, 128, 16, 16)
    whole = unit.convs[2](unit.begin(x)) + unit.shortcut(x)
    assert torch.equal(unit(x), whole), "the shortcut reads x, not its ReLU"


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
        before = plain(x)["res4"]
        torch.testing.assert_close(dilated(x)["res4"], before)
        first_conv = dilated.res5[0].conv1
        assert first_conv.stride == (1, 1) and first_conv.dilation == (1, 1), (
            "the first 3x3 of a dilated stage sees the old grid, dilation 1 here")
        strided = F.conv2d(before, first_conv.weight, stride=2, padding=1)
        torch.testing.assert_close(first_conv(before)[..., ::2, ::2], strided)
        assert dilated.res5[0].conv2.dilation == (2, 2)
        assert dilated.res5[1].conv1.dilation == (2, 2)


@pytest.mark.parametrize("spec, classes, count", [
    ("deeplabv3plus:undilated", 19, 41_225_187),
    ("deeplabv3plus:dilated", 150, 41_292_390),
    ("nrd:deeplabv3plus", 19, 41_225_187)])
def test_parameters_of_the_network(spec, classes, count):
    """Exact counts of mmsegmentation's configurations, without the auxiliary head.

    NRD's Table 1 and this module must mean the same network by DeepLabv3+.
    """
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


# --- mmsegmentation's head, restated -------------------------------------------------


class Block(nn.Module):
    """Convolution, norm, ReLU, by the names that they have in its checkpoints."""

    def __init__(self, fan_in, fan_out, kernel=1, dilation=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, kernel, dilation=dilation, groups=groups,
                              padding=kernel // 2 * dilation, bias=False)
        self.bn = nn.BatchNorm2d(fan_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Separable(nn.Module):
    def __init__(self, fan_in, fan_out, dilation=1):
        super().__init__()
        self.depthwise_conv = Block(fan_in, fan_in, 3, dilation, groups=fan_in)
        self.pointwise_conv = Block(fan_in, fan_out)

    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(x))


class ASPPHead(nn.Module):
    """Five views, concatenated and projected by a 3x3; what both heads have."""

    def __init__(self, fan_in, channels, num_classes):
        super().__init__()
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1),
                                        Block(fan_in, channels))
        self.aspp_modules = nn.ModuleList(
            [Block(fan_in, channels)] + [Separable(fan_in, channels, rate)
                                         for rate in (3, 6, 9)])
        self.bottleneck = Block(5 * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def context(self, x):
        views = [F.interpolate(self.image_pool(x), x.shape[-2:], mode="bilinear")]
        views += [view(x) for view in self.aspp_modules]
        return self.bottleneck(torch.cat(views, dim=1))


class DeepLabHead(ASPPHead):
    def __init__(self, fan_in, low, channels, num_classes):
        super().__init__(fan_in, channels, num_classes)
        self.c1_bottleneck = Block(low, 48)
        self.sep_bottleneck = nn.Sequential(Separable(channels + 48, channels),
                                            Separable(channels, channels))

    def forward(self, features):
        low = self.c1_bottleneck(features["res2"])
        up = F.interpolate(self.context(features["res5"]), low.shape[-2:],
                           mode="bilinear", align_corners=False)
        return self.conv_seg(self.sep_bottleneck(torch.cat([up, low], dim=1)))


class AuxiliaryHead(nn.Module):
    def __init__(self, fan_in, num_classes):
        super().__init__()
        self.convs = nn.ModuleList([Block(fan_in, 256, 3)])
        self.conv_seg = nn.Conv2d(256, num_classes, 1)

    def forward(self, features):
        return self.conv_seg(self.convs[0](features["res4"]))


class Restated(nn.Module):
    """Both heads on given features; a backbone only as names in the state dict."""

    def __init__(self, decode_head, auxiliary_head):
        super().__init__()
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head

    def forward(self, features):
        return self.decode_head(features), self.auxiliary_head(features)


def scramble(module):
    """Random weights, affine parts and running statistics, in float64."""
    module.double()
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "bn.weight" in name or "norm.weight" in name:
                value.uniform_(0.5, 1.5)
        for name, value in module.named_buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return module


def official_backbone(encoder):
    """The encoder's tensors by mmsegmentation's names, deep stem included."""
    stages = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}
    state = {}
    for key, value in encoder.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "stem" and rest.startswith("0."):
            key = f"stem.{rest[2:]}"
        elif part == "stem":
            key = f"stem.7.{rest[2:]}"
        else:
            key = f"{stages[part]}.{rest}"
        state[f"backbone.{key}"] = value
    return state


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model.double()


def random_features(channels, h, w):
    """What an encoder without dilation gives for 32h x 32w pixels."""
    return {f"res{n}": torch.randn(2, channels[f"res{n}"], h * 2**(5 - n),
                                   w * 2**(5 - n), dtype=torch.float64).relu()
            for n in (2, 3, 4, 5)}


def heads_alone(model, features):
    context = model.context(features["res5"])
    return model.decoder(context, features), model.aux_heads[0](features["res4"])


def assert_same_function(model, restated, features, *, gradients=lambda state: state):
    """Logits in eval and in training, and there all gradients, to 1e-10.

    `gradients` corrects restated gradients where `convert` has scaled a weight.
    """
    close = dict(rtol=1e-10, atol=1e-10)
    for training in (False, True):
        model.train(training)
        restated.train(training)
        ours, official = heads_alone(model, features), restated(features)
        for a, b in zip(ours, official):
            torch.testing.assert_close(a, b, **close)
    cotangents = [torch.randn_like(a) for a in ours]
    torch.autograd.backward(ours, cotangents)
    torch.autograd.backward(official, cotangents)
    expected = gradients({name: p.grad for name, p in restated.named_parameters()})
    seen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(seen) == len(expected) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-9,
                                   msg=lambda m: f"{name}: {m}")


def named_as_ours(gradients, names):
    """Gradients of the restated heads by our names; unused layers have none."""
    return {f"{names[layer]}.{kind}": gradient for key, gradient in gradients.items()
            if gradient is not None for layer, _, kind in [key.rpartition(".")]}


def test_it_is_mmsegmentations_head_with_the_same_weights():
    """convert: a checkpoint with a deep stem gives the function that was saved."""
    torch.manual_seed(0)
    model = without_dropout(common.build_model(
        "deeplabv3plus:undilated", 5, backbone="resnet18c", channels=16))
    restated = scramble(Restated(DeepLabHead(512, 64, 16, 5), AuxiliaryHead(256, 5)))
    donor = scramble(common.Encoder("resnet18c"))
    state = restated.state_dict() | official_backbone(donor)
    model.load_state_dict(deeplabv3plus.convert({"state_dict": state}, model))
    for key, value in donor.state_dict().items():
        torch.testing.assert_close(model.encoder.state_dict()[key], value)
    names = deeplabv3plus.shared_names() | deeplabv3plus.decoder_names()
    assert_same_function(model, restated, random_features(donor.channels, 2, 3),
                         gradients=lambda state: named_as_ours(state, names))


def test_convert_takes_nothing_that_does_not_fit():
    """Another width or stem, a missing tensor: each is named. aux=False may be."""
    model = common.build_model("deeplabv3plus:undilated", 5, backbone="resnet18c",
                               channels=16)
    restated = Restated(DeepLabHead(512, 64, 16, 5), AuxiliaryHead(256, 5))
    state = restated.state_dict() | official_backbone(model.encoder)
    deeplabv3plus.convert(state, model)
    small = common.build_model("deeplabv3plus:undilated", 5, backbone="resnet18c",
                               channels=16, aux=False)
    small.load_state_dict(deeplabv3plus.convert(state, small))
    for spec, options in (("undilated", {"channels": 8}), ("default", {}),
                          ("undilated", {"backbone": "resnet18"})):
        other = common.build_model(f"deeplabv3plus:{spec}", 5, **(
            {"backbone": "resnet18c", "channels": 16} | options))
        with pytest.raises(common.UserError, match="tensors have no place in this net"):
            deeplabv3plus.convert(state, other)
    del state["decode_head.conv_seg.bias"]
    with pytest.raises(common.UserError, match="missing .decoder.classify.1.bias"):
        deeplabv3plus.convert(state, model)


def assert_drawn_by_mmsegmentation(part):
    """Every convolution with a batch norm has the deviation sqrt(2 / fan_out)."""
    for name, conv in part.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is None:
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
            ratio = conv.weight.std().item() / (2 / fan_out)**0.5
            assert ratio == pytest.approx(1, abs=4 / conv.weight.numel()**0.5), name


def test_mmsegmentations_start():
    """N7: its variants are drawn as it draws; the paper's widths by torch."""
    torch.manual_seed(0)
    model = common.build_model("deeplabv3plus:undilated", 19, backbone="resnet18")
    for part in (model.context, model.decoder, model.aux_heads):
        assert_drawn_by_mmsegmentation(part)
    for classifier in (model.decoder.classify[-1], model.aux_heads[0].layers[-1]):
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not classifier.bias.any()
    with pytest.raises(AssertionError):
        assert_drawn_by_mmsegmentation(
            common.build_model("deeplabv3plus", 19, backbone="resnet18").context)
    with pytest.raises(common.UserError, match="init='x': must be 'torch' or"):
        common.build_model("deeplabv3plus", 19, backbone="resnet18", init="x")


@pytest.mark.parametrize("stride, published", [(32, 21.77), (16, None), (8, 21.74)])
def test_the_decoder_adds_what_table_3_says(stride, published):
    """N6: 74.20 - 52.43 and 297.92 - 276.18 G multiply-adds; at 16 the paper has 20.26.
    """
    cost = {}
    for variant in ("plain", "no-decoder"):
        model, images = common.shapes_only(
            f"deeplabv3plus:{variant}", 21, (513, 513), backbone="resnet101s",
            output_stride=stride)
        cost[variant] = common.count_cost(model, images)["total"]["gmacs"]
    added = cost["plain"] - cost["no-decoder"]
    assert added == pytest.approx(published or 21.76, abs=0.011)


def side_in_tensorflow(side, rate):
    """Positions a side at which TensorFlow computes a dilated 3x3, zeros included.

    It cuts the map with its border of `rate` zeros into rate x rate maps of one size.
    """
    return rate * math.ceil((side + 2 * rate) / rate) - 2 * rate


def authors_encoder(output_stride, multi_grid):
    """Multiply-adds of the authors' ResNet-101 at 513x513, and the side of its map.

    A unit: 1x1, 3x3, 1x1. The last unit of a stage has the stride; where it gives it
    up, the units behind it are dilated instead.
    """
    total = 257**2 * 9 * (3 * 64 + 64 * 64 + 64 * 128)  # the deep stem
    side = 129
    stride = 4
    rate = 1
    channels = 128
    for width, units in ((64, 3), (128, 4), (256, 23), (512, 3)):
        for unit in range(units):
            wanted = 2 if unit == units - 1 and width < 512 else 1
            step = wanted if stride * wanted <= output_stride else 1
            dilation = rate * (multi_grid[unit] if width == 512 else 1)
            after = math.ceil(side / step)
            at_3x3 = after if step > 1 else side_in_tensorflow(side, dilation)
            total += side**2 * channels * width
            total += at_3x3**2 * 9 * width * width
            total += after**2 * width * 4 * width
            if channels != 4 * width:
                total += after**2 * channels * 4 * width  # the shortcut's 1x1
            rate *= wanted // step
            stride *= step
            side = after
            channels = 4 * width
    return total, side


def zeros_in_aspp(side, output_stride):
    """Multiply-adds of ASPP's dilated 3x3 at positions that are thrown away."""
    more = sum(side_in_tensorflow(side, rate)**2 - side**2
               for rate in deeplabv3plus.atrous_rates(output_stride))
    return more * 9 * 2048 * 256


@pytest.mark.parametrize("stride, without, with_decoder", [
    (32, 52.43, 74.20), (16, 81.02, 101.28), (8, 276.18, 297.92)])
def test_table_3_counts_the_authors_encoder_and_tensorflows_zeros(stride, without,
                                                                  with_decoder):
    """N6: strides in last units, multi-grid and padded maps explain five of six costs.
    """
    for grid in ((1, 2, 4), (1, 1, 1)):
        encoder, side = authors_encoder(stride, grid)
        aspp = 2048 * 256 + side**2 * (2048 * 256 + 5 * 256 * 256 + 3 * 9 * 2048 * 256)
        shared = encoder + aspp + zeros_in_aspp(side, stride)
        decoder = 256 * 48 + 9 * 304 * 256 + 9 * 256 * 256 + 256 * 21
        whole = (shared + 129**2 * decoder) / 1e9
        alone = (shared + side**2 * 256 * 21) / 1e9
        if grid == (1, 2, 4):
            assert alone == pytest.approx(without, rel=0.004)
            assert whole == pytest.approx(with_decoder,
                                          rel=0.013 if stride == 16 else 0.003)
        elif stride == 16:  # the one number that fits a network without multi-grid
            assert whole == pytest.approx(with_decoder, rel=0.001)
        else:
            assert alone < 0.991 * without  # multi-grid is seen at the other strides


@pytest.mark.parametrize("stride, without, with_decoder", [
    (16, 68.00, 89.76), (8, 240.85, 262.59)])
def test_table_5_counts_tensorflows_zeros_in_aspp(stride, without, with_decoder):
    """N10: what the rows without separable convolutions have more than ours."""
    for variant, published in (("no-decoder", without), ("plain", with_decoder)):
        model, images = common.shapes_only(
            f"deeplabv3plus:{variant}", 21, (513, 513), backbone="xception65",
            output_stride=stride)
        ours = common.count_cost(model, images)["total"]["gmacs"]
        zeros = zeros_in_aspp(math.ceil(513 / stride), stride) / 1e9
        assert ours < 0.97 * published
        assert ours + zeros == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize("variant, more", [
    # By hand: k * k * in * out weights, and a batch norm's two numbers per channel.
    ("one-3x3", 304 * 256 * 9 + 512), ("plain", 304 * 256 * 9 + 256 * 256 * 9 + 1024),
    ("three-3x3", 304 * 256 * 9 + 2 * 256 * 256 * 9 + 1536),
    ("half-width", 304 * 128 * 9 + 256 - 21 * 128), ("one-1x1", 304 * 256 + 512),
    ("conv2-conv3", 2 * 304 * 256 * 9 + 1024 + 512 * 48 + 96),
    ("reduce-8", 264 * 256 * 9 + 512 - 40 * 256 - 80),
    ("reduce-64", 320 * 256 * 9 + 512 + 16 * 256 + 32)])
def test_decoders_of_tables_1_and_2(variant, more):
    """Parameters that each row has beyond reducing to 48 channels and classifying."""
    model, _ = common.shapes_only(f"deeplabv3plus:{variant}", 21, (64, 64),
                                  backbone="resnet101")
    shared = 256 * 48 + 96 + 256 * 21 + 21
    assert sum(p.numel() for p in model.decoder.parameters()) == shared + more


def test_table_7_leaves_out_the_image_level():
    """ASPP without its global average: one view less, and one fifth less to project."""
    whole, less = (sum(p.numel() for p in common.shapes_only(
        f"deeplabv3plus:{variant}", 19, (64, 64))[0].context.parameters())
        for variant in ("default", "no-image-level"))
    assert whole - less == 2048 * 256 + 512 + 256 * 256


def test_recipes_say_where_each_value_stands():
    """VOC by the paper and its code; Cityscapes and ADE20K as in NRD's tables (N9)."""
    for dataset, expected in {
            "voc": {"lr": 0.007, "weight_decay": 1e-4, "iterations": 30_000,
                    "crop": (513, 513), "batch": 16, "power": 0.9, "momentum": 0.9,
                    "scale": (0.5, 2.0), "aux_weight": 0.0, "warmup": 0,
                    "backbone": "resnet101"},
            "cityscapes": {"lr": 0.01, "weight_decay": 5e-4, "iterations": 84_000,
                           "crop": (512, 1024), "batch": 16, "aux_weight": 0.4,
                           "warmup": 4000, "warmup_from": 0.01, "backbone": "resnet50"},
            "ade20k": {"lr": 0.01, "weight_decay": 5e-4, "iterations": 164_000,
                       "crop": (512, 512), "base_size": (2048, 512),
                       "backbone": "resnet101"}}.items():
        recipe = deeplabv3plus.RECIPES[dataset]
        assert {name: recipe[name][0] for name in expected} == expected
        assert all(source for _, source in recipe.values())
    sources = {source for _, source in deeplabv3plus.RECIPES["voc"].values()}
    assert sources == {"official code, train.py", "paper, Sec. 4", "paper, Table 3"}


# --- The picture ---------------------------------------------------------------------


def plotted(figure, title):
    """The arrays of all pictures with this title, from the figure itself."""
    return [torch.as_tensor(axis.images[0].get_array().filled(math.nan))
            for axis in figure.axes if axis.get_title(loc="left") == title]


@pytest.mark.parametrize("variant, size", [("default", (64, 96)), ("default", (65, 97)),
                                           ("conv2-conv3", (64, 64))])
def test_the_picture_shows_the_models_own_tensors(variant, size):
    """Context, low-level channels and labels are what the decoder's forward makes."""
    model = common.build_model(f"deeplabv3plus:{variant}", 5, **SMALL).eval()
    image = torch.randn(1, 3, *size)
    figure = deeplabv3plus.explain(model, image)
    with torch.no_grad():
        features = model.encoder(image)
        low = model.decoder.reduce(features["res2"])
        labels = model(image)["out"][0].argmax(0)
    (shown,) = plotted(figure, f"{low.shape[1]} low-level channels")
    assert torch.allclose(shown, low[0].square().mean(0).sqrt())
    (shown,) = plotted(figure, "Labels")
    assert torch.equal(shown, common.label_colours(None, 5)[labels])
    if variant == "default":
        context = model.context(features["res5"]).detach()
        up = common.upsample(context, 4, low.shape[-2:])
        (shown,) = plotted(figure, "Context, enlarged")
        assert torch.allclose(shown, up[0].square().mean(0).sqrt())


def test_without_edges_means_the_mean_of_every_low_level_channel():
    """And nothing else changes: the context is the same, no hook stays behind."""
    model = common.build_model("deeplabv3plus", 5, **SMALL).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(image)["out"]
        up, low, _, logits = deeplabv3plus.steps_of_decoder(model, image)
        assert torch.equal(model.to_pixels(logits, (64, 96)), before)
        same, flat, _, logits = deeplabv3plus.steps_of_decoder(model, image, flat=True)
        assert torch.equal(same, up)
        assert torch.allclose(flat, low.mean((2, 3), keepdim=True).expand_as(low))
        literal = model.decoder.classify(
            model.decoder.refine(torch.cat([up, flat], dim=1)))
        assert torch.equal(literal, logits)
        assert torch.equal(model(image)["out"], before)


def test_changed_pixels_are_counted_by_their_distance():
    labels = torch.zeros(40, 200, dtype=torch.long)
    labels[:, 100:] = 1
    without = labels.clone()
    without[:, 100:102] = 0  # at the boundary and next to it, on one side
    shares = deeplabv3plus.changed_by_distance(labels, without)
    assert shares == [0.5, 0.5, 0, 0, 0, 0, 0]
    assert deeplabv3plus.changed_by_distance(labels, 1 - labels) == [1] * 7
    alike = torch.zeros_like(labels)
    assert deeplabv3plus.changed_by_distance(alike, alike) == [0] * 7


@pytest.mark.thorough
def test_the_demo_saves_its_picture(thin, tmp_path, capsys):
    deeplabv3plus.demo(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "untrained" in capsys.readouterr().out
