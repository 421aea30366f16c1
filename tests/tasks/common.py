"""What is asked of the tasks in common.py, and how they usually go wrong."""
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from grading import Mistake, gradients, points


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class upsample:
    @points(2)
    def values(common):
        """Bilinear, by 2 and 4, borders on borders."""
        x = double(2, 3, 3, 4)
        return {f"factor {factor}": common.upsample(x, factor) for factor in (1, 2, 4)}

    @points(2)
    def cut(common):
        """With a size: what is too much is cut off, below and on the right."""
        return common.upsample(double(2, 3, 3, 4), 4, (10, 13))

    @points(2)
    def strip(common):
        """rows = (1, 3): these rows of the result alone."""
        x = torch.randn(2, 3, 3, 4)
        return {f"factor {factor}": common.upsample(x, factor, (10, 13), (1, 3))
                for factor in (1, 2, 4)}

    CUT = "x[..., : size[0], : size[1]] if size else x"
    ROWS = "(torch.arange(lo, hi, dtype=torch.float64) + 0.5) / factor - 0.5"
    mistakes = [
        Mistake("align_corners=True: here pixels are areas, borders lie on borders",
                {"align_corners=False": "align_corners=True"}, loses="values cut"),
        Mistake("nearest neighbours instead of bilinear",
                {'mode="bilinear", align_corners=False': 'mode="nearest"'},
                loses="values cut"),
        Mistake("the map is squeezed into the size, which shifts it against the "
                "encoder's grid: cut it",
                {CUT: 'F.interpolate(x, size, mode="bilinear") if size else x'},
                loses="cut"),
        Mistake("a strip's rows are half a pixel off: row i is at (i + 1/2) / factor "
                "- 1/2",
                {ROWS: "torch.arange(lo, hi, dtype=torch.float64) / factor"},
                loses="strip"),
        Mistake("`rows` is not looked at: all rows are given",
                {"if rows:": "if False:"}, loses="strip"),
    ]


class one_hot:
    @points(3)
    def values(common):
        """1 in the plane of the class, 0 elsewhere: (B, K, H, W), float32."""
        labels = torch.randint(4, (2, 3, 5), dtype=torch.uint8)
        planes = common.one_hot(labels, 4)
        return {"dtype": str(planes.dtype), "planes": planes}

    @points(2)
    def void(common):
        """Pixels of 255 are 0 in all planes."""
        labels = torch.randint(4, (2, 3, 5), dtype=torch.uint8)
        labels[:, :2, 1:4] = 255
        return common.one_hot(labels, 4)

    PLANES = "planes.scatter_(1, ids, 1.0)[:, :num_classes]"
    mistakes = [
        Mistake("void becomes the last class: it belongs to none",
                {"clamp(max=num_classes)": "clamp(max=num_classes - 1)"},
                loses="void"),
        Mistake("the plane of void is left in: K planes",
                {PLANES: "planes.scatter_(1, ids, 1.0)"}, loses="values void"),
        Mistake("the classes are the last dimension: (B, K, H, W)",
                {PLANES: f"{PLANES}.permute(0, 2, 3, 1)"}, loses="values void"),
        Mistake("off by one: class 0 belongs into plane 0",
                {PLANES: "planes.scatter_(1, ids, 1.0)[:, 1:]"}, loses="values void"),
    ]


