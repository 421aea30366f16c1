"""Encoder, losses, metrics, cost, building by name, and the contract of a method."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import common
import data
import evaluate
import train
from common import IGNORE_INDEX, ConfusionMatrix, UserError
from conftest import SMALL

# --- Encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("backbone, count", [
    ("resnet50c", 23_527_264), ("resnet101c", 42_519_392), ("resnet50s", 23_631_808),
    ("resnet101s", 42_623_936)])
def test_deep_stems_have_exactly_the_published_size(backbone, count):
    with torch.device("meta"):
        encoder = common.Encoder(backbone)
    assert sum(p.numel() for p in encoder.parameters()) == count


DILATED = ("resnet18", "resnet50s", "df1", "df2", "xception65", "xception71")


@pytest.mark.parametrize("backbone, output_stride", [
    *((backbone, 32) for backbone in common.backbones()),
    *((backbone, stride) for backbone in DILATED for stride in (16, 8))])
def test_every_backbone_names_its_stages_sizes_and_channels(backbone, output_stride):
    """Stage sizes are H/2 .. H/32 rounded up; `channels` tells the truth.

    At output strides 16 and 8 the shrinking stops there.
    """
    with torch.device("meta"):
        encoder = common.make_encoder(backbone, 3, output_stride=output_stride).eval()
        features = encoder(torch.empty(1, 3, 65, 97))
    assert list(features) == list(encoder.channels)
    strides = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5a": 32, "res5": 32}
    for name, x in features.items():
        stride = min(strides[name], output_stride)
        shape = (1, encoder.channels[name], -(-65 // stride), -(-97 // stride))
        assert x.shape == shape, name


def test_a_backbone_that_is_none():
    """The usual slip is told by the name that was meant, of a paper's encoder, too."""
    for wrong, meant in (("resnet51", "resnet50"), ("xception56", "xception65")):
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            common.make_encoder(wrong, 3)
    with pytest.raises(UserError, match="ImageNet weights of df2 are not at hand"):
        common.make_encoder("df2", 3, weights="imagenet")
    with pytest.raises(UserError, match="output_stride 4"):
        common.make_encoder("df2", 3, output_stride=4)
    with pytest.raises(UserError, match="for ShuffleNetV2 32 only"):
        common.make_encoder("shufflenet_v2_x1_0", 3, output_stride=16)


def test_a_papers_encoder_takes_a_file_of_its_own_names(tmp_path):
    """--weights FILE: what was trained as df1 here can start another df1."""
    source = common.make_encoder("df1", 3)
    torch.save(source.state_dict(), tmp_path / "df1.pt")
    loaded = common.make_encoder("df1", 3, weights=str(tmp_path / "df1.pt"))
    assert torch.equal(loaded.res5[0].conv1.weight, source.res5[0].conv1.weight)
    with pytest.raises(UserError, match="do not fit df2"):
        common.make_encoder("df2", 3, weights=str(tmp_path / "df1.pt"))


def test_weights_are_loaded_or_refused(tmp_path):
    """A file that fits is used; a wrong one, a missing one, a deep stem are errors."""
    source = common.Encoder("resnet18")
    net = common.torchvision.models.resnet18()
    path = tmp_path / "w.pt"
    state = {"module." + k: v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state}, path)
    loaded = common.Encoder("resnet18", weights=str(path))
    assert torch.equal(loaded.stem[0].weight, net.conv1.weight)
    assert not torch.equal(source.stem[0].weight, net.conv1.weight)
    with pytest.raises(UserError, match="do not fit resnet50 .*nothing was loaded"):
        common.Encoder("resnet50", weights=str(path))
    with pytest.raises(UserError, match="no such file"):
        common.Encoder("resnet18", weights="imagnet")
    with pytest.raises(UserError, match="deep stem"):
        common.Encoder("resnet50c", weights="imagenet")


def saved(path, backbone, rename=lambda name: name):
    """A weight file of an encoder's network, under other names."""
    net = common.torchvision.models.get_model(common.split_backbone(backbone)[0])
    widths = common.split_backbone(backbone)[1]
    if widths:
        common.replace_stem(net, widths)
    torch.save({rename(k): v for k, v in net.state_dict().items()}, path)
    return net


