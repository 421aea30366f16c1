"""What is asked of the tasks in sfnet.py, and how they usually go wrong."""
import torch

from grading import Mistake, gradients, points


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class enlarge:
    @points(2)
    def twice(sfnet):
        """From n rows to 2n - 1: position i goes to 2i (note N3)."""
        return sfnet.enlarge(double(2, 3, 4, 5), (7, 9))

    @points(2)
    def any_size(sfnet):
        """Corners on corners for any other size."""
        return sfnet.enlarge(double(2, 3, 4, 5), (8, 11))

    @points(1)
    def strip(sfnet):
        """rows = (2, 6): these four rows of the result alone."""
        return sfnet.enlarge(torch.randn(2, 3, 4, 5), (8, 11), (2, 6))

    MODE = 'mode="bilinear", align_corners=True'
    mistakes = [
        Mistake("align_corners=False: corners belong on corners (note N3)",
                {MODE: 'mode="bilinear"'}, loses="twice any_size strip"),
        Mistake("nearest neighbours instead of bilinear",
                {MODE: 'mode="nearest"'}, loses="twice any_size strip"),
        Mistake("`rows` is not looked at: all rows are given",
                {"if rows:": "if False:"}, loses="strip"),
        Mistake("a strip's rows are half a pixel off: row y is y (h-1) / (q-1)",
                {"y * (h - 1) / max(q - 1, 1)": "(y + 0.5) * h / q - 0.5"},
                loses="strip"),
    ]


class source_points:
    @points(1)
    def shape(sfnet):
        """(B, 2, q, r)."""
        return sfnet.source_points(double(2, 2, 5, 7), (3, 4)).shape

    @points(2)
    def zero_flow(sfnet):
        """Without flow, position 2i comes from position i; x before y."""
        return sfnet.source_points(torch.zeros(1, 2, 5, 7), (3, 4))

    @points(3)
    def flow(sfnet):
        """p_l = (p + flow(p)) / 2."""
        return sfnet.source_points(3 * double(2, 2, 5, 7), (3, 4))

    @points(2)
    def other_sizes(sfnet):
        """Where q is not 2h - 1, the last position still comes from the last."""
        return sfnet.source_points(3 * double(2, 2, 6, 9), (3, 4))

    X = "x * (w - 1) / max(r - 1, 1)"
    Y = "y * (h - 1) / max(q - 1, 1)"
    mistakes = [
        Mistake("x and y are swapped: channel 0 of p_l is x, along the columns",
                {f"[{X}, {Y}]": f"[{Y}, {X}]"}, loses="zero_flow flow other_sizes"),
        Mistake("the flow's channels are swapped: channel 0 moves along x",
                {"columns + flow[:, 0]": "columns + flow[:, 1]",
                 "rows + flow[:, 1]": "rows + flow[:, 0]"}, loses="flow other_sizes"),
        Mistake("only the position is halved: Eq. (2) halves p + flow, a flow of 1 is "
                "one pixel of the finer map (note N2)",
                {X: "columns * (w - 1) / max(r - 1, 1) + flow[:, 0]",
                 Y: "rows * (h - 1) / max(q - 1, 1) + flow[:, 1]"},
                loses="flow other_sizes"),
        Mistake("the flow is taken off instead of added",
                {"columns + flow[:, 0]": "columns - flow[:, 0]",
                 "rows + flow[:, 1]": "rows - flow[:, 1]"}, loses="flow other_sizes"),
        Mistake("the flow is taken off along x: Eq. (2) adds it along both directions",
                {"columns + flow[:, 0]": "columns - flow[:, 0]"},
                loses="flow other_sizes"),
        Mistake("the points are clamped to the map: what lies outside counts as zero "
                "in Eq. (3), and is not moved (note N4)",
                {X: f"({X}).clamp(0, w - 1)", Y: f"({Y}).clamp(0, h - 1)"},
                loses="flow other_sizes"),
        Mistake("a plain half: where q is not 2h - 1 it misses the far corner (note "
                "N5)",
                {X: "x / 2", Y: "y / 2"}, loses="other_sizes"),
        Mistake("scaled by w / r: with corners on corners it is (w - 1) / (r - 1)",
                {X: "x * w / r", Y: "y * h / q"}, loses="zero_flow flow other_sizes"),
    ]


