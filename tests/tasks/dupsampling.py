"""What is asked of the tasks in dupsampling.py, and how they usually go wrong."""
import torch

from grading import Mistake, gradients, points


def random_labels(*size, classes=3, void=0.1):
    """uint8 labels with ignored pixels."""
    labels = torch.randint(classes, size, dtype=torch.uint8)
    labels[torch.rand(size) < void] = 255
    return labels


class windows:
    @points(2)
    def shape(dupsampling):
        """A row of r*r labels for each window, also those that reach past the border.
        """
        return [dupsampling.windows(random_labels(*size), 4).shape
                for size in ((8, 12), (9, 14))]

    @points(2)
    def whole(dupsampling):
        """Window by window, row by row; and inside a window, pixels row by row."""
        return dupsampling.windows(random_labels(8, 12), 4)

    @points(2)
    def border(dupsampling):
        """Where r does not divide the sides, 255 is added below and on the right."""
        return dupsampling.windows(random_labels(9, 14), 4)

    PAD = "(0, w * r - W, 0, h * r - H)"
    mistakes = [
        Mistake("no window is cut: reshape alone takes r*r pixels of a row; the row of "
                "windows and the column of windows must come first",
                {".permute(0, 2, 1, 3)": ""}, loses="whole border"),
        Mistake("the windows are numbered column by column: rows first",
                {".permute(0, 2, 1, 3)": ".permute(2, 0, 1, 3)"}, loses="whole border"),
        Mistake("the pixels of a window are transposed: rows first, then columns",
                {".permute(0, 2, 1, 3)": ".permute(0, 2, 3, 1)"}, loses="whole border"),
        Mistake("padded with class 0: what lies beyond the image has no label, 255",
                {"value=255": "value=0"}, loses="border"),
        Mistake("windows at the border are left out: math.ceil, not a floor",
                {"math.ceil(H / r), math.ceil(W / r)": "H // r, W // r"},
                loses="shape border"),
        Mistake("a window too many where r divides the sides: nothing is missing there",
                {"math.ceil(H / r), math.ceil(W / r)": "H // r + 1, W // r + 1"},
                loses="shape whole"),
        Mistake("padded above and on the left, so that all windows are moved",
                {PAD: "(w * r - W, 0, h * r - H, 0)"}, loses="border"),
    ]


