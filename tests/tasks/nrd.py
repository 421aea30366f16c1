"""What is asked of the tasks in nrd.py, and how they usually go wrong."""
import torch

from grading import Mistake, gradients, points

WIDTHS = (5, 4, 6, 3)  # of a small g: inputs, two hidden layers, classes


def random_theta(nrd, *grid):
    """theta for WIDTHS: (2, P, *grid), float64. Its length is counted here."""
    length = sum(i * o + o for i, o in zip(WIDTHS, WIDTHS[1:]))
    return torch.randn(2, length, *grid, dtype=torch.float64)


class coordinate_map:
    @points(1)
    def shape(nrd):
        """(2, s, s) for any s, in float32."""
        maps = {f"s = {s}": nrd.coordinate_map(s) for s in (1, 3, 8)}
        return {name: [str(Q.dtype), *Q.shape] for name, Q in maps.items()}

    @points(3)
    def values(nrd):
        """x, then y, of the points at the multiples of 1/s: 0 is one, 1 is not."""
        return {f"s = {s}": nrd.coordinate_map(s) for s in (8, 3)}

    mistakes = [
        Mistake("x and y are swapped: channel 0 must grow along the columns (note N3)",
                {"[x, y]": "[y, x]"}, loses="values"),
        Mistake("1 is among the coordinates: [0 : 1/s : 1] has s values, with the step "
                "1/s, so it ends at 1 - 1/s (Sec. 2.2)",
                {"torch.arange(s) / s": "torch.linspace(0, 1, s)"}, loses="values"),
        Mistake("off by half a point: Q begins at 0, not at 1/(2s) (note N3)",
                {"torch.arange(s) / s": "(torch.arange(s) + 0.5) / s"},
                loses="values"),
        Mistake("the points are numbered, but not divided by s: Q is in [0, 1)",
                {"torch.arange(s) / s": "torch.arange(s)"}, loses="shape values"),
        Mistake("the numbers are float64: the layers that read them know float32 only",
                {"torch.arange(s) / s": "torch.arange(s, dtype=torch.float64) / s"},
                loses="shape"),
        Mistake("from -1 to 1: Q is in [0, 1), from 0 in steps of 1/s (Sec. 2.2)",
                {"torch.arange(s) / s": "torch.arange(s) / s * 2 - 1"},
                loses="values"),
        Mistake("the coordinates are the last dimension: they are channels, (2, s, s)",
                {"torch.stack([x, y])": "torch.stack([x, y], -1)"},
                loses="shape values"),
    ]


class theta_length:
    @points(2)
    def published(nrd):
        """899 for Cityscapes' 19 classes, as Sec. 2.2 prints it; 643 without m."""
        return [nrd.theta_length((18, 16, 16, 19)), nrd.theta_length((2, 16, 16, 19))]

    @points(2)
    def any_widths(nrd):
        """A chain of any length and any widths."""
        chains = [torch.randint(1, 30, (n,)).tolist() for n in (2, 3, 5)]
        return [nrd.theta_length(tuple(widths)) for widths in chains]

    mistakes = [
        Mistake("the biases are missing: each layer has one per output",
                {"fan_in * fan_out + fan_out": "fan_in * fan_out"},
                loses="published any_widths"),
        Mistake("as many biases as inputs: a layer has one bias per output",
                {"fan_in * fan_out + fan_out": "fan_in * fan_out + fan_in"},
                loses="published any_widths"),
        Mistake("the last layer is not counted: it has weights and biases, too",
                {"zip(widths, widths[1:])": "zip(widths, widths[1:-1])"},
                loses="published any_widths"),
    ]


class split_theta:
    @points(2)
    def sizes(nrd):
        """Per layer a weight (N, out, in) and a bias (N, out, 1)."""
        layers = nrd.split_theta(random_theta(nrd), WIDTHS)
        return [part.shape for layer in layers for part in layer]

    @points(3)
    def weights(nrd):
        """Of layer after layer, each stored as [output][input] (note N4)."""
        layers = nrd.split_theta(random_theta(nrd), WIDTHS)
        return {f"layer {i + 1}": weight for i, (weight, _) in enumerate(layers)}

    @points(3)
    def biases(nrd):
        """Each layer's biases follow its weights (note N4)."""
        layers = nrd.split_theta(random_theta(nrd), WIDTHS)
        return {f"layer {i + 1}": bias.flatten(1) for i, (_, bias) in enumerate(layers)}

    mistakes = [
        Mistake("the weights are read as [input][output]: an output's come one after "
                "the other (note N4)",
                {".unflatten(1, (fan_out, fan_in))":
                 ".unflatten(1, (fan_in, fan_out)).mT"}, loses="weights"),
        Mistake("the biases of a layer are read before its weights (note N4)",
                {"theta[:, start:end]": "theta[:, start + fan_out:end + fan_out]",
                 "theta[:, end:end + fan_out]": "theta[:, start:start + fan_out]"},
                loses="weights biases"),
        Mistake("all weights, then all biases: theta goes layer by layer (note N4)",
                {"theta[:, end:end + fan_out]":
                 "theta[:, theta.shape[1] - sum(widths[len(layers) + 1:]):]"
                 "[:, :fan_out]",
                 "start = end + fan_out": "start = end"}, loses="weights biases"),
        Mistake("the next layer begins at this one's biases: step over them, too",
                {"start = end + fan_out": "start = end"}, loses="weights biases"),
        Mistake("the biases are (N, out): without a last dimension of 1 they cannot be "
                "added to (N, out, s*s)",
                {".unsqueeze(2)": ""}, loses="sizes"),
    ]


