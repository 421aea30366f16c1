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
    def rates(deeplabv3plus, *strides):
        """The rates as texts: 6.0 is not 6."""
        return {f"output stride {stride}": [
            str(rate) for rate in deeplabv3plus.atrous_rates(stride)]
            for stride in strides}

    @points(2)
    def dilated(deeplabv3plus):
        """The paper's at output strides 16 and 8, as whole numbers."""
        return atrous_rates.rates(deeplabv3plus, 16, 8)

    @points(2)
    def undilated(deeplabv3plus):
        """Those that see the same stretch of the image at 32."""
        return atrous_rates.rates(deeplabv3plus, 32)

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
        Mistake("the rates are floats: nn.Conv2d wants whole numbers",
                {"32 // output_stride": "32 / output_stride"},
                loses="dilated undilated"),
    ]


class DeepLabv3PlusDecoder_forward:
    def logits(deeplabv3plus, q, r, output_stride=16):
        """Logits of a small decoder, on a context of 3 x 4."""
        decoder = deeplabv3plus.DeepLabv3PlusDecoder(
            6, 5, 3, channels=8, reduced=4, output_stride=output_stride).eval()
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
        """Where self.factor, 4 or 2, does not divide res2's sides, what is too much is
        cut (note N8).
        """
        return {f"output stride {stride}": DeepLabv3PlusDecoder_forward.logits(
            deeplabv3plus, *size, stride) for stride, size in (
                (16, (10, 13)), (8, (5, 7)))}

    UP = "upsample(context, self.factor, low.shape[-2:])"
    mistakes = [
        Mistake("the low-level channels come first: the context does",
                {"[up, low]": "[low, up]"}, loses="values odd_sizes"),
        Mistake("the context is squeezed into res2's size: it is enlarged by the whole "
                "factor and cut, or it is shifted (note N8)",
                {UP: "nn.functional.interpolate(context, low.shape[-2:], "
                     "mode='bilinear')"}, loses="odd_sizes"),
        Mistake("enlarged by 4 whatever the output stride is: self.factor times",
                {UP: UP.replace("self.factor", "4")}, loses="odd_sizes"),
        Mistake("the enlarged context is not cut to the size of res2 (note N8)",
                {UP: "upsample(context, self.factor)"}, loses="odd_sizes"),
        Mistake("res2 is not reduced: all of its channels stand beside the context",
                {'self.reduce(features["res2"])': 'features["res2"]'},
                loses="shape values odd_sizes"),
        Mistake("align_corners=True: here it is False (note N8)",
                {UP: "nn.functional.interpolate(context, low.shape[-2:], "
                     "mode='bilinear', align_corners=True)"},
                loses="values odd_sizes"),
        Mistake("nearest neighbours instead of a bilinear enlargement",
                {UP: "nn.functional.interpolate(context, low.shape[-2:])"},
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


class DeepLabv3PlusDecoder___init__:
    def decoder(deeplabv3plus, **options):
        return deeplabv3plus.DeepLabv3PlusDecoder(6, 5, 3, channels=8, reduced=4,
                                                  **options)

    def parameters(deeplabv3plus, part, **options):
        decoder = DeepLabv3PlusDecoder___init__.decoder(deeplabv3plus, **options)
        return [p.shape for p in getattr(decoder, part).parameters()]

    @points(2)
    def reduce(deeplabv3plus):
        """A 1x1 convolution with norm and ReLU, from res2 to the reduced channels."""
        decoder = DeepLabv3PlusDecoder___init__.decoder(deeplabv3plus)
        out = decoder.reduce(torch.randn(2, 5, 6, 7))
        return {"shapes": [p.shape for p in decoder.reduce.parameters()],
                "out": out.shape, "least": out.min()}

    @points(3)
    def refine(deeplabv3plus):
        """What `refinement` makes: two 3x3, separable or plain, by default."""
        shapes = DeepLabv3PlusDecoder___init__.parameters
        return {f"separable={value}": shapes(deeplabv3plus, "refine", separable=value)
                for value in (True, False)} | {
            "kernels=(3,)": shapes(deeplabv3plus, "refine", kernels=(3,))}

    @points(2)
    def classify(deeplabv3plus):
        """Dropout of whole channels, then a 1x1 with bias (note N4)."""
        decoder = DeepLabv3PlusDecoder___init__.decoder(deeplabv3plus, dropout=0.2)
        dropout, classifier = decoder.classify
        return {"first": type(dropout).__name__, "p": getattr(dropout, "p", 0.0),
                "then": type(classifier).__name__, "kernel": classifier.weight.shape,
                "has a bias": classifier.bias is not None}

    @points(1)
    def strides(deeplabv3plus):
        """`stride`, that of res2, and `factor`, from the context to there."""
        decoders = {f"output stride {stride}": DeepLabv3PlusDecoder___init__.decoder(
            deeplabv3plus, output_stride=stride) for stride in (8, 16)}
        return {name: {"stride": decoder.stride, "factor": decoder.factor}
                for name, decoder in decoders.items()}

    mistakes = [
        Mistake("the first 3x3 reads the context alone: the reduced channels stand "
                "beside it",
                {"refinement(in_channels + reduced,": "refinement(in_channels,"},
                loses="refine"),
        Mistake("the low-level features are not reduced before: the 3x3 reads the few "
                "channels that `reduce` leaves (Sec. 4.1)",
                {"refinement(in_channels + reduced,":
                 "refinement(in_channels + low_channels,"}, loses="refine"),
        Mistake("the low-level features go through a 3x3: a 1x1 reduces them",
                {"conv_bn_relu(low_channels, reduced, 1)":
                 "conv_bn_relu(low_channels, reduced)"}, loses="reduce"),
        Mistake("the 1x1 that reduces res2 has no norm and ReLU: see conv_bn_relu",
                {"conv_bn_relu(low_channels, reduced, 1)":
                 "nn.Conv2d(low_channels, reduced, 1)"}, loses="reduce"),
        Mistake("one 3x3 convolution instead of two (Sec. 4.1)",
                {"channels, kernels, separable)": "channels, kernels[:1], separable)"},
                loses="refine"),
        Mistake("single numbers are dropped: Dropout2d drops whole channels",
                {"nn.Dropout2d(dropout)": "nn.Dropout(dropout)"}, loses="classify"),
        Mistake("there is no dropout before the classifier (note N4)",
                {"nn.Dropout2d(dropout)": "nn.Identity()"}, loses="classify"),
        Mistake("the classifier has no bias: no norm follows it, so it needs one",
                {"num_classes, 1)": "num_classes, 1, bias=False)"}, loses="classify"),
        Mistake("the factor is 4 whatever the output stride is: at 8 it is 2",
                {"output_stride // self.stride": "4"}, loses="strides"),
        Mistake("the context is enlarged by the whole output stride: up to res2 only",
                {"output_stride // self.stride": "output_stride"}, loses="strides"),
    ]


class start_as_mmsegmentation:
    def scale(deeplabv3plus, *convolution, **options):
        """Standard deviation of drawn weights over sqrt(2 / (outputs * 9)), rounded."""
        conv = nn.Conv2d(*convolution, 3, **options)
        deeplabv3plus.start_as_mmsegmentation(nn.Sequential(nn.Sequential(conv)))
        outputs = conv.out_channels
        return round((conv.weight.std() / (2 / (9 * outputs))**0.5).item(), 1)

    @points(3)
    def deviation(deeplabv3plus):
        """Standard deviation over sqrt(2 / fan_out), rounded: it must be 1."""
        return start_as_mmsegmentation.scale(deeplabv3plus, 40, 120, bias=False)

    @points(1)
    def depthwise(deeplabv3plus):
        """fan_out of a depthwise convolution: output channels * kernel area, too."""
        return start_as_mmsegmentation.scale(deeplabv3plus, 900, 900, groups=900,
                                             bias=False)

    @points(1)
    def bell(deeplabv3plus):
        """A normal distribution: 0.27 % of the weights beyond three deviations."""
        conv = nn.Conv2d(40, 120, 3, bias=False)
        deeplabv3plus.start_as_mmsegmentation(conv)
        beyond = (conv.weight.abs() > 3 * conv.weight.std()).float().mean().item()
        return round(100 * beyond / 0.27)

    @points(2)
    def with_bias(deeplabv3plus):
        """A convolution with a bias keeps its weights."""
        conv = nn.Conv2d(4, 5, 3)
        before = conv.weight.clone()
        deeplabv3plus.start_as_mmsegmentation(nn.Sequential(conv))
        return conv.weight - before

    DRAW = """nn.init.kaiming_normal_(conv.weight, mode="fan_out",
                                        nonlinearity="relu")"""
    VARIANCE = "2 / (conv.out_channels * conv.kernel_size[0]**2)"
    mistakes = [
        Mistake("fan_in instead of fan_out",
                {'mode="fan_out"': 'mode="fan_in"'}, loses="deviation depthwise"),
        Mistake("variance 1 / fan_out: the ReLU halves the power, hence the 2",
                {'nonlinearity="relu"': 'nonlinearity="linear"'},
                loses="deviation depthwise"),
        Mistake("the variance is given where the standard deviation is asked for: that "
                "is its root",
                {DRAW: f"nn.init.normal_(conv.weight, std={VARIANCE})"},
                loses="deviation depthwise"),
        Mistake("divided by the groups: fan_out has all output channels here",
                {DRAW: f"nn.init.normal_(conv.weight, std=({VARIANCE} * conv.groups)"
                       "**0.5)"}, loses="depthwise"),
        Mistake("Xavier's rule, which has fan_in in it, too: Kaiming's with fan_out",
                {DRAW: "nn.init.xavier_normal_(conv.weight)"}, loses="deviation"),
        Mistake("cut off at two standard deviations: that is the authors' code, not "
                "mmsegmentation's (note N7)",
                {DRAW: f"std = ({VARIANCE})**0.5; nn.init.trunc_normal_(conv.weight, "
                       "std=std, a=-2 * std, b=2 * std)"},
                loses="deviation depthwise bell"),
        Mistake("drawn from a uniform distribution: the normal one has no border",
                {"kaiming_normal_": "kaiming_uniform_"}, loses="bell"),
        Mistake("convolutions with a bias are drawn, too: those have no batch norm",
                {" and conv.bias is None": ""}, loses="with_bias"),
        Mistake("only direct children are drawn: a part's layers lie deeper, in "
                "modules()",
                {"part.modules()": "part.children()"},
                loses="deviation depthwise bell"),
    ]