class principal_components:
    def fitted(dupsampling):
        """W, mean, lost of small labels, and their v (M, N) in float64, one by one."""
        maps = []
        for _ in range(6):
            labels = torch.zeros(9, 12, dtype=torch.uint8)
            for _ in range(4):
                y, x = torch.randint(9, (2,)).tolist()
                labels[y:y + 4, x:x + 5] = torch.randint(3, ()).item()
            labels[torch.rand(9, 12) < 0.03] = 255
            maps.append(labels)
        rows = []
        for labels in maps:
            padded = torch.full((10, 12), 255, dtype=torch.uint8)
            padded[:9] = labels
            for top in range(0, 10, 2):
                for left in range(0, 12, 2):
                    window = padded[top:top + 2, left:left + 2]
                    rows.append(torch.stack([window == k for k in range(3)]).flatten())
        # E is half of N, so that every way with spare vectors is exact.
        W, mean, lost = dupsampling.principal_components(maps, 3, ratio=2, components=6)
        return W, mean, lost, torch.stack(rows).double()

    def exact(v):
        """All eigenvalues of the covariance of v, the largest first."""
        return torch.linalg.eigvalsh(v.T.cov(correction=0)).flip(0)

    @points(1)
    def sizes(dupsampling):
        """W (N, E), the mean (N,)."""
        W, mean, _, _ = principal_components.fitted(dupsampling)
        return W.shape, mean.shape

    @points(3)
    def mean(dupsampling):
        """The mean of v over all windows."""
        return principal_components.fitted(dupsampling)[1]

    @points(2)
    def orthonormal(dupsampling):
        """W^T W is the unit matrix."""
        W = principal_components.fitted(dupsampling)[0]
        return W.T @ W

    @points(5)
    def directions(dupsampling):
        """The variance of v along W's columns: the E largest eigenvalues, in order. Q
        has a few more vectors than E, and Q^T C Q rotates it in the end.
        """
        W, _, _, v = principal_components.fitted(dupsampling)
        found = ((v - v.mean(0)) @ W.double()).var(0, correction=0)
        wanted = principal_components.exact(v)[:6]
        same = torch.allclose(found.sort(descending=True).values, wanted, rtol=1e-3)
        near = 0.9 < found.sum() / wanted.sum() < 1.0001 and not same
        return "close, but not converged" if near else found

    @points(3)
    def lost(dupsampling):
        """The share of the variance that is in none of the E directions, a float."""
        _, _, lost, v = principal_components.fitted(dupsampling)
        values = principal_components.exact(v)
        least = (values[6:].sum() / values.sum()).item()
        near = 1.01 * least < lost < 2 * least
        return "close, but not converged" if near else lost

    mistakes = [
        Mistake("the vectors are not centred: the covariance is E[v v^T] minus the "
                "mean's own product (note N2)",
                {"product / count - torch.outer(mean, mean @ Q)": "product / count"},
                loses="directions lost"),
        Mistake("not converged: take a few more vectors than E (E + 16, at most N), "
                "and in the end the eigenvectors of Q^T C Q",
                {"min(2 * components, N)": "components"}, loses="directions lost"),
        Mistake("the columns of W are in ascending order: the largest comes first",
                {"return W, mean": "return W.flip(1), mean"}, loses="directions"),
        Mistake("the smallest eigenvalues are taken: eigh sorts ascending",
                {"turn.flip(1)[:, :components]": "turn[:, :components]"},
                loses="directions"),
        Mistake("the share that is kept is returned, not the one that is lost",
                {"lost = 1 - ": "lost = "}, loses="lost"),
        Mistake("equal windows count once: `vectors` merges them and gives their "
                "number as weight",
                {"(weight[:, None] * (v @ Q))": "(v @ Q)",
                 "columns @ weight": "columns @ torch.ones_like(weight)",
                 "int(weight.sum())": "len(weight)"}, loses="mean directions lost"),
        Mistake("the columns are as long as the standard deviation along them: W is "
                "to be orthonormal",
                {"turn.flip(1)[:, :components]":
                 "(turn * values.clamp(min=0).sqrt()).flip(1)[:, :components]"},
                loses="orthonormal directions"),
        Mistake("W is transposed: (N, E), a column per direction",
                {"Q @ turn.flip(1)[:, :components]":
                 "(Q @ turn.flip(1)[:, :components]).T"},
                loses="sizes orthonormal directions"),
    ]


def random_basis(classes=3, ratio=2, components=5):
    return torch.linalg.qr(torch.randn(classes * ratio**2, components)).Q