class sample:
    def inputs(low, high):
        """A map (2, 3, 4, 6) and points whose coordinates are shares of its sides."""
        share = low + (high - low) * torch.rand(2, 2, 7, 9, dtype=torch.float64)
        return double(2, 3, 4, 6), share * torch.tensor([5.0, 3.0])[:, None, None]

    @points(4)
    def inside(sfnet):
        """The four neighbours of a point, weighted; the near weigh more."""
        return sfnet.sample(*sample.inputs(0, 1))

    @points(2)
    def outside(sfnet):
        """Neighbours outside the map are zero (note N4)."""
        return sfnet.sample(*sample.inputs(-0.4, 1.4))

    @points(3)
    def gradients(sfnet):
        """Of the map and of the points."""
        return dict(zip(("coarse", "points"), gradients(
            sfnet.sample, *sample.inputs(0.01, 0.99))))

    X = "2 * x / max(w - 1, 1) - 1"
    Y = "2 * y / max(h - 1, 1) - 1"
    mistakes = [
        Mistake("x and y are swapped: channel 0 of the points is x",
                {"x, y = points": "y, x = points"}, loses="inside outside gradients"),
        Mistake("the grid has y before x: grid_sample wants x, then y",
                {f"[{X}, {Y}]": f"[{Y}, {X}]"}, loses="inside outside gradients"),
        Mistake("the grid has y before x, also with align_corners=False: x, then y",
                {f"[{X}, {Y}]": "[(2 * y + 1) / h - 1, (2 * x + 1) / w - 1]",
                 "align_corners=True": "align_corners=False"},
                loses="inside outside gradients"),
        Mistake("the points are not normalised: grid_sample runs from -1 to 1",
                {X: "x", Y: "y"}, loses="inside outside gradients"),
        Mistake("normalised to 0 .. 1: grid_sample runs from -1 to 1",
                {X: "x / max(w - 1, 1)", Y: "y / max(h - 1, 1)"},
                loses="inside outside gradients"),
        Mistake("normalised by the size of the fine map: the points are pixels of the "
                "coarse one",
                {"max(w - 1, 1)": "(points.shape[-1] - 1)",
                 "max(h - 1, 1)": "(points.shape[-2] - 1)"},
                loses="inside outside gradients"),
        Mistake("the points get no gradient: is there a .detach(), .data or .item()?",
                {"points.unbind": "points.detach().unbind"}, loses="gradients"),
        Mistake("align_corners=False: -1 and 1 are the centres of the first and of the "
                "last pixel (note N3)",
                {"align_corners=True": "align_corners=False"},
                loses="inside outside gradients"),
        Mistake("divided by w, h instead of w - 1, h - 1: the last pixel is at w - 1",
                {"max(w - 1, 1)": "w", "max(h - 1, 1)": "h"},
                loses="inside outside gradients"),
        Mistake("the border is repeated: neighbours outside are zero (note N4)",
                {'padding_mode="zeros"': 'padding_mode="border"'}, loses="outside"),
        Mistake("only the nearest neighbour is read: so the flow gets no gradient",
                {'padding_mode="zeros"': 'padding_mode="zeros", mode="nearest"'},
                loses="inside outside gradients"),
    ]


