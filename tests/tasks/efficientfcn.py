"""What is asked of the tasks in efficientfcn.py, and how they usually go wrong."""
import torch

from grading import Mistake, gradients, points


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class to_grid:
    @points(2)
    def down(efficientfcn):
        """By 1/2 and 1/4: position i of the result is position 2 i or 4 i of x."""
        x = double(1, 2, 9, 13)
        return {"1/2": efficientfcn.to_grid(x, 1 / 2, (5, 7)),
                "1/4": efficientfcn.to_grid(x, 1 / 4, (3, 4))}

    @points(3)
    def up(efficientfcn):
        """By 2 and 4, to the 2 h - 1 or 4 h - 3 rows that lie between known ones."""
        x = double(1, 2, 3, 4)
        return {"2": efficientfcn.to_grid(x, 2, (5, 7)),
                "4": efficientfcn.to_grid(x, 4, (9, 13))}

    @points(3)
    def beyond(efficientfcn):
        """Rows and columns beyond the last known one repeat it."""
        x = double(1, 2, 3, 4)
        return {"2": efficientfcn.to_grid(x, 2, (6, 8)),
                "4": efficientfcn.to_grid(x, 4, (12, 15))}

    BORDER = "repeat_border(x, step - 1, step - 1)"
    SIZE = "(max(step * (h - 1) + 1, 2), max(step * (w - 1) + 1, 2))"
    MODE = 'mode="bilinear", align_corners=True'
    mistakes = [
        Mistake("align_corners=False: position i belongs on position 4 i, and not half "
                "a cell further (note N7)",
                {"align_corners=True": "align_corners=False"}, loses="up beyond"),
        Mistake("enlarged by the whole factor and cut: a shift of half a cell, for "
                "position i belongs on position 4 i (note N7)",
                {SIZE: "None, step", "align_corners=True": "align_corners=False"},
                loses="up beyond"),
        Mistake("nearest neighbours: the new rows lie between two known ones",
                {MODE: 'mode="nearest"'}, loses="up beyond"),
        Mistake("the map is stretched to the size: h rows have h - 1 gaps, so they "
                "become 4 (h - 1) + 1 rows, and the last one is repeated",
                {SIZE: "(q, r)"}, loses="beyond"),
        Mistake("beyond the last row there are zeros: repeat it",
                {BORDER: "F.pad(x, (0, step - 1, 0, step - 1))"}, loses="beyond"),
        Mistake("downwards, neighbours are averaged: that moves the map by half a "
                "position; a coarse position lies on a fine one",
                {"x[..., ::step, ::step]": "F.avg_pool2d(x, step, ceil_mode=True)"},
                loses="down"),
        Mistake("downwards, the last of the positions is read: read the first",
                {"x[..., ::step, ::step]": "x[..., step - 1::step, step - 1::step]"},
                loses="down"),
    ]


class spatial_softmax:
    @points(3)
    def values(efficientfcn):
        """Of each of the n maps, the weights of all places add up to 1."""
        return efficientfcn.spatial_softmax(double(2, 4, 3, 5))

    @points(1)
    def large(efficientfcn):
        """Numbers in the thousands do not overflow."""
        return efficientfcn.spatial_softmax(1000 * double(2, 4, 3, 5))

    @points(1)
    def gradients(efficientfcn):
        """Of the maps."""
        return gradients(efficientfcn.spatial_softmax, double(2, 4, 3, 5))

    SOFTMAX = "maps.flatten(2).softmax(dim=2).reshape(maps.shape)"
    mistakes = [
        Mistake("softmax over the codewords: Eq. (1) sums over the places (p, q)",
                {SOFTMAX: "maps.softmax(dim=1)"}, loses="values large gradients"),
        Mistake("softmax along the columns only: a codeword distributes 1 over all "
                "places, not over each row",
                {SOFTMAX: "maps.softmax(dim=3)"}, loses="values large gradients"),
        Mistake("softmax along the rows only: a codeword distributes 1 over all "
                "places, not over each column",
                {SOFTMAX: "maps.softmax(dim=2)"}, loses="values large gradients"),
        Mistake("softmax over codewords and places at once: every codeword has a sum "
                "of its own",
                {SOFTMAX: "maps.flatten(1).softmax(dim=1).reshape(maps.shape)"},
                loses="values large gradients"),
        Mistake("the logarithm of the softmax: Eq. (1) has none",
                {".softmax(dim=2)": ".log_softmax(dim=2)"},
                loses="values large gradients"),
        Mistake("exp overflows: take off the largest number first, as torch's softmax "
                "does",
                {SOFTMAX: "maps.exp() / maps.exp().sum((2, 3), keepdim=True)"},
                loses="large"),
    ]