def test_a_deep_stem_has_two_names(tmp_path):
    """mmsegmentation's stem.0 .. stem.7 are the layers conv1.0 .. conv1.6 and bn1.

    The likely mistake: to load what fits, and to train with a random stem.
    """
    def rename(name):
        layer, _, rest = name.partition(".")
        theirs = {"conv1": f"stem.{rest}", "bn1": f"stem.7.{rest}"}
        return f"backbone.{theirs.get(layer, name)}"
    net = saved(tmp_path / "w.pt", "resnet18c", rename)
    assert "backbone.stem.7.weight" in torch.load(tmp_path / "w.pt")
    loaded = common.Encoder("resnet18c", weights=str(tmp_path / "w.pt"))
    assert torch.equal(loaded.stem[0][6].weight, net.conv1[6].weight)
    assert torch.equal(loaded.stem[1].weight, net.bn1.weight), "the stem's last norm"
    assert "all 110 tensors" in loaded.loaded


@pytest.mark.parametrize("file, wanted", [("resnet101", "resnet50"),
                                          ("resnet18", "resnet18c"),
                                          ("resnet18c", "resnet18s")])
def test_weights_that_fit_in_part_are_refused(tmp_path, file, wanted):
    """A larger network holds all tensors of a smaller one; another stem, most."""
    saved(tmp_path / "w.pt", file)
    with pytest.raises(UserError, match=f"do not fit {wanted}"):
        common.Encoder(wanted, weights=str(tmp_path / "w.pt"))


def test_offline_imagenet_says_what_to_do(monkeypatch, tmp_path):
    """No network: a sentence with address, folder and way on, never random weights."""
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "_dir", str(tmp_path), raising=False)
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(UserError, match="put it into .* or pass --weights none"):
        common.Encoder("resnet18", weights="imagenet")


def test_upsample_cuts_instead_of_squeezing():
    """Where the sizes are not multiples, positions stay factor * index.

    The likely mistake, F.interpolate(size=(H, W)), moves the last row by pixels.
    """
    x = torch.arange(3.0).expand(1, 1, 3, 3)
    whole = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
    assert torch.equal(common.upsample(x, 4, (9, 10)), whole[..., :9, :10])


# --- Losses --------------------------------------------------------------------------


def test_loss_ignores_255_and_nothing_else():
    """Adding an all-ignored row does not change the loss; it is a mean over valid."""
    logits, labels = torch.randn(1, 3, 4, 5), torch.randint(3, (1, 4, 5))
    plain = common.cross_entropy(logits, labels)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))
    more = torch.cat([logits, torch.randn(1, 3, 1, 5)], 2)
    padded = torch.cat([labels, torch.full((1, 1, 5), IGNORE_INDEX)], 1)
    torch.testing.assert_close(common.cross_entropy(more, padded), plain)


@pytest.mark.parametrize("ohem", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_ignored_crop_gives_exactly_zero(ohem, dtype):
    """Loss 0.0 and gradient 0, where torch's own mean is NaN.

    0 times the sum of the logits would be NaN in fp16, where the sum overflows.
    """
    logits = (torch.randn(2, 3, 99, 99) + 3).to(dtype).requires_grad_()
    labels = torch.full((2, 99, 99), IGNORE_INDEX, dtype=torch.uint8)
    loss, _ = common.segmentation_loss({"out": logits, "aux": [logits]}, labels,
                                       ohem=ohem)
    loss.backward()
    assert loss.item() == 0.0 and (logits.grad == 0).all()
    assert F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_INDEX).isnan()


@pytest.mark.parametrize("share, threshold", [(0.1, 0.0), (0.3, 0.7), (1.0, 0.7)])
def test_ohem_keeps_the_hard_pixels_of_each_image(share, threshold):
    """Literal OHEM: of each image the share with most loss, and all p < threshold."""
    logits, labels = 3 * torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    labels[0, 0, :3] = IGNORE_INDEX
    kept = []
    for image, truth in zip(logits, labels):
        losses = sorted((-image[:, y, x].log_softmax(0)[truth[y, x]].item()
                         for y in range(4) for x in range(5)
                         if truth[y, x] != IGNORE_INDEX), reverse=True)
        hard = [v for v in losses if math.exp(-v) < threshold]
        kept += losses[:max(len(hard), math.ceil(share * len(losses)))]
    ours = common.ohem_cross_entropy(logits, labels, share=share, threshold=threshold)
    assert ours.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def test_ohem_keeps_no_more_where_losses_tie():
    """Sure pixels have a loss of exactly 0: as many as fill the share, and not all."""
    logits = torch.tensor([[50.0, 0.0]]).repeat(100, 1)
    logits[:5] = torch.tensor([0.0, 2.0])
    logits, labels = logits.T.reshape(1, 2, 10, 10), torch.zeros(1, 10, 10)
    hard = math.log1p(math.exp(2))
    ours = common.ohem_cross_entropy(logits, labels, share=0.1)
    assert ours.item() == pytest.approx(hard / 2), "ten pixels are 10 % of a hundred"