class dilate_stage:
    def stage(block):
        """Two blocks of a ResNet, the first of which halves the resolution."""
        width = 4 * block.expansion
        shortcut = nn.Sequential(nn.Conv2d(6, width, 1, 2, bias=False),
                                 nn.BatchNorm2d(width))
        more = {} if block is BasicBlock else {"base_width": 64}
        return nn.Sequential(block(6, 4, 2, shortcut, **more), block(width, 4, **more))

    def convolutions(common, dilation):
        """{kind of block: its convolutions} after dilate_stage."""
        found = {}
        for block in (BasicBlock, Bottleneck):
            stage = dilate_stage.stage(block)
            common.dilate_stage(stage, dilation)
            found[block.__name__] = [layer for layer in stage.modules()
                                     if isinstance(layer, nn.Conv2d)]
        return found

    @points(2)
    def strides(common):
        """No convolution has a stride of 2 any more, nor has the shortcut."""
        return {block: [layer.stride[0] for layer in layers] for block, layers
                in dilate_stage.convolutions(common, 2).items()}

    @points(3)
    def dilations(common):
        """Of the 3x3 convolutions: half of it for the first one."""
        return {f"{block}, dilation {dilation}": [
            layer.dilation[0] for layer in layers if layer.kernel_size == (3, 3)]
            for dilation in (2, 4)
            for block, layers in dilate_stage.convolutions(common, dilation).items()}

    @points(3)
    def resolution(common):
        """The output is as large as the input."""
        found = {}
        for block in (BasicBlock, Bottleneck):
            stage = dilate_stage.stage(block).eval()
            common.dilate_stage(stage, 4)
            found[block.__name__] = stage(torch.randn(1, 6, 9, 12))
        return found

    mistakes = [
        Mistake("the first 3x3 convolution has the whole dilation: it still sees the "
                "finer grid and gets half",
                {"dilation // 2 if first else dilation": "dilation"},
                loses="dilations resolution"),
        Mistake("the stride is still 2: dilation takes its place",
                {"conv.stride = (1, 1)": "pass"}, loses="strides resolution"),
        Mistake("the padding is as before: with holes in the kernel, the map shrinks",
                {"conv.dilation = conv.padding": "conv.dilation"}, loses="resolution"),
        Mistake("the 1x1 convolutions are changed, too: they have nothing to spread, "
                "and padding makes the map grow",
                {"conv.kernel_size == (3, 3)": "True"}, loses="dilations resolution"),
        Mistake("only the stride is taken away: without dilation, weights that were "
                "trained with the stride see half as far",
                {"conv.kernel_size == (3, 3)": "False"}, loses="dilations resolution"),
    ]


class ASPP_forward:
    @points(4)
    def values(common):
        """Global mean everywhere, 1x1, dilated 3x3, in this order, then projected."""
        x = torch.randn(2, 6, 7, 9)
        return common.ASPP(6, 4, rates=(1, 2, 3)).eval()(x)

    @points(1)
    def no_image_level(common):
        """Without the mean where there is no `pool` (image_level=False)."""
        context = common.ASPP(6, 4, rates=(1, 2, 3), image_level=False).eval()
        return context(torch.randn(2, 6, 7, 9))

    BRANCHES = "views += [branch(x) for branch in self.branches]"
    mistakes = [
        Mistake("the global mean comes last: it comes first",
                {BRANCHES: "views = [branch(x) for branch in self.branches] + views"},
                loses="values"),
        Mistake("the branches are in the opposite order",
                {BRANCHES: "views += [branch(x) for branch in self.branches][::-1]"},
                loses="values no_image_level"),
        Mistake("the mean is taken where there is no `pool`",
                {"if self.pool is not None:": "if True:"}, loses="no_image_level"),
        Mistake("the projection is missing",
                {"self.project(torch.cat(views, dim=1))": "torch.cat(views, dim=1)"},
                loses="values no_image_level"),
    ]


def scored(*shape, void=0):
    """Logits of 4 classes and labels, the first `void` rows of image 0 ignored."""
    labels = torch.randint(4, shape, dtype=torch.uint8)
    labels[0, :void] = 255
    return double(shape[0], 4, *shape[1:]), labels


