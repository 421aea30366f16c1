"""What EfficientFCN's paper claims about codewords and their assembly, as tests."""
import pytest
import torch
import torch.nn.functional as F

import common
import efficientfcn
from conftest import SMALL


def compare_with_gradients(fast, slow, *inputs):
    """Equal values, and equal gradients with respect to every input, in float64."""
    results = []
    for function in (fast, slow):
        own = [x.clone().requires_grad_() for x in inputs]
        out = function(*own)
        torch.manual_seed(1)
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
        results.append([out] + [x.grad for x in own])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def softmax_slowly(maps):
    """Eq. (1) literally: for codeword i, divide by the sum over places (p, q)."""
    B, n, h, w = maps.shape
    rows = []
    for b in range(B):
        for i in range(n):
            total = sum(maps[b, i, p, q].exp() for p in range(h) for q in range(w))
            rows.append(maps[b, i].exp() / total)
    return torch.stack(rows).reshape(B, n, h, w)


def codebook_slowly(weighting, base):
    """Eq. (2) literally: c_i adds up the base vectors of all places."""
    B, n, h, w = weighting.shape
    words = [sum(weighting[b, i, p, q] * base[b, :, p, q]
                 for p in range(h) for q in range(w)) for b in range(B)
             for i in range(n)]
    return torch.stack(words).reshape(B, n, -1).transpose(1, 2)


def assemble_slowly(weights, codewords):
    """Eq. (3) literally: at place (x, y), sum_i W_i(x, y) c_i."""
    B, n, q, r = weights.shape
    places = [sum(weights[b, i, y, x] * codewords[b, :, i] for i in range(n))
              for b in range(B) for y in range(q) for x in range(r)]
    return torch.stack(places).reshape(B, q, r, -1).permute(0, 3, 1, 2)


def test_equations_1_to_3_equal_their_loops():
    """Softmax over places, weighted sums, mixtures: values and gradients."""
    maps = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    base = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    weights = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    words = torch.randn(2, 5, 3, dtype=torch.float64)
    compare_with_gradients(efficientfcn.spatial_softmax, softmax_slowly, maps)
    compare_with_gradients(efficientfcn.codebook, codebook_slowly, maps, base)
    compare_with_gradients(efficientfcn.assemble, assemble_slowly, weights, words)


def test_every_codeword_distributes_one_over_the_places():
    """Eq. (1) normalises over space. Over the codewords it would be another method."""
    maps = efficientfcn.spatial_softmax(torch.randn(2, 6, 3, 4))
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 6))
    assert (maps.sum(1) - 1).abs().max() > 0.1, "normalised over codewords"


def test_codewords_have_no_spatial_order():
    """Sec. 3.2: shuffling the places of A and B together leaves the codebook alone.

    Shuffling one of the two changes it: the codebook does look at the places.
    """
    maps = torch.rand(1, 4, 3, 5)
    base = torch.randn(1, 6, 3, 5)
    order = torch.randperm(15)
    shuffle = lambda x: x.flatten(2)[..., order].reshape(x.shape)
    words = efficientfcn.codebook(maps, base)
    torch.testing.assert_close(efficientfcn.codebook(shuffle(maps), shuffle(base)),
                               words)
    assert not torch.allclose(efficientfcn.codebook(maps, shuffle(base)), words)


def test_assembly_is_linear_in_the_codebook():
    """Eq. (3): what two codebooks give together is the sum of what each one gives."""
    weights = torch.rand(1, 4, 3, 5)
    one, two = torch.randn(2, 1, 6, 4)
    torch.testing.assert_close(
        efficientfcn.assemble(weights, 2 * one + two),
        2 * efficientfcn.assemble(weights, one) + efficientfcn.assemble(weights, two))


@pytest.mark.parametrize("n, independent", [(3, 3), (8, 8), (20, 8)])
def test_no_more_codewords_count_than_the_coarse_map_has_places(n, independent):
    """Eqs. (1) to (3): of n codewords from 2x4 places at most 8 are independent.

    The features assembled from them obey the same limit, on however fine a map.
    """
    maps = efficientfcn.spatial_softmax(torch.randn(1, n, 2, 4).double())
    codewords = efficientfcn.codebook(maps, torch.randn(1, 30, 2, 4).double())
    assembled = efficientfcn.assemble(torch.randn(1, n, 16, 32).double(), codewords)
    assert torch.linalg.matrix_rank(codewords) == independent
    assert torch.linalg.matrix_rank(assembled.flatten(2)) == independent