def test_ohem_does_not_depend_on_how_a_batch_is_divided():
    """The released codes keep a number per process: on one device another loss."""
    logits, labels = torch.randn(4, 3, 5, 5), torch.randint(3, (4, 5, 5))
    loss = lambda a, b: common.ohem_cross_entropy(logits[a:b], labels[a:b], share=0.2)
    torch.testing.assert_close(loss(0, 4), (loss(0, 2) + loss(2, 4)) / 2)


def test_auxiliary_loss_is_weighted_and_enlarged():
    logits, labels = torch.randn(1, 3, 8, 8), torch.randint(3, (1, 8, 8))
    aux = torch.randn(1, 3, 2, 2)
    total, terms = common.segmentation_loss({"out": logits, "aux": [aux]}, labels,
                                            aux_weight=0.25)
    big = F.interpolate(aux, (8, 8), mode="bilinear")
    expected = F.cross_entropy(logits, labels) + 0.25 * F.cross_entropy(big, labels)
    torch.testing.assert_close(total, expected)
    assert set(terms) == {"out", "aux0"}


# --- Metrics -------------------------------------------------------------------------


def test_matrix_equals_counting_pixel_by_pixel():
    """Random maps with void and an absent class against four nested loops."""
    K, matrix, naive = 4, ConfusionMatrix(4), [[0] * 4 for _ in range(4)]
    for _ in range(3):
        labels, guess = torch.randint(3, (6, 7)), torch.randint(3, (6, 7))
        labels[torch.rand(6, 7) < 0.2] = IGNORE_INDEX
        matrix.update(labels.byte(), guess)
        for y in range(6):
            for x in range(7):
                if labels[y, x] != IGNORE_INDEX:
                    naive[labels[y, x]][guess[y, x]] += 1
    assert matrix.counts.tolist() == naive
    ious = []
    for c in range(K):
        union = sum(naive[c]) + sum(row[c] for row in naive) - naive[c][c]
        if union:
            ious.append(naive[c][c] / union)
    assert matrix.miou() == pytest.approx(sum(ious) / len(ious))
    assert matrix.iou()[3].isnan(), "class 3 never occurs: no IoU, not 0"


def test_absent_class_is_skipped_not_averaged_as_zero():
    """IoU 90/100, 80/90 and none: the mean is over two classes, not three."""
    matrix = ConfusionMatrix(3)
    matrix.counts = torch.tensor([[90, 0, 0], [10, 80, 0], [0, 0, 0]])
    assert matrix.iou()[:2].tolist() == [0.9, 80 / 90]
    assert matrix.miou() == pytest.approx((0.9 + 80 / 90) / 2)


def test_predicted_but_absent_class_counts_as_zero():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 1]]), torch.tensor([[0, 2]]))
    assert matrix.iou().tolist() == [1.0, 0.0, 0.0]


def test_data_set_miou_is_not_the_mean_over_images():
    """A small all-right image and a large half-wrong one: pixels count, not images."""
    matrix = ConfusionMatrix(2)
    matrix.update(torch.zeros(1, 1, dtype=torch.int), torch.zeros(1, 1))
    big = torch.arange(100).reshape(10, 10) % 2
    matrix.update(big, torch.zeros(10, 10))
    assert matrix.miou() == pytest.approx((51 / 101 + 0) / 2)


def test_metric_refuses_nonsense():
    matrix = ConfusionMatrix(2)
    for labels, predictions in ((2, 0), (0, 2), (1, -1), (-1, 0)):
        with pytest.raises(ValueError, match="must be 0..1 or 255"):
            matrix.update(torch.tensor([[labels]]), torch.tensor([[predictions]]))
    matrix.update(torch.tensor([[255]]), torch.tensor([[0]]))
    with pytest.raises(UserError, match="no valid pixel"):
        matrix.miou()
    with pytest.raises(RuntimeError, match="scored 1 of 2"):
        matrix.summary(protocol="", expected_images=2)


# --- Building by name ----------------------------------------------------------------