class codebook:
    def inputs():
        return double(2, 4, 3, 5).softmax(1), double(2, 6, 3, 5)

    @points(1)
    def shape(efficientfcn):
        """(B, D, n)."""
        return efficientfcn.codebook(*codebook.inputs()).shape

    @points(3)
    def values(efficientfcn):
        """Codeword i is the sum over all places of weight i times base."""
        return efficientfcn.codebook(*codebook.inputs())

    @points(2)
    def gradients(efficientfcn):
        """Of the weights and of base."""
        return dict(zip(("weighting", "base"), gradients(
            efficientfcn.codebook, *codebook.inputs())))

    mistakes = [
        Mistake("a mean over the places: Eq. (2) is a sum, since the weights add up to "
                "1 already",
                {"torch.bmm(places, shares)": "(places @ shares / (h * w))"},
                loses="values gradients"),
        Mistake("the codewords are transposed: (B, D, n), one a column",
                {"return torch.bmm(places, shares)": "return (places @ shares).mT"},
                loses="shape values gradients"),
        Mistake("reshaped where a transpose is needed: (B, n, D) to (B, D, n)",
                {"return torch.bmm(places, shares)":
                 "return (places @ shares).mT.reshape(B, -1, n)"},
                loses="values gradients"),
        Mistake("a second softmax: the weights come from Eq. (1) and have had theirs",
                {"weighting.flatten(2)": "weighting.flatten(2).softmax(2)"},
                loses="values gradients"),
        Mistake("the places of base are in another order than those of the weights: "
                "both row by row",
                {"base.flatten(2)": "base.mT.flatten(2)"}, loses="values gradients"),
    ]


class assemble:
    def inputs():
        return double(2, 4, 3, 5), double(2, 6, 4)

    @points(1)
    def shape(efficientfcn):
        """(B, D, q, r)."""
        return efficientfcn.assemble(*assemble.inputs()).shape

    @points(3)
    def values(efficientfcn):
        """At each place the sum over all codewords, each times its weight there."""
        return efficientfcn.assemble(*assemble.inputs())

    @points(2)
    def gradients(efficientfcn):
        """Of the weights and of the codewords."""
        return dict(zip(("weights", "codewords"), gradients(
            efficientfcn.assemble, *assemble.inputs())))

    PRODUCT = "torch.bmm(codewords, weights.flatten(2))"
    mistakes = [
        Mistake("a softmax over the codewords: Eq. (3) takes the weights as they are",
                {PRODUCT: f"{PRODUCT}.softmax(1)"}, loses="values gradients"),
        Mistake("the factor n^-0.5 is the caller's: Eq. (3) has none (note N5)",
                {PRODUCT: f"{PRODUCT} * n**-0.5"}, loses="values gradients"),
        Mistake("a mean over the codewords: Eq. (3) is a sum",
                {PRODUCT: f"{PRODUCT} / n"}, loses="values gradients"),
        Mistake("reshaped where a transpose is needed: (B, q*r, D) to (B, D, q, r)",
                {"mixtures.unflatten(2, (q, r))": "mixtures.mT.reshape(B, -1, q, r)"},
                loses="values gradients"),
        Mistake("rows and columns are exchanged when the places are laid out again",
                {"mixtures.unflatten(2, (q, r))": "mixtures.unflatten(2, (r, q)).mT"},
                loses="values gradients"),
    ]


def small_decoder(efficientfcn, **options):
    """A decoder of few channels, and what it reads of a 75 x 115 image: context and
    features.
    """
    scales = ("res3", "res4", "res5")
    options = {"codebook_scales": scales, "guidance_scales": scales, "transfer": True,
               "compress_e8": True, "conv_up": False} | options
    decoder = efficientfcn.HolisticallyGuidedDecoder(
        {"res3": 4, "res4": 5, "res5": 6}, 3, channels=4, codewords=5,
        codeword_channels=8, double=False, weighting_hidden=0, **options).eval()
    features = {"res3": torch.randn(2, 4, 10, 15), "res4": torch.randn(2, 5, 5, 8),
                "res5": torch.randn(2, 6, 3, 4)}
    return decoder, torch.randn(2, 6, 3, 4), features