class cross_entropy:
    @points(2)
    def values(common):
        """The mean over all pixels."""
        return common.cross_entropy(*scored(2, 6, 5))

    @points(2)
    def void(common):
        """The mean over the pixels that are not 255, of all images together."""
        return common.cross_entropy(*scored(2, 6, 5, void=4))

    @points(1)
    def all_void(common):
        """0 if every pixel is 255, with a gradient of 0."""
        logits, labels = scored(1, 6, 5, void=6)
        logits.requires_grad_()
        loss = common.cross_entropy(logits, labels)
        loss.backward()
        return {"loss": loss, "gradient": logits.grad}

    @points(1)
    def gradients(common):
        """Of the logits."""
        logits, labels = scored(2, 6, 5)
        return gradients(lambda x: common.cross_entropy(x, labels), logits)

    MEAN = "loss.sum() / valid.sum().clamp(min=1)"
    mistakes = [
        Mistake("divided by all pixels: void counts as right",
                {MEAN: "loss.mean()"}, loses="void"),
        Mistake("the mean of the images' means: each pixel counts alike, whatever "
                "image it is in",
                {MEAN: "(loss.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()"},
                loses="void"),
        Mistake("the sum over the pixels: it is their mean",
                {MEAN: "loss.sum()"}, loses="values void gradients"),
        Mistake("0 / 0 where every pixel is void: NaN would spoil all weights",
                {".clamp(min=1)": ""}, loses="all_void"),
        Mistake("void is taken for class 0",
                {"pixel_losses(logits, labels)":
                 "pixel_losses(logits, labels * (labels != IGNORE_INDEX))"},
                loses="void all_void"),
    ]


class ohem_cross_entropy:
    @points(3)
    def share(common):
        """The mean over the `share` with the largest loss, rounded up."""
        return common.ohem_cross_entropy(*scored(1, 7, 5), share=0.1)

    @points(2)
    def threshold(common):
        """And every pixel whose true class has a lower probability than that."""
        logits, labels = scored(1, 8, 8)
        return {f"threshold {t}": common.ohem_cross_entropy(
            logits, labels, share=0.125, threshold=t) for t in (0.2, 0.05, 1e-4)}

    @points(2)
    def image_by_image(common):
        """The share is of each image; the mean is over all pixels that are kept."""
        logits, labels = scored(2, 8, 8, void=4)
        return common.ohem_cross_entropy(logits * torch.tensor([1.0, 3.0])[
            :, None, None, None], labels, share=0.125)

    @points(2)
    def void(common):
        """The share is of the pixels that are not 255."""
        return common.ohem_cross_entropy(*scored(1, 8, 8, void=4), share=0.125)

    @points(1)
    def gradients(common):
        """Of the logits: none where a pixel is not kept."""
        logits, labels = scored(1, 8, 8)
        return gradients(lambda x: common.ohem_cross_entropy(x, labels, share=0.25),
                         logits)

    mistakes = [
        Mistake("the hardest of the whole batch: the share is of each image, so that "
                "nothing depends on how a batch is divided",
                {"in zip(losses, valid)": "in [(losses, valid)]"},
                loses="image_by_image"),
        Mistake("the mean of the images' means: the mean is over all pixels kept",
                {"torch.cat(kept).mean()":
                 "torch.stack([part.mean() for part in kept]).mean()"},
                loses="image_by_image"),
        Mistake("void counts for the share",
                {"share * loss.numel()": "share * mask.numel()"},
                loses="image_by_image void"),
        Mistake("the easiest pixels are kept, not the hardest",
                {"topk(count)": "topk(count, largest=False)"},
                loses="share threshold image_by_image void gradients"),
        Mistake("the threshold is not looked at",
                {"if threshold:": "if False:"}, loses="threshold"),
        Mistake("the threshold is compared with the loss: it is a probability, and the "
                "loss is minus its logarithm",
                {"-math.log(threshold)": "threshold"}, loses="threshold"),
        Mistake("the number of pixels is rounded down: at least the share is kept",
                {"math.ceil(": "math.floor("}, loses="share"),
    ]