class to_cells:
    @points(2)
    def shape(nrd):
        """(N, I, s*s), one row per cell."""
        return nrd.to_cells(torch.randn(2, 3, 6, 8), 2).shape

    @points(4)
    def values(nrd):
        """Cells image by image, row by row; and inside a cell, points row by row."""
        return nrd.to_cells(torch.randn(2, 3, 6, 9), 3)

    mistakes = [
        Mistake("no cell is cut: reshape alone deals out whole rows; h and w must "
                "first be brought before the channels",
                {"x.permute(0, 2, 4, 1, 3, 5)": "x"}, loses="values"),
        Mistake("the points of a cell are transposed: rows first, then columns",
                {"x.permute(0, 2, 4, 1, 3, 5)": "x.permute(0, 2, 4, 1, 5, 3)"},
                loses="values"),
        Mistake("the cells are numbered column by column: rows first",
                {"x.permute(0, 2, 4, 1, 3, 5)": "x.permute(0, 4, 2, 1, 3, 5)"},
                loses="values"),
        Mistake("a cell takes every h-th row: its s rows are neighbours, so the rows "
                "split into (h, s) and not into (s, h)",
                {"x.reshape(B, I, h, s, w, s)": "x.reshape(B, I, s, h, s, w)",
                 "x.permute(0, 2, 4, 1, 3, 5)": "x.permute(0, 3, 5, 1, 2, 4)"},
                loses="values"),
        Mistake("the channels are mixed: those of F.unfold are I blocks of s*s numbers",
                {"in_order(x).view(B * h * w, I, s * s)":
                 "x.reshape(B * h * w, s * s, I).mT"},
                loses="values"),
        Mistake("the images alternate: all cells of the first image come first",
                {"x.permute(0, 2, 4, 1, 3, 5)": "x.permute(2, 4, 0, 1, 3, 5)"},
                loses="values"),
    ]


class from_cells:
    @points(1)
    def shape(nrd):
        """(B, K, s*h, s*w), when h is not w."""
        return nrd.from_cells(torch.randn(12, 3, 4), 2, 2, 3).shape

    @points(3)
    def values(nrd):
        """Every cell in its place: the inverse of to_cells."""
        return nrd.from_cells(torch.randn(12, 3, 4), 2, 2, 3)

    mistakes = [
        Mistake("the points of a cell are transposed: rows first, then columns",
                {"x.permute(0, 3, 1, 4, 2, 5)": "x.permute(0, 3, 1, 5, 2, 4)"},
                loses="values"),
        Mistake("the cells are laid out column by column: rows first",
                {"x.reshape(B, h, w, K, s, s)": "x.reshape(B, w, h, K, s, s)",
                 "x.permute(0, 3, 1, 4, 2, 5)": "x.permute(0, 3, 2, 4, 1, 5)"},
                loses="values"),
        Mistake("no cell is put together: reshape alone strings their points up; h and "
                "s, w and s must stand side by side first",
                {"x.permute(0, 3, 1, 4, 2, 5)": "x"}, loses="values"),
        Mistake("the points of a cell are spread over the map: h comes before s, or "
                "every cell would take every h-th row",
                {"x.permute(0, 3, 1, 4, 2, 5)": "x.permute(0, 3, 4, 1, 5, 2)"},
                loses="values"),
    ]