# --- The decoder ---------------------------------------------------------------------

STAGES = {"res3": 6, "res4": 8, "res5": 10}


def small_decoder(**options):
    """A decoder whose batch norms are not the identity, and the maps of an image."""
    defaults = dict(channels=4, codewords=7, codeword_channels=8, transfer=True,
                    codebook_scales=efficientfcn.SCALES, compress_e8=True,
                    guidance_scales=efficientfcn.SCALES, double=False,
                    weighting_hidden=0, conv_up=False)
    decoder = efficientfcn.HolisticallyGuidedDecoder(STAGES, 3, **(defaults | options))
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.bias, 0.1, 1)
    sizes = {"res3": (9, 13), "res4": (5, 7), "res5": (3, 4)}  # of a 65x97 image
    features = {s: torch.randn(2, STAGES[s], *sizes[s]) for s in STAGES}
    return decoder.eval(), features


def run_steps(decoder, features):
    """All tensors of Sec. 3.2 by name, for maps instead of an image."""
    with torch.no_grad():
        return decoder.steps(features["res5"], features)


def test_average_codeword_reaches_the_weights_and_stays_out_of_f8():
    """G-bar = G + mean of B over space predicts W; G itself stands in f^8 (N6).

    f^8 is what enters the layer between assembly and classifier.
    """
    decoder, features = small_decoder()
    seen = []
    decoder.conv_up.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        decoder(features["res5"], features)
        step = run_steps(decoder, features)
        mean = torch.stack([b.flatten(1).mean(1) for b in step["base"]])
        guided = step["guidance"] + mean[:, :, None, None]
        torch.testing.assert_close(decoder.assembly(guided), step["weights"],
                                   msg="W is not predicted from G + mean over space")
    torch.testing.assert_close(seen[0][:, :8], step["assembled"])
    torch.testing.assert_close(seen[0][:, 8:], step["guidance"],
                               msg="f^8 must end in G, not in G-bar")


@pytest.mark.parametrize("transfer", [True, False])
def test_without_transfer_weights_know_nothing_of_the_codewords(transfer):
    """Sec. 4.2: another base map changes W with the transfer and not without."""
    decoder, features = small_decoder(transfer=transfer)
    before = run_steps(decoder, features)
    torch.nn.init.constant_(decoder.base[1].bias, 3.0)
    after = run_steps(decoder, features)
    assert not torch.equal(before["base"], after["base"])
    assert torch.equal(before["weights"], after["weights"]) != transfer
    assert torch.equal(before["guidance"], after["guidance"])


def test_assembled_features_are_scaled_by_the_root_of_n():
    """N5: f~8 is Eq. (3) times n^-0.5; n counts codewords, not channels."""
    decoder, features = small_decoder(codewords=9)
    step = run_steps(decoder, features)
    torch.testing.assert_close(
        3 * step["assembled"],
        efficientfcn.assemble(step["weights"], step["codewords"]))


@pytest.mark.parametrize("double", [True, False])
def test_weights_are_never_negative_and_maps_end_without_relu(double):
    """N4: codewords can only be added. A ReLU before Eq. (1) would level all places
    that matter less than average."""
    decoder, features = small_decoder(double=double)
    assert run_steps(decoder, features)["weights"].min() >= 0
    assert isinstance(decoder.weighting[-1], torch.nn.BatchNorm2d)


def test_a_constant_on_a_weighting_map_is_cancelled():
    """N8: the bias of A's last batch norm has no say in the codewords."""
    decoder, features = small_decoder()
    before = run_steps(decoder, features)["codewords"]
    torch.nn.init.constant_(decoder.weighting[-1].bias, 5.0)
    torch.testing.assert_close(run_steps(decoder, features)["codewords"], before)


@pytest.mark.parametrize("variant, codebook, guidance", [
    ("default", 48, 48), ("codebook-32", 16, 48), ("codebook-16-32", 32, 48),
    ("guidance-8", 48, 16), ("guidance-8-16", 48, 32),
    ("official", 128 + 32, 128 + 32)])
