"""YOLOv8: C2f backbone, path-aggregation neck, decoupled head without anchor boxes."""

from __future__ import annotations

from paceline.models.blocks import SPPF, C2f, Concat, ConvUnit, Upsample
from paceline.models.families.scale import Scale
from paceline.models.graph import IMAGES, Node
from paceline.models.heads import DetectionHead

SCALES = {
    "n": Scale(depth=0.33, width=0.25, max_channels=1024),
    "s": Scale(depth=0.33, width=0.50, max_channels=1024),
    "m": Scale(depth=0.67, width=0.75, max_channels=768),
    "l": Scale(depth=1.00, width=1.00, max_channels=512),
    "x": Scale(depth=1.00, width=1.25, max_channels=512),
}


def yolov8_nodes(size: str, num_classes: int) -> list[Node]:
    """Nodes of YOLOv8 in one of the sizes of `SCALES`; the last one is the head."""
    scale = SCALES[size]
    c1, c2, c3, c4, c5 = (scale.channels(base) for base in (64, 128, 256, 512, 1024))
    short, long = scale.repeats(3), scale.repeats(6)
    return [
        Node(ConvUnit(3, c1, 3, 2), (IMAGES,)),  # 0
        Node(ConvUnit(c1, c2, 3, 2), (0,)),
        Node(C2f(c2, c2, short, residual=True), (1,)),
        Node(ConvUnit(c2, c3, 3, 2), (2,)),
        Node(C2f(c3, c3, long, residual=True), (3,)),  # 4: stride 8
        Node(ConvUnit(c3, c4, 3, 2), (4,)),
        Node(C2f(c4, c4, long, residual=True), (5,)),  # 6: stride 16
        Node(ConvUnit(c4, c5, 3, 2), (6,)),
        Node(C2f(c5, c5, short, residual=True), (7,)),
        Node(SPPF(c5, c5), (8,)),  # 9: stride 32
        Node(Upsample(), (9,)),
        Node(Concat(), (10, 6)),
        Node(C2f(c5 + c4, c4, short, residual=False), (11,)),  # 12
        Node(Upsample(), (12,)),
        Node(Concat(), (13, 4)),
        Node(C2f(c4 + c3, c3, short, residual=False), (14,)),  # 15: P3
        Node(ConvUnit(c3, c3, 3, 2), (15,)),
        Node(Concat(), (16, 12)),
        Node(C2f(c3 + c4, c4, short, residual=False), (17,)),  # 18: P4
        Node(ConvUnit(c4, c4, 3, 2), (18,)),
        Node(Concat(), (19, 9)),
        Node(C2f(c4 + c5, c5, short, residual=False), (20,)),  # 21: P5
        Node(DetectionHead((c3, c4, c5), num_classes, depthwise=False), (15, 18, 21)),  # 22
    ]