class represent:
    def inputs(nrd):
        theta = random_theta(nrd, 2, 3)
        return theta, torch.randn(2, WIDTHS[0], 6, 9, dtype=torch.float64)

    @points(1)
    def shape(nrd):
        """(B, K, s*h, s*w), when h is not w."""
        return nrd.represent(*represent.inputs(nrd), widths=WIDTHS).shape

    @points(5)
    def values(nrd):
        """Every point has the logits that its own cell's network gives there."""
        return nrd.represent(*represent.inputs(nrd), widths=WIDTHS)

    @points(4)
    def gradients(nrd):
        """Of theta and of the inputs."""
        return dict(zip(("theta", "inputs"), gradients(
            lambda theta, x: nrd.represent(theta, x, widths=WIDTHS),
            *represent.inputs(nrd))))

    @points(2)
    def one_layer(nrd):
        """A g of a single layer is linear."""
        theta = torch.randn(1, 5 * 3 + 3, 2, 2)
        return nrd.represent(theta, torch.randn(1, 5, 4, 4), widths=(5, 3))

    mistakes = [
        Mistake("a ReLU follows the last layer: it gives logits, which may be negative "
                "(Fig. 3 (b))",
                {"depth < len(layers) - 1": "True"},
                loses="values gradients one_layer"),
        Mistake("there is no ReLU between the layers: so g is linear",
                {"depth < len(layers) - 1": "False"}, loses="values gradients"),
        Mistake("the biases are not added",
                {"torch.bmm(weight, x).add_(bias)": "weight @ x"},
                loses="values gradients one_layer"),
        Mistake("cells get the theta of others: theta's locations are taken column by "
                "column, the cells row by row",
                {"theta.permute(0, 2, 3, 1)": "theta.permute(0, 3, 2, 1)"},
                loses="values gradients one_layer"),
        Mistake("theta is reshaped without bringing its channels to the end: a cell's "
                "P numbers are mixed with those of others",
                {"in_order(theta.permute(0, 2, 3, 1)).view(N, P)":
                 "theta.reshape(N, P)"},
                loses="values gradients one_layer"),
        Mistake("theta gets no gradient: is there a .detach(), .data or .item()?",
                {"(theta.permute": "(theta.detach().permute"},
                loses="gradients"),
        Mistake("the inputs of g go through a ReLU: it stands between the layers only",
                {"to_cells(inputs, s)": "to_cells(inputs, s).relu()"},
                loses="values gradients one_layer"),
        Mistake("a sigmoid between the layers: it is a ReLU",
                {"x.relu_()": "x.sigmoid()"}, loses="values gradients"),
    ]


class NRDDecoder_fit:
    def fitted(nrd, q, r, h, w, at=8):
        """fit() of a random map (1, 2, q, r), with `at` points per side of a cell."""
        decoder = nrd.NRDDecoder(
            4, 3, 5, controller_channels=4, hidden_channels=4, guidance_channels=2,
            guidance=True, coordinates=True, standardise=False, points=at, init="mlp")
        return decoder.fit(torch.randn(1, 2, q, r), h, w)

    @points(1)
    def whole_cells(nrd):
        """A map that 8 divides stays as it is."""
        return NRDDecoder_fit.fitted(nrd, 16, 24, 2, 3)

    @points(4)
    def any_size(nrd):
        """Else every position stays in its place, and the border is repeated."""
        return {f"{q} x {r} positions": NRDDecoder_fit.fitted(nrd, q, r, 2, 3)
                for q, r in ((13, 23), (9, 17))}

    @points(2)
    def other_points(nrd):
        """With s = 4 or 16 points per side of a cell, whole cells are resized to them.
        """
        return {f"s = {s}": NRDDecoder_fit.fitted(nrd, 13, 23, 2, 3, s)
                for s in (4, 16)}

    BORDER = "repeat_border(m, side * h - q, side * w - r)"
    mistakes = [
        Mistake("the guidance is slid under the cells: resizing the map to whole cells "
                "moves it by up to 7 positions (note N9)",
                {BORDER: "F.interpolate(m, (self.points * h, self.points * w), None, "
                         "'bilinear')", "self.points != side": "False"},
                loses="any_size other_points"),
        Mistake("what is missing is filled with zeros: the last row and column are "
                "repeated (note N9)",
                {BORDER: "F.pad(m, (0, side * w - r, 0, side * h - q))"},
                loses="any_size other_points"),
        Mistake("what is missing is added above and on the left: that moves every "
                "position (note N9)",
                {BORDER: "F.pad(m, (side * w - r, 0, side * h - q, 0), "
                         "mode='replicate')"}, loses="any_size other_points"),
        Mistake("the map is resized before its border is repeated: where 8 does not "
                "divide its sides, that moves it; fill up the cells first (note N9)",
                {BORDER: "repeat_border(n := F.interpolate(m, None, self.points / side,"
                         " 'bilinear'), self.points * h - n.shape[2], self.points * w "
                         "- n.shape[3])", "self.points != side": "False"},
                loses="other_points"),
        Mistake("the border is repeated up to s*h instead of 8*h: a cell is 8 x 8 "
                "positions; only then are whole cells resized",
                {BORDER: "repeat_border(m, self.points * h - q, self.points * w - r)",
                 "self.points != side": "False"}, loses="other_points"),
        Mistake("a mean over areas instead of a bilinear resize",
                {'mode="bilinear"': 'mode="area"'}, loses="other_points"),
        Mistake("nearest neighbours instead of a bilinear resize",
                {'mode="bilinear"': 'mode="nearest"'}, loses="other_points"),
        Mistake("align_corners=True: cells are areas, so borders lie on borders",
                {'mode="bilinear"': 'mode="bilinear", align_corners=True'},
                loses="other_points"),
        Mistake("the map has 8 points per side of a cell whatever s is",
                {"self.points != side": "False"}, loses="other_points"),
    ]