class compress:
    def compressed(dupsampling, *size, void=0.0, mean=None):
        """compress() of two random label maps by a random W."""
        labels = random_labels(2, *size, void=void)
        mean = torch.zeros(12) if mean is None else mean
        return dupsampling.compress(labels, random_basis(), mean, num_classes=3,
                                    ratio=2)

    @points(1)
    def shape(dupsampling):
        """(B, E, h, w), with h = ceil(H/r)."""
        return [compress.compressed(dupsampling, *size).shape
                for size in ((6, 8), (5, 7))]

    @points(3)
    def values(dupsampling):
        """x = W^T v at every location."""
        return compress.compressed(dupsampling, 6, 8)

    @points(2)
    def centred(dupsampling):
        """The mean is taken off v before (note N2)."""
        return compress.compressed(dupsampling, 6, 8, mean=torch.rand(12))

    @points(2)
    def border(dupsampling):
        """Ignored pixels, and those beyond the border, are zero in v (note N3), and the
        mean comes off there, too.
        """
        return compress.compressed(dupsampling, 5, 7, void=0.2, mean=torch.rand(12))

    UNSHUFFLE = "F.pixel_unshuffle(pixels, ratio)"
    mistakes = [
        Mistake("v is not centred: the mean has to come off before W^T (note N2)",
                {"v - mean[:, None, None]": "v"}, loses="centred border"),
        Mistake("the mean is added: it has to come off (note N2)",
                {"v - mean[:, None, None]": "v + mean[:, None, None]"},
                loses="centred border"),
        Mistake("ignored pixels are zero after the mean came off: they are zero in v, "
                "so -mean once centred",
                {"v - mean[:, None, None]":
                 "(v - mean[:, None, None]) * F.pixel_unshuffle((padded != 255)"
                 "[:, None].float().expand(-1, num_classes, -1, -1), ratio)"},
                loses="border"),
        Mistake("the E numbers are not brought before h and w: from (B, h, w, E), "
                "permute and not reshape",
                {"return x": "return x.permute(0, 2, 3, 1).reshape(x.shape)"},
                loses="values centred border"),
        Mistake("v is in the order (row, column, class): it is (class, row, column), "
                "as the pixel shuffle has it (note N4)",
                {UNSHUFFLE: f"{UNSHUFFLE}.unflatten(1, (num_classes, -1))"
                            f".transpose(1, 2).flatten(1, 2)"},
                loses="values centred border"),
        Mistake("v is in the order (class, column, row): rows first (note N4)",
                {UNSHUFFLE: f"{UNSHUFFLE}.unflatten(1, (-1, ratio, ratio))"
                            f".transpose(2, 3).flatten(1, 3)"},
                loses="values centred border"),
        Mistake("beyond the border there is class 0: it must be ignored, 255 (note N3)",
                {"value=255": "value=0"}, loses="border"),
        Mistake("windows at the border are left out: math.ceil, not a floor",
                {"math.ceil(height / ratio), math.ceil(width / ratio)":
                 "height // ratio, width // ratio"}, loses="shape border"),
    ]


class decompress:
    def inputs():
        x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
        return x, torch.randn(3 * 4, 5, dtype=torch.float64)

    @points(1)
    def shape(dupsampling):
        """(B, K, h*r, w*r)."""
        x, W = decompress.inputs()
        return dupsampling.decompress(x, W, ratio=2).shape

    @points(3)
    def values(dupsampling):
        """W x at every location, laid out as that location's window."""
        x, W = decompress.inputs()
        return dupsampling.decompress(x, W, ratio=2)

    @points(2)
    def gradients(dupsampling):
        """Of x and of W."""
        return dict(zip(("x", "W"), gradients(
            lambda x, W: dupsampling.decompress(x, W, ratio=2), *decompress.inputs())))

    SHUFFLE = "F.pixel_shuffle(v, ratio)"
    mistakes = [
        Mistake("the N numbers are read as (row, column, class): they are (class, row, "
                "column) (note N4)",
                {SHUFFLE: "F.pixel_shuffle(v.unflatten(1, (ratio**2, -1))"
                          ".transpose(1, 2).flatten(1, 2), ratio)"},
                loses="values gradients"),
        Mistake("the windows are transposed: (class, row, column) (note N4)",
                {SHUFFLE: "F.pixel_shuffle(v.unflatten(1, (-1, ratio, ratio))"
                          ".transpose(2, 3).flatten(1, 3), ratio)"},
                loses="values gradients"),
        Mistake("reshape alone does not lay out windows: the two numbers of a pixel "
                "inside its window belong behind those of the window",
                {SHUFFLE: "v.reshape(B, -1, h * ratio, w * ratio)"},
                loses="values gradients"),
        Mistake("the pixels of a window are spread over the map: h comes before the "
                "row inside a window, and w before the column",
                {SHUFFLE: "v.unflatten(1, (-1, ratio, ratio)).permute(0, 1, 2, 4, 3, 5)"
                          ".reshape(B, -1, h * ratio, w * ratio)"},
                loses="values gradients"),
        Mistake("W gets no gradient: is there a .detach(), .data or .item()?",
                {"W[:, :, None, None]": "W.detach()[:, :, None, None]"},
                loses="gradients"),
    ]