class warp:
    @points(2)
    def zero_flow(sfnet):
        """Plain enlargement with corners on corners."""
        return sfnet.warp(double(2, 3, 4, 6), torch.zeros(2, 2, 7, 11).double())

    @points(2)
    def flow(sfnet):
        """The coarse map at p + flow(p)."""
        return sfnet.warp(double(2, 3, 4, 6), 2 * double(2, 2, 7, 11))

    @points(1)
    def gradients(sfnet):
        """Of the map and of the flow."""
        return dict(zip(("coarse", "flow"), gradients(
            sfnet.warp, double(2, 3, 4, 6), double(2, 2, 7, 11))))

    SAMPLE = "sample(coarse, source_points(flow, coarse.shape[-2:]))"
    mistakes = [
        Mistake("the flow points the other way: features are fetched from p + flow(p)",
                {"source_points(flow,": "source_points(-flow,"},
                loses="flow gradients"),
        Mistake("the flow is not used: this is plain enlargement",
                {SAMPLE: "enlarge(coarse, flow.shape[-2:])"}, loses="flow gradients"),
        Mistake("the flow itself is sampled at: it is where to go from here, and "
                "`source_points` makes points of it, Eq. (2)",
                {SAMPLE: "sample(coarse, flow)"}, loses="zero_flow flow gradients"),
        Mistake("the enlarged map is warped: interpolated twice, it is blurred",
                {SAMPLE: "sample(enlarge(coarse, flow.shape[-2:]), "
                         "source_points(flow, flow.shape[-2:]))"},
                loses="flow gradients"),
        Mistake("the coarse map's width and height are exchanged: size is (h, w)",
                {"coarse.shape[-2:]": "coarse.shape[:-3:-1]"},
                loses="zero_flow flow gradients"),
        Mistake("the points are positions of the fine map: Eq. (2) brings them to the "
                "coarse one",
                {"coarse.shape[-2:]": "flow.shape[-2:]"},
                loses="zero_flow flow gradients"),
    ]


class correlation:
    @points(1)
    def shape(sfnet):
        """(B, (2*reach + 1)^2, q, r)."""
        maps = torch.randn(2, 2, 3, 4, 5)
        return [sfnet.correlation(*maps, reach=reach).shape for reach in (0, 2)]

    @points(4)
    def inside(sfnet):
        """The mean over channels of coarse(p + o) times fine(p), offsets row by row."""
        return sfnet.correlation(double(2, 3, 5, 6), double(2, 3, 5, 6),
                                 reach=1)[..., 1:-1, 1:-1]

    @points(2)
    def border(sfnet):
        """Zero where p + o is outside the map."""
        return sfnet.correlation(double(2, 3, 5, 6), double(2, 3, 5, 6), reach=2)

    PAD = "F.pad(coarse, (reach,) * 4)"
    mistakes = [
        Mistake("a sum over the channels: it is their mean",
                {".mean(dim=1)": ".sum(dim=1)"}, loses="inside border"),
        Mistake("the offsets go column by column: row by row, x runs fastest",
                {"for y in range(side) for x in range(side)":
                 "for x in range(side) for y in range(side)"}, loses="inside border"),
        Mistake("the offsets have the wrong sign: coarse is looked at in p + o",
                {"torch.stack(scores,": "torch.stack(scores[::-1],"},
                loses="inside border"),
        Mistake("the maps are exchanged: coarse is moved, fine stays",
                {"F.pad(coarse": "F.pad(fine", "* fine)": "* coarse)"},
                loses="inside border"),
        Mistake("the map goes on at its other side: outside it is zero",
                {PAD: 'F.pad(coarse, (reach,) * 4, mode="circular")'}, loses="border"),
        Mistake("the border is repeated: outside the map it is zero",
                {PAD: 'F.pad(coarse, (reach,) * 4, mode="replicate")'},
                loses="border"),
    ]