class HolisticallyGuidedDecoder_steps:
    def parts(efficientfcn, *names, **options):
        decoder, context, features = small_decoder(efficientfcn, **options)
        steps = decoder.steps(context, features)
        return {name: steps[name] for name in names or steps}

    @points(2)
    def shapes(efficientfcn):
        """m32, m8, base, maps, guidance, weights, codewords, assembled, by name."""
        return {name: x.shape for name, x in sorted(
            HolisticallyGuidedDecoder_steps.parts(efficientfcn).items())}

    @points(2)
    def fusion(efficientfcn):
        """m32 and m8, of the scales, on the grid and after the compression asked for.
        """
        return [HolisticallyGuidedDecoder_steps.parts(
            efficientfcn, "m32", "m8", **options) for options in (
                {}, {"codebook_scales": ("res5",), "guidance_scales": ("res3", "res5"),
                     "grid": "corners", "compress_e8": False})]

    @points(3)
    def codewords(efficientfcn):
        """base, the weighting maps after their softmax (`maps`), and the codewords."""
        return HolisticallyGuidedDecoder_steps.parts(efficientfcn, "base", "maps",
                                                     "codewords")

    @points(2)
    def weights(efficientfcn):
        """The assembly weights, from G plus the mean of the base map; without
        `transfer`, from G alone.
        """
        return {f"transfer={value}": HolisticallyGuidedDecoder_steps.parts(
            efficientfcn, "weights", transfer=value) for value in (True, False)}

    @points(1)
    def guidance(efficientfcn):
        """G, before anything is added to it (note N6)."""
        return HolisticallyGuidedDecoder_steps.parts(efficientfcn, "guidance")

    @points(2)
    def assembled(efficientfcn):
        """f~8 of Eq. (3), times n^-0.5 (note N5)."""
        return HolisticallyGuidedDecoder_steps.parts(efficientfcn, "assembled")

    mistakes = [
        Mistake("the mean of the base map is not added to G: m8 has never seen what "
                "the codewords are made of (Sec. 3.2)",
                {"G + mean": "G"}, loses="weights assembled"),
        Mistake("the largest value of the base map is added to G instead of its mean",
                {"base.mean(dim": "base.amax(dim"}, loses="weights assembled"),
        Mistake("the factor n^-0.5 of the assembled feature is missing (note N5)",
                {"mixture * n**-0.5": "mixture"}, loses="assembled"),
        Mistake("divided by n: the factor is n^-0.5 (note N5)",
                {"mixture * n**-0.5": "mixture / n"}, loses="assembled"),
        Mistake("`guidance` is G plus the mean: what is concatenated later is G "
                "alone (note N6)",
                {'"guidance": G,': '"guidance": G_bar,'}, loses="guidance"),
        Mistake("the weighting maps have had no softmax, Eq. (1)",
                {"spatial_softmax(widened(maps))": "widened(maps)"},
                loses="codewords assembled"),
        Mistake("`maps` has had no softmax: it is A~ of Eq. (1)",
                {'"maps": maps,': '"maps": self.weighting(m32),'}, loses="codewords"),
        Mistake("the sum of the base map is added to G instead of its mean",
                {"base.mean(dim": "base.sum(dim"}, loses="weights assembled"),
        Mistake("`transfer` is not looked at: without it, nothing is added to G",
                {"if self.transfer:": "if True:"}, loses="weights"),
        Mistake("self.grid is not handed to `fuse`",
                {"(h, w), grid=self.grid": "(h, w)",
                 "(q, r), grid=self.grid": "(q, r)"},
                loses="fusion"),
        Mistake("codebook_scales is not looked at: m32 has these stages only (Table 2)",
                {"for stage in self.codebook_scales": "for stage in SCALES"},
                loses="fusion"),
        Mistake("guidance_scales is not looked at: m8 has these stages only (Table 3)",
                {"for stage in self.guidance_scales": "for stage in SCALES"},
                loses="fusion"),
        Mistake("every stage is compressed: one without a layer in self.compress comes "
                "as it is (note N3)",
                {"layer(e[stage]) for stage, layer in self.compress.items()":
                 "self.compress[stage](e[stage]) for stage in SCALES"}, loses="fusion"),
        Mistake("m8 begins with the coarsest stage: the order is that of "
                "guidance_scales",
                {"for stage in self.guidance_scales":
                 "for stage in self.guidance_scales[::-1]"},
                loses="fusion weights guidance assembled"),
        Mistake("res5 is read as the encoder gives it: `context` takes its place",
                {'features | {"res5": context}': "features | {}"},
                loses="fusion codewords weights guidance assembled"),
    ]


class HolisticallyGuidedDecoder_forward:
    @points(3)
    def logits(efficientfcn):
        """Of [f~8; G], through conv_up and the classifier: the first of two results."""
        logits = {}
        for value in (False, True):
            decoder, context, features = small_decoder(efficientfcn, conv_up=value)
            logits[f"conv_up={value}"] = decoder(context, features)[0]
        return logits

    @points(1)
    def no_aux(efficientfcn):
        """The second result is an empty list: there are no auxiliary maps."""
        decoder, context, features = small_decoder(efficientfcn)
        result = decoder(context, features)
        return len(result), result[1]

    PAIR = '[assembled, step["guidance"]]'
    mistakes = [
        Mistake("G stands before f~8: f^8 is [f~8; G]",
                {PAIR: '[step["guidance"], assembled]'}, loses="logits"),
        Mistake("f^8 is without G: classes come from f~8, edges from G (note N6)",
                {PAIR: '[assembled, assembled]'}, loses="logits"),
        Mistake("conv_up is left out (Fig. 2)",
                {"self.conv_up(f8)": "f8"}, loses="logits"),
        Mistake("None in the place of the auxiliary maps: it is an empty list",
                {"self.conv_up(f8)), []": "self.conv_up(f8)), None"}, loses="no_aux"),
        Mistake("the logits alone are returned: the result is (logits, [])",
                {"self.conv_up(f8)), []": "self.conv_up(f8))"}, loses="logits no_aux"),
    ]