class ConfusionMatrix_update:
    def maps(void=0.0, classes=4):
        labels = torch.randint(classes, (7, 9), dtype=torch.uint8)
        labels[torch.rand(7, 9) < void] = 255
        return labels, torch.randint(classes, (7, 9))

    @points(3)
    def counts(common):
        """counts[truth, prediction] in int64."""
        matrix = common.ConfusionMatrix(4)
        matrix.update(*ConfusionMatrix_update.maps())
        return {"dtype": str(matrix.counts.dtype), "counts": matrix.counts}

    @points(2)
    def void(common):
        """Pixels whose label is 255 do not count, whatever is predicted there."""
        matrix = common.ConfusionMatrix(4)
        matrix.update(*ConfusionMatrix_update.maps(void=0.3))
        return matrix.counts

    @points(1)
    def several(common):
        """Images add up, and are counted."""
        matrix = common.ConfusionMatrix(4)
        for _ in range(3):
            matrix.update(*ConfusionMatrix_update.maps())
        return {"images": matrix.images, "counts": matrix.counts}

    @points(2)
    def refuses(common):
        """A label or a prediction that is no class is a ValueError."""
        said = []
        for at in (0, 1):
            maps = ConfusionMatrix_update.maps()
            maps[at][3, 4] = 4
            try:
                common.ConfusionMatrix(4).update(*maps)
                said.append("accepted")
            except ValueError:
                said.append("ValueError")
        return said

    mistakes = [
        Mistake("the matrix is transposed: truth is the row, prediction the column",
                {"truth * K + guess": "guess * K + truth"},
                loses="counts void several"),
        Mistake("void counts as class 0: leave its pixels out",
                {"valid = labels != IGNORE_INDEX":
                 "labels = labels * (labels != IGNORE_INDEX)\n"
                 "        valid = labels >= 0"}, loses="void"),
        Mistake("the counts of an image replace those before: add them",
                {"self.counts += ": "self.counts = "}, loses="several"),
        Mistake("the images are not counted",
                {"self.images += 1": "pass"}, loses="several"),
        Mistake("predictions are not checked: one that is no class would be counted "
                "elsewhere",
                {"in (truth, guess)": "in (truth,)",
                 "bincount(truth * K + guess, minlength":
                 "bincount(truth * K + guess.clamp(max=K - 1), minlength"},
                loses="refuses"),
    ]


class ious:
    def counts(*shape, absent=False, predicted=False):
        """Random; the last of 4 classes may be absent everywhere, or in the truth alone.
        """
        counts = torch.randint(1, 50, (*shape, 4, 4))
        if absent or predicted:
            counts[..., 3, :] = 0
        if absent:
            counts[..., :, 3] = 0
        return counts

    @points(3)
    def values(common):
        """Per class the intersection over the union, of one matrix and of several."""
        return {"one": common.ious(ious.counts()),
                "2 x 3": common.ious(ious.counts(2, 3))}

    @points(2)
    def absent(common):
        """NaN for a class that is neither true nor predicted anywhere."""
        return common.ious(ious.counts(absent=True))[3]

    @points(1)
    def predicted(common):
        """0 for a class that is predicted but never true."""
        return common.ious(ious.counts(predicted=True))[3]

    UNION = "(counts.sum(-1) + counts.sum(-2) - hits)"
    mistakes = [
        Mistake("the intersection is counted twice: union = truth + prediction - hits",
                {" - hits)": ")"}, loses="values"),
        Mistake("this is the Dice score, 2 hits / (truth + prediction)",
                {f"hits / {UNION}":
                 "2 * hits / (counts.sum(-1) + counts.sum(-2))"},
                loses="values"),
        Mistake("this is the accuracy of each class, hits / truth",
                {UNION: "counts.sum(-1)"}, loses="values predicted"),
        Mistake("this is the precision of each class, hits / prediction",
                {UNION: "counts.sum(-2)"}, loses="values"),
        Mistake("a class that never occurs gets a number: it has no IoU, NaN, or it "
                "would be averaged",
                {f"hits / {UNION}": f"(hits / {UNION}).nan_to_num(0)"},
                loses="absent"),
    ]