def test_scales_of_the_ablations(variant, codebook, guidance):
    """Tables 2 and 3: m32 and m8 hold the scales that are named, 16 channels of each.

    In `official` the res3 of ResNet-18 enters as it is, with 128 channels (N3).
    """
    decoder = common.build_model(f"efficientfcn:{variant}", 3, **SMALL).decoder
    assert decoder.base[0].in_channels == codebook, "codebook scales go into m32"
    assert decoder.weighting[0].in_channels == codebook
    assert decoder.guidance[0].in_channels == guidance, "guidance scales go into m8"


def test_each_branch_reads_its_own_scales():
    """Tables 2 and 3: which stage has a say in what.

    With the codebook from {32}, res3 does not reach the codewords. With the guidance
    from {8}, res5 does not reach G, but it reaches W through the mean of the base map.
    """
    decoder, features = small_decoder(codebook_scales=("res5",),
                                      guidance_scales=("res3",))
    before = run_steps(decoder, features)
    other_res3 = run_steps(decoder, features | {"res3": -features["res3"]})
    other_res5 = run_steps(decoder, features | {"res5": -features["res5"]})
    assert torch.equal(before["codewords"], other_res3["codewords"])
    assert not torch.equal(before["guidance"], other_res3["guidance"])
    assert torch.equal(before["guidance"], other_res5["guidance"])
    assert not torch.equal(before["codewords"], other_res5["codewords"])
    assert not torch.equal(before["weights"], other_res5["weights"]), (
        "the mean codeword base must still arrive")


