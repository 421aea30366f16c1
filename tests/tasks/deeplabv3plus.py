"""What is asked of the tasks in deeplabv3plus.py, and how they usually go wrong."""
import torch
from torch import nn

from grading import Mistake, gradients, points


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class atrous_convolution:
    @points(2)
    def shape(deeplabv3plus):
        """(B, D, h, w) at any rate: the map keeps its size."""
        x, weight = torch.randn(2, 3, 7, 9), torch.randn(4, 3, 3, 3)
        return [deeplabv3plus.atrous_convolution(x, weight, rate=rate).shape
                for rate in (1, 2, 6)]

    @points(3)
    def values(deeplabv3plus):
        """Nine products, `rate` positions apart, zero outside the map."""
        x, weight = double(2, 3, 7, 9), double(4, 3, 3, 3)
        return {f"rate {rate}": deeplabv3plus.atrous_convolution(x, weight, rate=rate)
                for rate in (2, 3)}

    @points(3)
    def gradients(deeplabv3plus):
        """Of the map and of the kernel."""
        return dict(zip(("x", "weight"), gradients(
            lambda x, weight: deeplabv3plus.atrous_convolution(x, weight, rate=2),
            double(2, 3, 7, 9), double(4, 3, 3, 3))))

    CONVOLUTION = "F.conv2d(x, weight, padding=rate, dilation=rate)"
    mistakes = [
        Mistake("the kernel has no holes: dilation is what spreads its nine weights",
                {CONVOLUTION: "F.conv2d(x, weight, padding=1)"},
                loses="values gradients"),
        Mistake("the map shrinks: with holes, the padding must be `rate`, too",
                {"padding=rate": "padding=1"}, loses="shape values gradients"),
        Mistake("`rate` is the stride: Eq. (1) skips inputs, not outputs",
                {CONVOLUTION: "F.conv2d(x, weight, padding=1, stride=rate)"},
                loses="shape values gradients"),
        Mistake("the kernel is turned round: Eq. (1) has x at i + rate * k",
                {"(x, weight,": "(x, weight.flip(2, 3),"}, loses="values gradients"),
        Mistake("the kernel is transposed: its rows run along the map's rows",
                {"(x, weight,": "(x, weight.mT,"}, loses="values gradients"),
        Mistake("the border is repeated: outside the map there are zeros",
                {CONVOLUTION: "F.conv2d(F.pad(x, (rate,) * 4, mode='replicate'), "
                              "weight, dilation=rate)"},
                loses="values gradients"),
    ]


class atrous_rates:
    @points(2)
    def dilated(deeplabv3plus):
        """The paper's at output strides 16 and 8."""
        return [deeplabv3plus.atrous_rates(stride) for stride in (16, 8)]

    @points(2)
    def undilated(deeplabv3plus):
        """Those that see the same stretch of the image at 32."""
        return deeplabv3plus.atrous_rates(32)

    mistakes = [
        Mistake("the rates do not depend on the stride: a finer map needs larger ones "
                "to see as far",
                {"rate * 32 // output_stride": "2 * rate"}, loses="dilated undilated"),
        Mistake("the wrong way round: a finer map, of a smaller stride, needs larger "
                "rates",
                {"rate * 32 // output_stride": "rate * output_stride // 8"},
                loses="dilated undilated"),
        Mistake("twice the paper's: 6, 12, 18 belong to output stride 16, not to 32",
                {"(3, 6, 9)": "(6, 12, 18)"}, loses="dilated undilated"),
    ]


class DeepLabv3PlusDecoder_forward:
    def logits(deeplabv3plus, q, r):
        """Logits of a small decoder at output stride 16, on a context of 3 x 4."""
        decoder = deeplabv3plus.DeepLabv3PlusDecoder(
            6, 5, 3, channels=8, reduced=4, output_stride=16).eval()
        return decoder(torch.randn(2, 6, 3, 4), {"res2": torch.randn(2, 5, q, r)})

    @points(2)
    def shape(deeplabv3plus):
        """(B, K, q, r): the grid of res2."""
        return DeepLabv3PlusDecoder_forward.logits(deeplabv3plus, 12, 16).shape

    @points(4)
    def values(deeplabv3plus):
        """Enlarged context beside reduced res2, refined, classified."""
        return DeepLabv3PlusDecoder_forward.logits(deeplabv3plus, 12, 16)

    @points(4)
    def odd_sizes(deeplabv3plus):
        """Where 4 does not divide res2's sides, what is too much is cut (note N8)."""
        return DeepLabv3PlusDecoder_forward.logits(deeplabv3plus, 10, 13)

    UP = "upsample(context, self.factor, low.shape[-2:])"
    mistakes = [
        Mistake("the low-level channels come first: the context does",
                {"[up, low]": "[low, up]"}, loses="values odd_sizes"),
        Mistake("the context is squeezed into res2's size: it is enlarged by the whole "
                "factor and cut, or it is shifted (note N8)",
                {UP: "nn.functional.interpolate(context, low.shape[-2:], "
                     "mode='bilinear')"}, loses="odd_sizes"),
        Mistake("align_corners=True: here it is False (note N8)",
                {UP: "nn.functional.interpolate(context, low.shape[-2:], "
                     "mode='bilinear', align_corners=True)"},
                loses="values odd_sizes"),
        Mistake("nearest neighbours instead of a bilinear enlargement",
                {UP: "context.repeat_interleave(self.factor, 2).repeat_interleave("
                     "self.factor, 3)[..., :low.shape[2], :low.shape[3]]"},
                loses="values odd_sizes"),
        Mistake("the decoder works on the coarse grid: res2 keeps its resolution, the "
                "context is enlarged",
                {"[up, low]":
                 "[context, nn.functional.adaptive_avg_pool2d(low, (h, w))]"},
                loses="shape values odd_sizes"),
        Mistake("the classifier is missing: 8 channels instead of 3 classes",
                {"self.classify(self.refine(both))": "self.refine(both)"},
                loses="shape values odd_sizes"),
    ]