class downsample:
    def coarse(dupsampling, *size, h=3, w=4):
        return dupsampling.downsample(torch.randn(2, 3, *size), 4, (h, w))

    @points(1)
    def shape(dupsampling):
        """(B, C, h, w), also where the factor does not divide the sides."""
        return [downsample.coarse(dupsampling, *size).shape
                for size in ((12, 16), (9, 14))]

    @points(3)
    def values(dupsampling):
        """A cell reads the two middle positions of its `factor`, in each direction."""
        return downsample.coarse(dupsampling, 12, 16)

    @points(2)
    def border(dupsampling):
        """Where the last cell reaches past the map, the border is repeated."""
        return downsample.coarse(dupsampling, 9, 14)

    RESIZE = """F.interpolate(x, scale_factor=1 / factor, mode="bilinear",
                         align_corners=False)"""
    REPEAT = "repeat_border(x, h * factor - rows, w * factor - columns)"
    mistakes = [
        Mistake("align_corners=True: a cell lies in the middle of its positions, "
                "corners do not lie on corners",
                {"align_corners=False": "align_corners=True"}, loses="values border"),
        Mistake("a cell is the mean of all its positions: bilinear reads the middle "
                "ones only",
                {RESIZE: "F.avg_pool2d(x, factor)"}, loses="values border"),
        Mistake("a cell is its first position: off by half a cell",
                {RESIZE: "x[..., ::factor, ::factor]"}, loses="values border"),
        Mistake("the map is squeezed into the size, which shifts what is in it",
                {REPEAT: "x", RESIZE: "F.interpolate(x, size, mode='bilinear')"},
                loses="border"),
        Mistake("antialias reads more than the two middle positions",
                {"align_corners=False": "align_corners=False, antialias=True"},
                loses="values border"),
        Mistake("what is missing is filled with zeros: repeat the border",
                {REPEAT: "F.pad(x, (0, w * factor - columns, 0, h * factor - rows))"},
                loses="border"),
    ]


class Temperature_forward:
    def layer(dupsampling, log_T=0.0):
        layer = dupsampling.Temperature().double()
        with torch.no_grad():
            layer.log_T.fill_(log_T)
        return layer

    @points(1)
    def start(dupsampling):
        """T starts at 1, which changes nothing."""
        layer = dupsampling.Temperature().double()
        return layer(torch.randn(2, 5, dtype=torch.float64))

    @points(2)
    def values(dupsampling):
        """The logits over T, where the parameter is log T (note N11)."""
        z = torch.randn(2, 5, dtype=torch.float64)
        return {f"log T = {t}": Temperature_forward.layer(dupsampling, t)(z)
                for t in (-1.2, 0.7)}

    @points(1)
    def gradients(dupsampling):
        """Of z and of log T."""
        layer = Temperature_forward.layer(dupsampling, -0.5)
        (z,) = gradients(layer, torch.randn(2, 5, dtype=torch.float64))
        layer(torch.randn(2, 5, dtype=torch.float64)).square().sum().backward()
        return {"z": z, "log T": layer.log_T.grad}

    mistakes = [
        Mistake("the logits are multiplied by T: Eq. (6) divides",
                {"z / self.log_T.exp()": "z * self.log_T.exp()"},
                loses="values gradients"),
        Mistake("the parameter is taken for T: it is log T (note N11)",
                {"self.log_T.exp()": "self.log_T"}, loses="start values gradients"),
        Mistake("log T gets no gradient: is there a .detach(), .data or .item()?",
                {"self.log_T.exp()": "self.log_T.exp().item()"}, loses="gradients"),
        Mistake("1 + log T is T near 1 only: T = exp(log T)",
                {"self.log_T.exp()": "(1 + self.log_T)"}, loses="values gradients"),
        Mistake("the softmax is taken here, too: it is the loss that takes it",
                {"z / self.log_T.exp()": "(z / self.log_T.exp()).softmax(1)"},
                loses="start values gradients"),
    ]