@pytest.mark.parametrize("H", [64, 65, 95, 97])
def test_fused_maps_keep_their_positions(H):
    """N7: position i of a 1/32 map is pixel 32 i, at every image size.

    The likely mistake is to squeeze a map into the other's size: at 64 pixels its last
    row then is 24 pixels off.
    """
    maps = {stage: torch.arange(0.0, H, s)[:, None].expand(1, 1, -1, 4 * 32 // s)
            for stage, s in efficientfcn.STRIDES.items()}  # each position's own pixel
    last = maps["res5"][0, 0, -1, 0]
    fine = efficientfcn.fuse(maps, 8, maps["res3"].shape[-2:])
    for plane in fine[0]:
        torch.testing.assert_close(plane, maps["res3"][0, 0].clamp(max=plane.max()))
        assert plane.max() >= last, "squeezed"
    coarse = efficientfcn.fuse(maps, 32, maps["res5"].shape[-2:])
    assert all(torch.equal(plane, maps["res5"][0, 0]) for plane in coarse[0])


def test_fused_maps_hold_e8_e16_e32_in_this_order():
    """m8 = [e8; e16 up; e32 up], m32 = [e8 down; e16 down; e32]: own size untouched.

    Corners lie on corners (N7), which at 65x97 is where they are in the image.
    """
    decoder, features = small_decoder()
    step = run_steps(decoder, features)
    with torch.no_grad():
        e8, e16, e32 = (decoder.compress[s](features[s]) for s in STAGES)
    torch.testing.assert_close(step["m8"][:, :4], e8)
    torch.testing.assert_close(step["m32"][:, 8:], e32)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(step["m8"][:, 8:, y, x], e32[:, :, y, x])
        torch.testing.assert_close(step["m32"][:, 4:8, y, x], e16[:, :, y, x])


def test_codewords_are_computed_in_full_precision():
    """Sums over hundreds of places and codewords stay float32 under autocast."""
    decoder, features = small_decoder()
    with torch.autocast("cpu", torch.bfloat16):
        step = run_steps(decoder, features)
        logits, _ = decoder(features["res5"], features)
    assert step["weights"].dtype == logits.dtype == torch.bfloat16
    for name in ("maps", "codewords", "assembled"):
        assert step[name].dtype == torch.float32, f"{name} lost precision"


@pytest.mark.parametrize("options, sentence", [
    ({"codebook_scales": ("res2",)}, "codebook_scales"),
    ({"guidance_scales": "res3"}, "guidance_scales"),
    ({"decoder": "unet"}, "must be one of hgd, fcn"),
    ({"grid": "corner"}, "must be one of exact, corners"),
    ({"output_stride": 8}, "only decoder='fcn' is dilated")])
def test_wrong_options_are_named(options, sentence):
    """The message has the option's name or the values that it may have."""
    with pytest.raises(common.UserError, match=sentence):
        common.build_model("efficientfcn", 3, **SMALL, **options)


# --- The official code ---------------------------------------------------------------


def unit(in_channels, out_channels):
    """1x1, batch norm, ReLU: what the code's decoder is made of (N4)."""
    return [torch.nn.Conv2d(in_channels, out_channels, 1, bias=False),
            torch.nn.BatchNorm2d(out_channels), torch.nn.ReLU()]


class OfficialDecoder(torch.nn.Module):
    """The code's decoder, with the code's names, as its structure is known (N2 to N9).

    The codebook and the assembly are written with einsum, in letters: b image, d number
    of a codeword, i codeword, y x place at 1/8, p q place at 1/32.
    """

    def __init__(self, codewords, classes, widths=(512, 1024, 2048)):
        super().__init__()
        n = codewords
        fused = widths[0] + 2 * 512  # res3 enters as it is (N3)
        module = torch.nn.Module()
        module.conv_cat = torch.nn.Sequential(*unit(fused, 1024))
        module.conv_center = torch.nn.Sequential(*unit(fused, n), *unit(n, n)[:2])
        module.conv_affinity0 = torch.nn.Sequential(*unit(fused, 1024))
        module.conv_affinity1 = torch.nn.Sequential(*unit(1024, n), *unit(n, n))
        module.conv_up = torch.nn.Sequential(*unit(2048, 1024))
        self.hgdmodule0 = module
        self.conv50 = torch.nn.Sequential(*unit(widths[2], 512))
        self.conv40 = torch.nn.Sequential(*unit(widths[1], 512))
        self.conv_pred3 = torch.nn.Sequential(torch.nn.Dropout2d(0.1),
                                              torch.nn.Conv2d(1024, classes, 1))

    def forward(self, res3, res4, res5):
        e32, e16 = self.conv50(res5), self.conv40(res4)
        resize = lambda x, like: F.interpolate(x, like.shape[2:], mode="bilinear",
                                               align_corners=True)
        m32 = torch.cat([resize(res3, e32), resize(e16, e32), e32], dim=1)
        m8 = torch.cat([res3, resize(e16, res3), resize(e32, res3)], dim=1)
        part = self.hgdmodule0
        base = part.conv_cat(m32)
        scores = part.conv_center(m32).exp()
        share = scores / scores.sum((2, 3), keepdim=True)
        words = torch.einsum("bipq,bdpq->bdi", share, base)
        guidance = part.conv_affinity0(m8)
        weights = part.conv_affinity1(guidance + base.mean((2, 3), keepdim=True))
        mixed = torch.einsum("bdi,biyx->bdyx", words, weights) / weights.shape[1]**0.5
        return self.conv_pred3(part.conv_up(torch.cat([mixed, guidance], dim=1)))


def official_stages(state, image, blocks):
    """The code's ResNet in eval mode, from a state dict with the code's names.

    Stem of three 3x3; bottlenecks; shortcuts that average before their 1x1 (N11).
    """
    def conv(x, name, stride=1):
        weight = state[f"pretrained.{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        weight, bias, mean, var = (state[f"pretrained.{name}.{key}"] for key in (
            "weight", "bias", "running_mean", "running_var"))
        column = lambda v: v[:, None, None]
        return (x - column(mean)) / column(var + 1e-5).sqrt() * column(weight) + (
            column(bias))

    x = norm(conv(image, "conv1.0", 2), "conv1.1").relu()
    x = norm(conv(x, "conv1.3"), "conv1.4").relu()
    x = norm(conv(x, "conv1.6"), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for layer, count in enumerate(blocks, start=1):
        for block in range(count):
            at = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = norm(conv(x, f"{at}.conv1"), f"{at}.bn1").relu()
            y = norm(conv(y, f"{at}.conv2", stride), f"{at}.bn2").relu()
            y = norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
            if block == 0:
                x = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
                x = norm(conv(x, f"{at}.downsample.1"), f"{at}.downsample.2")
            x = (x + y).relu()
        maps.append(x)
    return maps


def official_encoder_state(blocks=(3, 4, 6, 3)):
    """Random tensors under the code's names, in the shapes of its deep-stem ResNet."""
    state = {}

    def conv(name, out_channels, in_channels, kernel):
        fan = in_channels * kernel**2
        state[f"pretrained.{name}.weight"] = torch.randn(
            out_channels, in_channels, kernel, kernel, dtype=torch.float64) / fan**0.5

    def norm(name, channels):
        for key in ("weight", "bias", "running_mean", "running_var"):
            state[f"pretrained.{name}.{key}"] = torch.rand(
                channels, dtype=torch.float64) + 0.5 * key.endswith(("weight", "var"))

    for i, (a, b) in enumerate(((3, 32), (32, 32), (32, 64))):
        conv(f"conv1.{3 * i}", b, a, 3)
        norm("bn1" if i == 2 else f"conv1.{3 * i + 1}", b)
    before = 64
    for layer, count in enumerate(blocks, start=1):
        width = 32 * 2**layer
        for block in range(count):
            at = f"layer{layer}.{block}"
            shapes = ((width, before, 1), (width, width, 3), (4 * width, width, 1))
            for i, shape in enumerate(shapes, start=1):
                conv(f"{at}.conv{i}", *shape)
                norm(f"{at}.bn{i}", shape[0])
            if block == 0:
                conv(f"{at}.downsample.1", 4 * width, before, 1)
                norm(f"{at}.downsample.2", 4 * width)
            before = 4 * width
    state["pretrained.fc.weight"] = torch.zeros(1000, before)
    state["pretrained.fc.bias"] = torch.zeros(1000)
    return state


@pytest.fixture
def in_float64(monkeypatch):
    """Call it, and steps to float32 stay in float64, so that 1e-10 can be asked."""
    return lambda: monkeypatch.setattr(torch.Tensor, "float", lambda x: x)


def official_decoder(widths):
    """The code's decoder in float64, whose batch norms are not the identity."""
    torch.manual_seed(3)
    head = OfficialDecoder(11, 5, widths).double()
    for layer in head.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                torch.nn.init.uniform_(tensor, -1, 1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    return head


@pytest.fixture(scope="module")
def official():
    """The code's tensors as they are saved, its decoder, and our model of the two."""
    head = official_decoder((512, 1024, 2048))
    state = official_encoder_state()
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    saved = {f"module.model.{name}": value for name, value in state.items()}
    model = common.build_model("efficientfcn:official", 5, backbone="resnet50c",
                               codewords=11, pooled_shortcuts=True).double()
    model.load_state_dict(efficientfcn.convert(saved, model))
    return state, head, model.eval()


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_official_network_is_the_code_with_its_weights(size, official, in_float64):
    """Stage by stage, and the pixels' logits, in eval mode; 64 is not 32 k + 1 (N7)."""
    state, head, model = official
    in_float64()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        maps = official_stages(state, image, (3, 4, 6, 3))
        ours = model.encoder(image)
        for stage, theirs in zip(("res2", "res3", "res4", "res5"), maps):
            torch.testing.assert_close(ours[stage], theirs, rtol=1e-10, atol=1e-10)
        logits = head.eval()(*maps[1:])
        torch.testing.assert_close(model.decode(image)[0], logits, rtol=1e-10,
                                   atol=1e-10)
        if size[0] % 8 == 0:  # the code squeezes the rest; it never meets a rest
            pixels = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            torch.testing.assert_close(model(image)["out"], pixels, rtol=1e-10,
                                       atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_official_decoder_has_the_codes_gradients(training, in_float64):
    """Outputs, gradients of every weight and input, and running statistics."""
    widths = (128, 256, 512)
    head = official_decoder(widths)
    decoder = common.build_model("efficientfcn:official", 5, backbone="resnet18",
                                 codewords=11).decoder.double()
    ours_of = lambda name: efficientfcn.own_name(f"head.{name}").removeprefix(
        "decoder.")
    decoder.load_state_dict({ours_of(name): x for name, x in head.state_dict().items()})
    in_float64()
    head.conv_pred3[0].p = decoder.classify[0].p = 0.0  # the one source of chance
    results = []
    for module in (head, decoder):
        module.train(training)
        torch.manual_seed(1)
        maps = [torch.randn(2, c, k * 4, k * 3, dtype=torch.float64, requires_grad=True)
                for c, k in zip(widths, (4, 2, 1))]
        if module is head:
            logits = module(*maps)
        else:
            logits, _ = module(maps[2], dict(zip(("res3", "res4", "res5"), maps)))
        (logits * torch.randn_like(logits)).sum().backward()
        results.append([logits.detach(), *(x.grad for x in maps)])
    for ours, theirs in zip(*reversed(results)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    named = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    for name, theirs in (*head.named_parameters(), *head.named_buffers()):
        ours = named[ours_of(name)]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10,
                                       msg=f"gradient of {name}")


def test_the_two_grids_differ_where_the_note_says():
    """N7: equal at 32 k + 1 pixels, different at 64; `default` keeps the exact grid."""
    for size, equal in (((65, 97), True), ((64, 96), False)):
        outputs = []
        for grid in ("exact", "corners"):
            torch.manual_seed(0)
            model = common.build_model("efficientfcn", 3, **SMALL, grid=grid).eval()
            with torch.no_grad():
                outputs.append(model(torch.ones(1, 3, *size).cumsum(3))["out"])
        assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5) == equal, size
    assert common.build_model("efficientfcn", 3, **SMALL).decoder.grid == "exact"


def test_corners_are_laid_on_corners():
    """A ramp of 16 rows on 64: row i at 63/15 i, the last row on the last."""
    ramp = torch.arange(16.0).reshape(1, 1, 16, 1).expand(-1, -1, -1, 16)
    fine = efficientfcn.to_corners(ramp, (64, 64))[0, 0, :, 0]
    torch.testing.assert_close(fine, torch.arange(64) * 15 / 63)
    exact = efficientfcn.to_grid(ramp, 4, (64, 64))[0, 0, :, 0]
    torch.testing.assert_close(exact, (torch.arange(64) / 4).clamp(max=15))


def test_convert_refuses_what_does_not_fit(official):
    """Another grid or shortcut, other shapes, and names that no part has."""
    state, _, model = official
    plain = common.build_model("efficientfcn:official", 5, backbone="resnet50c",
                               codewords=11)
    with pytest.raises(common.UserError, match="pooled_shortcuts=True"):
        efficientfcn.convert(state, plain)
    with pytest.raises(common.UserError, match="1 tensors have no place .*odd.weight"):
        efficientfcn.convert(state | {"odd.weight": torch.zeros(1)}, model)
    with pytest.raises(common.UserError, match="conv_pred3.1.weight"):
        efficientfcn.convert(
            state | {"head.conv_pred3.1.weight": torch.zeros(6, 1024, 1, 1)}, model)
    fewer = {name: x for name, x in state.items() if name != "pretrained.bn1.bias"}
    with pytest.raises(common.UserError, match="no encoder.stem.1.bias"):
        efficientfcn.convert(fewer, model)
    with pytest.raises(common.UserError, match="only a ResNet"):
        common.build_model("efficientfcn", 3, backbone="shufflenet_v2_x1_5",
                           pooled_shortcuts=True)


# --- Recipes -------------------------------------------------------------------------


@pytest.mark.parametrize("dataset, lr, epochs, crop", [
    ("context60", 0.001, 120, 512), ("context59", 0.001, 120, 512),
    ("voc", 0.002, 80, 512), ("ade20k", 0.002, 120, 576)])
def test_recipes_are_those_of_the_paper(dataset, lr, epochs, crop):
    """What the paper states is in the recipe, and its source says so (N12).

    What the paper does not state, the batch and the decoder's rate, is the code's.
    """
    stated = {"lr": lr, "epochs": epochs, "crop": (crop, crop), "power": 0.9,
              "momentum": 0.9, "weight_decay": 1e-4, "scale": (0.5, 2.0),
              "photometric": False, "weights": "imagenet", "backbone": "resnet101"}
    recipe = efficientfcn.RECIPES[dataset]
    for name, value in stated.items():
        assert recipe[name][0] == value, name
        section = "4.2" if name == "backbone" else "4.1"
        assert recipe[name][1].startswith(f"paper, Sec. {section}"), name
    code = {"batch": 32 if dataset == "ade20k" else 16, "head_lr": 10.0,
            "base_size": (0, 0)}
    for name, value in code.items():
        assert recipe[name][0] == value, name
        assert recipe[name][1].startswith("official code"), name


def test_coco_has_the_schedule_of_voc_and_says_that_it_is_not_stated():
    """Table 6 has a row with COCO, the text no word on how it was trained (N12)."""
    coco, voc = (efficientfcn.RECIPES[name] for name in ("coco-voc", "voc"))
    for name in ("lr", "epochs"):
        assert coco[name][0] == voc[name][0]
        assert coco[name][1].startswith("not stated"), name
    assert {name for name in voc if coco[name] != voc[name]} == {"lr", "epochs"}


# --- Costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant, count", [
    ("default", 48_286_620), ("official", 50_193_308), ("published-cost", 53_736_348),
    ("fcn32s", 51_988_380), ("unet-bilinear", 58_639_380), ("unet-deconv", 60_736_532)])
