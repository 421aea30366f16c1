"""A model in somebody else's program: other types, images, wrappers, compilers."""
import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError
from conftest import SMALL

SPECS = [f"{name}:{variant}" for name in common.methods()
         for variant in importlib.import_module(name).VARIANTS]
# One of each method, and the variants with layers that leave 16 bits on their own.
MAIN = ["nrd:default", "nrd:carafe", "dupsampling:default", "dupsampling:mean",
        "efficientfcn:default", "sfnet:default", "sfnet:dcn", "sfnet:released",
        "deeplabv3plus:default"]


def fast(specs):
    """All variants; those beyond `specs` for --thorough."""
    return [spec if spec in specs else pytest.param(spec, marks=pytest.mark.thorough)
            for spec in SPECS]


# --- Types of numbers ----------------------------------------------------------------


@pytest.mark.parametrize("spec", fast(MAIN))
def test_a_model_works_in_any_type(spec, thin):
    """half() and bfloat16() come near double(), float() very near.

    The likely mistakes: .float() in the middle, after which a layer in 16 bits or in
    float64 is given numbers of another type than its weights; logits in 16 bits, of
    which the largest two are often equal.
    """
    model = common.build_model(spec, 5, **SMALL).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())["out"]
        assert exact.dtype == torch.float64, "double() must not pass through float32"
        for dtype, slack in ((torch.float32, 1e-5), (torch.half, 0.02),
                             (torch.bfloat16, 0.15)):
            narrow = copy.deepcopy(model).to(dtype)
            logits = narrow(images.to(dtype))["out"]
            wide = torch.promote_types(dtype, torch.float32)
            assert logits.dtype == wide, f"logits of a {dtype} model"
            off = (logits - exact).abs().max() / exact.abs().max()
            assert off < slack, f"{dtype}: {off:.1e} of the largest logit"
            native, _ = narrow.decode(images.to(dtype))
            rows = narrow.to_pixels(native, (65, 97), (3, 9))
            assert rows.shape == (2, 5, 6, 97) and rows.isfinite().all()


@pytest.mark.parametrize("spec", [
    "deeplabv3plus", "deeplabv3plus:no-decoder", "dupsampling:bilinear",
    "dupsampling:vanilla", "efficientfcn", "efficientfcn:unet-bilinear", "nrd",
    "nrd:bilinear", "sfnet", "sfnet:fcn"])
def test_logits_are_enlarged_in_float32_under_autocast(spec, thin, monkeypatch):
    """On a GPU bilinear's gradient is summed in the type of what was enlarged.

    A coarse logit's has 64 to 1024 terms; in bfloat16 a sum of ones stops at 256.
    """
    interpolate = F.interpolate
    enlarged = []

    def noted(x, *args, **options):
        if x.shape[1] == 5:  # as many channels as classes: logits
            enlarged.append(x.dtype)
        return interpolate(x, *args, **options)
    monkeypatch.setattr(F, "interpolate", noted)
    model = common.build_model(spec, 5, **SMALL).train()
    with common.autocast("cpu", "bf16"):
        outputs = model(torch.randn(2, 3, 64, 96))
    labels = torch.zeros(2, 64, 96, dtype=torch.uint8)
    common.segmentation_loss(outputs, labels)
    assert set(enlarged) == {torch.float32}, "`widened` is missing in front of it"


@pytest.mark.filterwarnings("ignore:W is random")
@pytest.mark.parametrize("method", common.methods())
def test_a_step_of_training_in_float64(method, thin):
    """Checks of gradients want it: each loss and each gradient is float64, too."""
    model = common.build_model(method, 5, **SMALL).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    labels = torch.randint(5, (2, 64, 96), dtype=torch.uint8)
    losses = [common.segmentation_loss(model(images), labels)[0]]
    module = importlib.import_module(method)
    if hasattr(module, "pretrain_loss"):
        losses.append(module.pretrain_loss(model, images, labels))
    for loss in losses:
        assert loss.dtype == torch.float64
        loss.backward()


# --- Other images --------------------------------------------------------------------


@pytest.mark.parametrize("method", common.methods())
@pytest.mark.parametrize("channels", [1, 4])
def test_depth_and_more_spectra_are_images_too(method, channels, thin):
    model = common.build_model(method, 5, in_channels=channels, **SMALL)
    out = model.eval()(torch.randn(1, channels, 64, 65))["out"]
    assert out.shape == (1, 5, 64, 65)