class Stages(nn.Module):
    """An encoder of one convolution per stage, all equally wide."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict({f"res{i}": nn.Conv2d(3, 4, 3, 2**i, 1)
                                     for i in (2, 3, 4, 5)})

    def forward(self, images):
        return {name: stage(images) for name, stage in self.stages.items()}


class Sum(nn.Module):
    """A decoder that needs context and res2."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.classify = nn.Conv2d(4, 3, 1)

    def forward(self, context, features):
        size = features["res2"].shape[-2:]
        return self.classify(features["res2"] + nn.functional.interpolate(context, size))


def small_network(deeplabv3plus):
    heads = nn.ModuleList([nn.Conv2d(4, 3, 1)])
    return deeplabv3plus.DeepLabv3Plus(Stages(), nn.Conv2d(4, 4, 1), Sum(), heads)


class DeepLabv3Plus_decode:
    @points(3)
    def logits(deeplabv3plus):
        """Encoder, context of res5, decoder."""
        return small_network(deeplabv3plus).decode(torch.randn(2, 3, 64, 96))[0]

    @points(3)
    def training(deeplabv3plus):
        """While training, one auxiliary head's logits, of res4."""
        return small_network(deeplabv3plus).decode(torch.randn(2, 3, 64, 96))[1]

    @points(2)
    def evaluation(deeplabv3plus):
        """In evaluation, no auxiliary logits: an empty list."""
        return small_network(deeplabv3plus).eval().decode(torch.randn(1, 3, 64, 96))[1]

    CONTEXT = 'self.context(features["res5"])'
    mistakes = [
        Mistake("auxiliary logits in evaluation, too: they serve training only",
                {" if self.training]": "]"}, loses="evaluation"),
        Mistake("no auxiliary logits while training",
                {"if self.training]": "if False]"}, loses="training"),
        Mistake("the auxiliary head reads res5: it is on res4 (note N5)",
                {'head(features["res4"])': 'head(features["res5"])'},
                loses="training"),
        Mistake("the context module is left out: the decoder reads its result",
                {CONTEXT: 'features["res5"]'}, loses="logits"),
        Mistake("the context module reads res4: it reads res5, the deepest",
                {CONTEXT: 'self.context(features["res4"])'}, loses="logits"),
    ]


class DeepLabv3Plus_to_pixels:
    @points(2)
    def whole(deeplabv3plus):
        """The last x4, cut to the image's size."""
        network = small_network(deeplabv3plus)
        return network.to_pixels(torch.randn(2, 3, 9, 13), (34, 49))

    @points(2)
    def rows(deeplabv3plus):
        """rows = (7, 20): these rows alone."""
        network = small_network(deeplabv3plus)
        return network.to_pixels(torch.randn(2, 3, 9, 13), (34, 49), (7, 20))

    @points(1)
    def coarse(deeplabv3plus):
        """A decoder of stride 16: by 16."""
        network = small_network(deeplabv3plus)
        network.decoder.stride = 16
        return network.to_pixels(torch.randn(1, 3, 3, 4), (40, 60))

    UPSAMPLE = "upsample(logits, self.decoder.stride, size, rows)"
    mistakes = [
        Mistake("`rows` is not looked at: all rows are given",
                {UPSAMPLE: "upsample(logits, self.decoder.stride, size)"},
                loses="rows"),
        Mistake("by 4 whatever the decoder is: its stride says by how much",
                {UPSAMPLE: "upsample(logits, 4, size, rows)"}, loses="coarse"),
        Mistake("what reaches beyond the image is not cut off",
                {UPSAMPLE: "upsample(logits, self.decoder.stride)"
                           "[:, :, slice(*rows or (None,))]"},
                loses="whole rows coarse"),
        Mistake("squeezed into the image's size: enlarge by the whole stride, then cut "
                "(note N8)",
                {UPSAMPLE: "nn.functional.interpolate(logits, size, mode='bilinear')"
                           "[:, :, slice(*rows or (None,))]"},
                loses="whole rows coarse"),
    ]