def test_parameters_of_the_network(variant, count):
    """60 classes on ResNet-101 (32, 32, 64), the U-Nets with their two heads.

    With the 2.049 M of the unused ImageNet classifier the last four are Table 1's
    55.8, 54.0, 60.7 and 62.8.
    """
    with torch.device("meta"):
        model = common.build_model(f"efficientfcn:{variant}", 60, backbone="resnet101c")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("codewords, classes, count",
                         [(256, 59, 7_672_891), (600, 150, 9_238_486)])
def test_official_decoder_has_the_released_size(codewords, classes, count):
    """Parameters of the released decoder for PASCAL Context and ADE20K."""
    with torch.device("meta"):
        model = common.build_model("efficientfcn:official", classes,
                                   backbone="resnet50", codewords=codewords)
    assert sum(p.numel() for p in model.decoder.parameters()) == count


def test_default_decoder_has_the_size_a_hand_counts():
    """The text: e8, e16, e32, then B and G, A, W, classifier.

    A 1x1 has in * out weights, and its batch norm two numbers per channel.
    """
    with torch.device("meta"):
        model = common.build_model("efficientfcn", 60, backbone="resnet101c")
    unit = lambda i, o: i * o + 2 * o
    by_hand = (unit(512, 512) + unit(1024, 512) + unit(2048, 512) + 2 * unit(1536, 1024)
               + unit(1536, 256) + unit(1024, 256) + 2048 * 60 + 60)
    assert sum(p.numel() for p in model.decoder.parameters()) == by_hand


