"""SSD, a detector in one pass (Liu et al., "SSD: Single Shot MultiBox Detector", arXiv 1512.02325).

Default boxes of several sizes and shapes sit on every cell of several maps of a truncated classifier; small
convolutions say for each of them its class and how to move it onto the object. One loss trains both, with an explicit
matching and, of the thousands of boxes without an object, only the hardest; at the end overlapping boxes go.

`ssd300_vgg16` and `ssd512_vgg16` are the paper's networks, exact in boxes, parameters and multiply-adds. `ssd_lite`
puts the same on any backbone of timm, with depthwise heads, `ssd_nano` on nine plain convolutions for images of 128
pixels. Labels are 0..K-1 outside; inside, class 0 is background. Default boxes belong to one image size, given when a
network is built. Boxes that leave the image are clipped, default boxes never.

What differs from the paper: images are RGB, normalised as everywhere in this library (the Caffe model takes BGR minus
its mean), which is what the VGG weights of torchvision and timm expect; where no such weights are given, VGG starts
from He's initialisation. The last, lower learning rates are a schedule's business. Of VGG without batch norm the loss
explodes when it starts at the paper's lr of 1e-3: warm up, and clip the gradient (``tt.fit(..., lr=1e-3, batch_size=32,
warmup=0.05, clip_grad=10)``); `ssd_lite` and `ssd_nano` have batch norm and train with Adam at 2e-3.
"""

from trimtab.core.card import Card, Claim
from trimtab.models.dense.ssd.boxes import decode, default_boxes, detections, encode, match, paper_shapes
from trimtab.models.dense.ssd.loss import hardest, multibox_loss
from trimtab.models.dense.ssd.model import SSD, L2Norm, PlainBody, TimmBody, VGGBody

CARD = Card(
    slug="ssd",
    title="SSD: Single Shot MultiBox Detector",
    arxiv="1512.02325",
    year=2015,
    kind="architecture",
    tasks=("detect",),
    claims=(
        Claim(
            "boxes_and_size",
            "One network evaluates 8732 (300 input) or 24564 (512 input) default boxes over 6 / 7 feature maps",
        ),
        Claim(
            "multi_scale",
            "Predicting from several maps of decreasing resolution with tiled default boxes of several aspect ratios "
            "is what gives accuracy",
        ),
        Claim("hard_negatives", "3:1 hard negative mining makes training of a 1:1000 imbalanced problem stable"),
        Claim(
            "accuracy",
            "VOC2007 test mAP 77.2 (SSD300*) and 79.8 (SSD512*), against 73.2 Faster R-CNN and 63.4 YOLO; abstract of "
            "an early version: 72.1 / 75.1",
        ),
    ),
)

__all__ = [
    "CARD", "SSD", "L2Norm", "PlainBody", "TimmBody", "VGGBody", "decode", "default_boxes", "detections",
    "encode", "hardest", "match", "multibox_loss", "paper_shapes",
]  # fmt: skip