VARIANTS = [f"{name}:{variant}" for name in common.methods()
            for variant in common.load_method(name)[0].VARIANTS]


def without_effect(model):
    """Biases that the next layer takes away again; released codes have them.

    A batch norm subtracts what a convolution's bias adds (SFNet, N9; NRD's guidance),
    also through the 1x1 behind SFNet's context modules, and a softmax over space what a
    constant adds to its map (EfficientFCN, N8).
    """
    names = {"decoder.guidance.layers.3.bias"}
    for prefix, layer in model.named_modules():
        if isinstance(layer, torch.nn.Sequential):
            for i, (a, b) in enumerate(zip(layer, layer[1:])):
                if isinstance(a, torch.nn.Conv2d) and isinstance(
                        b, torch.nn.BatchNorm2d) and a.bias is not None:
                    names.add(f"{prefix}.{i}.bias")
        if type(layer).__name__ == "PPM" and layer.project[0].kernel_size == (1, 1):
            names |= {f"{prefix}.branches.{i}.2.bias" for i in range(4)}
        if type(layer).__name__ == "NonLocal":
            names.add(f"{prefix}.back.1.bias")
        if prefix == "decoder.weighting":
            names.add(f"{prefix}.{len(layer) - 1}.bias")
    return names


@pytest.fixture(scope="module")
def two_streets():
    dataset = data.open_dataset("streets", "train")
    images, labels = map(torch.stack, zip(*(dataset.load(i) for i in range(2))))
    return data.NORMALISE(images)[..., 32:96, 32:128], labels[:, 32:96, 32:128]


@pytest.mark.filterwarnings("ignore:W is random")
@pytest.mark.parametrize("spec", VARIANTS)
def test_every_variant_trains_and_evaluates_at_any_size(spec, two_streets, thin):
    """One step: finite, non-zero gradients everywhere; then any size, and by rows."""
    known = common.method_options(spec)
    options = {k: 16 for k in ("channels", "controller_channels") if k in known}
    options |= common.load_method(spec)[0].FROM_SCRATCH
    model = common.build_model(spec, 11, backbone="resnet18", **options)
    loss, _ = common.segmentation_loss(model(two_streets[0]), two_streets[1])
    loss.backward()
    silent = without_effect(model)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert p.grad is not None and p.grad.isfinite().all(), (
            f"{name}: no finite gradient")
        if name in silent:
            assert p.grad.abs().max() < 1e-5, f"{name} has an effect after all"
        else:
            assert p.grad.any(), f"{name}: zero gradient, is it connected?"
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()
    with torch.no_grad():
        for size in ((33, 65), (64, 96), (65, 97), (512, 32)):
            images = torch.randn(1, 3, *size)
            outputs = model(images)
            assert outputs["out"].shape == (1, 11, *size) and outputs["aux"] == []
            assert outputs["out"].isfinite().all()
            rows_are_the_models_own(model, images, outputs["out"][0])


def rows_are_the_models_own(model, images, whole):
    """Enlarged by strips of rows, as it is scored, it says what `forward` says."""
    H, W = images.shape[-2:]
    windows = evaluate.Windows(model, images, evaluate.Protocol())
    for lo in range(0, H, 23):
        rows = windows.rows(lo, min(lo + 23, H))
        away = (rows - whole[:, lo:lo + 23]).abs().max() / whole.abs().max()
        assert away < 1e-5, f"rows {lo}.. slid against the image of {H}x{W}"


def test_build_signatures_look_alike():
    """num_classes, then by name backbone, weights, the method's own, aux at the end."""
    for name in common.methods():
        module = common.load_method(name)[0]
        (first, *rest) = inspect.signature(module.build).parameters.values()
        assert first.name == "num_classes"
        assert [p.name for p in rest[:2]] == ["backbone", "weights"], name
        assert {"channels"} < {p.name for p in rest} and rest[-1].name == "aux", name
        assert all(p.kind is p.KEYWORD_ONLY for p in rest), name


def test_loss_starts_near_chance():
    """Untrained logits are small: the first loss is about ln(11)."""
    model = common.build_model("nrd", 11, **SMALL)
    loss = common.cross_entropy(model(torch.randn(2, 3, 64, 64))["out"],
                                torch.randint(11, (2, 64, 64)))
    assert abs(loss.item() - math.log(11)) < 0.7, loss.item()