@pytest.mark.parametrize("spec, backbone, gmacs", [
    ("official", "resnet101c", 61.092), ("published-cost", "resnet101c", 71.125),
    ("fcn32s", "resnet101c", 44.423), ("dilated-fcn8s", "resnet101s", 223.108)])
def test_multiply_adds_at_512(spec, backbone, gmacs):
    """All products, those of Eqs. (2) and (3) too, which the paper's counter misses."""
    model, image = common.shapes_only(f"efficientfcn:{spec}", 60, (512, 512),
                                      backbone=backbone)
    cost = common.count_cost(model, image)
    assert cost["total"]["gmacs"] == pytest.approx(gmacs, abs=5e-4)


# --- The rivals of Table 1, and the picture ------------------------------------------


@pytest.mark.parametrize("variant", ["unet-bilinear", "unet-deconv"])
@pytest.mark.parametrize("H, W", [(33, 65), (65, 97), (100, 36)])
def test_unet_lines_up_at_odd_sizes(variant, H, W):
    """A map enlarged by two may be a row or a column too long: it is cut, not squeezed.

    Squeezed, every position would be beside its place.
    """
    model = common.build_model(f"efficientfcn:{variant}", 3, **SMALL).eval()
    with torch.no_grad():
        features = model.encoder(torch.randn(1, 3, H, W))
        logits, (f32, f16) = model.decoder(features["res5"], features)
        assert logits.shape[-2:] == features["res3"].shape[-2:]
        e16 = model.decoder.laterals["res4"](features["res4"])
        whole = model.decoder.up16(f32)
        if variant == "unet-bilinear":
            whole = torch.nn.functional.interpolate(whole, scale_factor=2.0,
                                                    mode="bilinear")
        both = model.decoder.beside(model.decoder.up16(f32), e16)
    h, w = e16.shape[-2:]
    torch.testing.assert_close(both[:, :16], whole[..., :h, :w], msg="squeezed")
    torch.testing.assert_close(both[:, 16:], e16)