def test_pretrained_weights_keep_what_they_say_of_rgb(tmp_path):
    """A fourth channel starts at 0; a grey image says what it said in RGB.

    The likely mistake: a new first convolution at random in front of trained layers.
    """
    torch.save(common.torchvision.models.resnet18().state_dict(), tmp_path / "w.pt")
    build = lambda n: common.build_model(
        "deeplabv3plus", 5, in_channels=n, weights=str(tmp_path / "w.pt"),
        **SMALL).encoder.eval()
    rgb, four, grey = build(3), build(4), build(1)
    images = torch.randn(1, 4, 64, 64)
    equal = torch.testing.assert_close
    equal(four(images)["res5"], rgb(images[:, :3])["res5"],
          msg=lambda said: f"the fourth channel must start at 0: {said}")
    equal(grey(images[:, :1])["stem"], rgb(images[:, :1].expand(-1, 3, -1, -1))["stem"],
          rtol=1e-4, atol=1e-4)
    four(images)["res5"].sum().backward()
    assert four.stem[0].weight.grad[:, 3].any(), "the fourth channel must learn"


def test_weights_drawn_anew_read_every_channel(thin):
    """Without pretrained ones no channel starts at 0."""
    conv = common.build_model("nrd", 5, in_channels=6, **SMALL).encoder.stem[0]
    assert conv.in_channels == 6
    assert conv.weight.abs().amin((0, 2, 3)).all(), "a channel that nothing reads"


@pytest.mark.parametrize("options, sentence", [
    ({"in_channels": 0}, "in_channels=0: must be a number above 0"),
    ({"in_channels": 4, "backbone": "labels"}, "no convolution that reads RGB"),
    ({"hiden_channels": 3}, "no option 'hiden_channels' .did you mean 'hidden_chann"),
    ({"in_chanels": 4}, "no option 'in_chanels'")])
def test_a_wrong_option_of_build_model_is_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        common.build_model("nrd:no-guidance", 5, **{"backbone": "resnet18"} | options)


# --- A batch of one ------------------------------------------------------------------


def has_pooled_norm(model):
    """Whether some batch norm follows a pooling to 1x1."""
    return any(isinstance(layer, nn.Sequential) and len(layer) > 2
               and isinstance(layer[0], nn.AdaptiveAvgPool2d)
               for layer in model.modules())


@pytest.mark.parametrize("spec", [*common.methods(), "deeplabv3plus:no-image-level",
                                  "sfnet:no-ppm"])
@pytest.mark.filterwarnings("ignore:W is random")
def test_one_image_in_training_is_refused_where_it_would_be_zero(spec, thin):
    """With train.py's sentence, before torch's; where nothing is pooled it works."""
    model = common.build_model(spec, 5, **SMALL).train()
    image = torch.randn(1, 3, 64, 96)
    if has_pooled_norm(model):
        with pytest.raises(UserError, match="a batch of 1 .* leaves batch norm a single"
                           " image .*two or more"):
            model(image)
    else:
        model(image)
    for layer in model.modules():  # frozen, it asks for nothing
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    model(image)


def test_res5_of_one_position_is_refused_too(thin):
    encoder = common.Encoder("resnet18").train()
    encoder(torch.randn(1, 3, 33, 32))
    with pytest.raises(UserError, match="leaves batch norm a single image"):
        encoder(torch.randn(1, 3, 32, 32))


# --- Wrappers and compilers ----------------------------------------------------------


@pytest.mark.parametrize("method", common.methods())
def test_a_copy_and_a_wrapper_say_the_same(method, thin):
    """copy.deepcopy and nn.DataParallel (of no GPU: it passes the call on)."""
    model = common.build_model(method, 5, **SMALL).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        out = model(images)["out"]
        assert torch.equal(copy.deepcopy(model)(images)["out"], out)
        wrapped = nn.DataParallel(model)(images)
    assert torch.equal(wrapped["out"], out) and wrapped["aux"] == []


def test_a_repeated_border_is_traced_once(one_thread):
    """Whether a border is missing must not part what is compiled for two sizes.

    The likely mistake: `if columns:`, which holds for the traced size alone.
    """
    torch.compiler.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward
    compiled = torch.compile(lambda x: common.repeat_border(
        x, 8 - x.shape[-2], 9 - x.shape[-1]), dynamic=True, backend=backend)
    for H, W in ((6, 7), (8, 9), (8, 4), (5, 9)):
        x = torch.randn(2, 3, H, W)
        wanted = torch.nn.functional.pad(x, (0, 9 - W, 0, 8 - H), mode="replicate")
        assert torch.equal(compiled(x), wanted)
        assert torch.equal(common.repeat_border(x, 8 - H, 9 - W), wanted)
    assert len(traced) == 1, f"traced {len(traced)} times"


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("method", common.methods())
def test_a_compiled_model_takes_image_after_image(method, backend, thin):
    """Sizes change, 32 divides them or not; each is as without compilation."""
    model = common.build_model(method, 5, **SMALL).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, backend=backend)
    with torch.no_grad():
        for B, H, W in ((2, 65, 97), (1, 96, 160), (3, 64, 33)):
            images = torch.randn(B, 3, H, W)
            torch.testing.assert_close(compiled(images)["out"], model(images)["out"],
                                       rtol=1e-3, atol=1e-4)