class FAM_forward:
    def aligned(sfnet, scale=3.0, **options):
        """A FAM with flows of some pixels, on a map (2, 4, 4, 5) and a finer one."""
        fam = sfnet.FAM(4, **options)
        with torch.no_grad():
            fam.flow.weight *= scale
        return fam(torch.randn(2, 4, 4, 5), torch.randn(2, 4, 7, 9))

    @points(4)
    def values(sfnet):
        """The coarse map, warped by the flow that both reduced maps give."""
        return FAM_forward.aligned(sfnet)

    @points(2)
    def zero_flow(sfnet):
        """With a flow convolution of zeros: the enlarged coarse map."""
        return FAM_forward.aligned(sfnet, 0.0)

    @points(2)
    def options(sfnet):
        """Other ways of Table 2: the unit of the flow (note N2), self.up, self.match.
        """
        return {name: FAM_forward.aligned(sfnet, **{name: value}) for name, value in (
            ("flow_unit", "released"), ("upsampling", "deconv"), ("reach", 1))}

    mistakes = [
        Mistake("the reduced map is warped: it only serves to predict the flow; what "
                "is warped is the coarse map itself (Fig. 3 (a))",
                {"warp(widened(coarse)": "warp(self.reduce_coarse(coarse)"},
                loses="values zero_flow options"),
        Mistake("the maps are concatenated the wrong way round: coarse first, Eq. (1)",
                {"predict_flow(coarse_code, fine_code":
                 "predict_flow(fine_code, coarse_code"}, loses="values options"),
        Mistake("the two 1x1 convolutions are exchanged",
                {"self.reduce_fine(fine)": "self.reduce_coarse(fine)",
                 "self.reduce_coarse(coarse)": "self.reduce_fine(coarse)"},
                loses="values options"),
        Mistake("the enlarged map is warped: interpolated twice, it is blurred",
                {"warp(widened(coarse)": "warp(enlarge(coarse, (q, r))"},
                loses="values options"),
        Mistake("the unit of the flow is not looked at (note N2, in_pixels)",
                {"in_pixels(widened(flow), self.flow_unit)": "widened(flow)"},
                loses="options"),
        Mistake("self.up is not called: it may be a deconvolution (Table 2 (a))",
                {"self.up(self.reduce": "enlarge(self.reduce"}, loses="options"),
        Mistake("enlarged before it is reduced: self.up knows the reduced channels "
                "only (Table 2 (a))",
                {"self.up(self.reduce_coarse(coarse), (q, r))":
                 "self.reduce_coarse(self.up(coarse, (q, r)))"}, loses="options"),
        Mistake("self.match is not handed to predict_flow (Table 2 (c))",
                {"match=self.match": "match=concatenate"}, loses="options"),
        Mistake("the fine map is added here, too: the pyramid does that",
                {"aligned = warp(": "aligned = fine + warp("},
                loses="values zero_flow options"),
    ]


class AlignedFPN_top_down:
    def sums(sfnet):
        stages = {"res4": 5, "res3": 4, "res2": 3}
        pyramid = sfnet.AlignedFPN(stages, 6, 3, {stage: sfnet.FAM(6)
                                                  for stage in stages}).eval()
        features = {"res4": torch.randn(2, 5, 5, 7), "res3": torch.randn(2, 4, 9, 13),
                    "res2": torch.randn(2, 3, 17, 25)}
        return pyramid.top_down(torch.randn(2, 6, 3, 4), features)

    @points(2)
    def shapes(sfnet):
        """A list of one sum per stage, the coarsest first."""
        return [x.shape for x in AlignedFPN_top_down.sums(sfnet)]

    @points(2)
    def first(sfnet):
        """The lateral of the coarsest stage, plus the context on its grid."""
        return AlignedFPN_top_down.sums(sfnet)[0]

    @points(4)
    def finer(sfnet):
        """Each finer sum builds on the one before as it is (note N7)."""
        return dict(zip(("res3", "res2"), AlignedFPN_top_down.sums(sfnet)[1:]))

    SUM = "fine + self.align[stage](coarse, fine)"
    mistakes = [
        Mistake("the 3x3 convolution lies on the way down: the next sum builds on this "
                "one without it (note N7)",
                {SUM: f"self.smooth[stage]({SUM})"}, loses="first finer"),
        Mistake("the sums are returned after their 3x3 convolutions: `forward` applies "
                "these (note N7)",
                {"sums.append(coarse)": "sums.append(self.smooth[stage](coarse))"},
                loses="first finer"),
        Mistake("every stage adds the context: it adds the sum before",
                {"self.align[stage](coarse, fine)": "self.align[stage](context, fine)"},
                loses="finer"),
        Mistake("self.align is not called: plain enlargement ignores every FAM",
                {"self.align[stage](coarse, fine)": "enlarge(coarse, fine.shape[-2:])"},
                loses="first finer"),
        Mistake("self.align gets the encoder's map: it wants the lateral's output, "
                "which is as wide as the coarser sum",
                {"self.align[stage](coarse, fine)":
                 "self.align[stage](coarse, features[stage])"},
                loses="shapes first finer"),
        Mistake("the coarser sum is not added",
                {SUM: "fine"}, loses="first finer"),
        Mistake("a mean of the two maps: it is their sum (Sec. 3.3)",
                {SUM: f"({SUM}) / 2"}, loses="first finer"),
        Mistake("the finest sum comes first: the coarsest must",
                {"return sums": "return sums[::-1]"}, loses="shapes first finer"),
    ]