def test_only_unets_in_training_have_auxiliary_logits():
    """N10: the U-Nets have two heads, at 1/32 and 1/16; EfficientFCN and FCN none."""
    images = torch.randn(2, 3, 64, 96)
    for variant in ("default", "fcn32s"):
        model = common.build_model(f"efficientfcn:{variant}", 3, **SMALL)
        assert model(images)["aux"] == []
    model = common.build_model("efficientfcn:unet-bilinear", 3, **SMALL)
    assert [tuple(x.shape) for x in model(images)["aux"]] == [(2, 3, 2, 3),
                                                              (2, 3, 4, 6)]
    assert model.eval()(images)["aux"] == []


def test_unlike_codewords_are_chosen_by_their_angle():
    """The most used first, then the one that points farthest away; unused ones never.

    Codeword 1 is 0, only longer; 3 points the opposite way, but nothing uses it.
    """
    codewords = torch.tensor([[1.0, 5.0, 0.0, -1.0, 1.0, 0.0],
                              [0.0, 0.1, 2.0, 0.0, 1.0, -1.0]])
    use = torch.tensor([0.9, 0.8, 0.7, 0.0, 0.1, 0.0])
    assert efficientfcn.unlike(codewords, 2, use=use) == [0, 2]
    assert efficientfcn.unlike(codewords, 4, use=use) == [0, 2, 1]  # half of six