def test_wrong_names_are_told_with_the_right_ones():
    with pytest.raises(UserError, match="unknown method 'nrdd'.*did you mean 'nrd'"):
        common.build_model("nrdd", 5)
    with pytest.raises(UserError,
                       match="no variant 'bilinaer'.*did you mean 'bilinear'"):
        common.build_model("nrd:bilinaer", 5)
    with pytest.raises(UserError,
                       match="no option 'hiden_channels'.*'hidden_channels'.*=16"):
        train.parse_options("nrd", ["hiden_channels=8"])
    with pytest.raises(UserError, match="no option 'hiden_channels'.*did you mean"):
        common.build_model("nrd", 5, hiden_channels=8)
    with pytest.raises(UserError, match="hidden_channels is a int"):
        train.parse_options("nrd", ["hidden_channels=many"])
    assert train.parse_options("nrd", ["hidden_channels=8", "init=official"]) == {
        "hidden_channels": 8, "init": "official"}
    for wrong in (0, 256):
        with pytest.raises(UserError, match="class ids are bytes"):
            common.build_model("nrd", wrong)


@pytest.mark.parametrize("spec, key", [("nrd", "hidden_channels"),
                                       ("sfnet", "channels")])
def test_no_layer_has_zero_channels(spec, key):
    """torch builds one without a word; an option that is None otherwise counts, too."""
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"{key}={wrong}: must be at least 1"):
            common.build_model(spec, 5, **{key: wrong})
    common.check_count("weighting_hidden", 0, default=0)  # there it means "none"


# --- The contract --------------------------------------------------------------------


class Double(torch.nn.Module):
    """A network of one convolution that keeps the contract; each test breaks it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 3, stride=4, padding=1)
        self.num_classes = 5

    def forward(self, images):
        native, aux = self.decode(images)
        return {"out": self.to_pixels(native, images.shape[-2:]), "aux": aux}

    def decode(self, images):
        return self.layer(images), []

    def to_pixels(self, native, size, rows=None):
        return common.upsample(native, 4, size, rows)


def squeezed(self, native, size, rows=None):
    """The likely mistake: what everybody writes, but for the rows."""
    x = F.interpolate(native, size, mode="bilinear")
    return common.upsample(native, 4, size, rows) if rows else x


BREACHES = {
    "no dictionary": ({"forward": lambda self, x: self.layer(x)}, "forward must give"),
    "logits at 1/4": ({"forward": lambda self, x: {"out": self.layer(x), "aux": []}},
                      "out must be"),
    "auxiliary logits in eval": ({"decode": lambda self, x: (self.layer(x), [x])},
                                 "1 maps"),
    "a layer after the enlargement": ({"forward": lambda self, x: {
        "out": 2 * self.to_pixels(self.layer(x), x.shape[-2:]), "aux": []}},
        "not what forward gives"),
    "rows are enlarged otherwise": ({"to_pixels": squeezed}, "rows="),
    "half of the two steps": ({"decode": property(), "forward": lambda self, x: {
        "out": self.to_pixels(self.layer(x), x.shape[-2:]), "aux": []}},
        "belong together"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_method_that_breaks_the_contract_is_told_when_it_is_built(breach):
    """Else another network would be scored than was trained, without a word."""
    assert common.broken_contract(Double()) == ""
    changed, message = BREACHES[breach]
    model = type("Broken", (Double,), changed)()
    assert message in common.broken_contract(model)


# --- Cost ----------------------------------------------------------------------------


def cost_of(spec):
    return common.count_cost(*common.shapes_only(spec, 19, (1024, 2048),
                                                 backbone="resnet50c"))


def test_cost_counts_what_a_hand_counts():
    """Bilinear decoder at 1024x2048: 512*19 multiply-adds at each of 256*512 points."""
    cost = cost_of("nrd:bilinear")
    assert cost["decoder"]["gmacs"] == pytest.approx(512 * 19 * 256 * 512 / 1e9)
    assert cost["decoder"]["params"] == pytest.approx((512 * 19 + 19) / 1e6)


def test_dynamic_convolutions_are_counted():
    """g of NRD at 1024x2048: 18*16 + 16*16 + 16*19 products at 256*512 points."""
    cost = cost_of("nrd")["decoder"]
    static = (32 * 64 * (9 * 512 * 512 + 512 * 899)
              + 256 * 512 * (9 * 256 * 48 + 48 * 16))
    dynamic = 256 * 512 * (18 * 16 + 16 * 16 + 16 * 19)
    assert cost["gmacs"] * 1e9 == pytest.approx(static + dynamic)