def test_preference_is_a_ratio_of_means():
    """Of map 0 class 0, a quarter of the places, has half: twice the mean.

    Class 1 has one place, which is too few to speak of a mean. Map 1 is zero.
    """
    maps = torch.tensor([[[1.0, 1.0, 0.0, 0.5], [0.5, 0.5, 0.5, 0.0]], [[0.0] * 4] * 2])
    labels = torch.tensor([[0, 0, 1, 2], [2, 2, 2, 2]])
    ratio = efficientfcn.preference(maps, labels, 4)
    torch.testing.assert_close(ratio, torch.tensor([[2, 0, 0.8, 0], [0.0] * 4]))


def test_a_and_b_lie_amid_the_two_largest_classes():
    labels = torch.zeros(12, 20, dtype=torch.long)
    labels[6:, 10:] = 2
    labels[0, 0] = 1
    (ya, xa), (yb, xb) = efficientfcn.two_places(labels, 3)
    assert labels[ya, xa] == 0 and labels[yb, xb] == 2
    assert 2 < xa < 10 and 7 < yb < 11 and 11 < xb < 19


def test_the_maps_in_the_picture_are_the_models():
    """Upper row A~_i, lower row W_i of four codewords; the bars are columns of W."""
    torch.manual_seed(0)
    model = common.build_model("efficientfcn", 3, **SMALL).eval()
    image = torch.randn(1, 3, 64, 96)
    figure = efficientfcn.explain(model, image, classes=["sky", "road", "car"])
    with torch.no_grad():
        features = model.encoder(image)
        step = model.decoder.steps(features["res5"], features)
    drawn = {"maps": [], "weights": []}
    for axis in figure.axes:
        title = axis.get_title(loc="left")
        if title.startswith("codeword"):
            x = torch.tensor(axis.images[0].get_array().data)
            name = "maps" if len(x) == 2 else "weights"
            i = int(title.split()[1].strip(":"))
            drawn[name].append(i)
            assert torch.equal(x, step[name][0, i]), title
    assert drawn["maps"] == drawn["weights"] and len(set(drawn["maps"])) == 4
    chart = next(axis for axis in figure.axes if len(axis.containers) == 2)
    shown = [int(text.get_text().split()[0]) for text in chart.get_xticklabels()]
    assert shown[:4] == drawn["maps"]
    with torch.no_grad():
        labels = model.decode(image)[0][0].argmax(0)
    places = efficientfcn.two_places(labels, 3)
    for bars, (y, x) in zip(chart.containers, places):
        heights = torch.tensor([bar.get_height() for bar in bars]).float()
        torch.testing.assert_close(heights, step["weights"][0, shown, y, x])


def test_explain_refuses_the_rivals_and_demo_saves_the_picture(tmp_path, capsys):
    model = common.build_model("efficientfcn:unet-deconv", 3, **SMALL).eval()
    with pytest.raises(common.UserError, match="no codewords"):
        efficientfcn.explain(model, torch.randn(1, 3, 64, 96))
    efficientfcn.demo(str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "evaluate.py cost efficientfcn" in capsys.readouterr().out
