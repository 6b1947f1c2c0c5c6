"""YOLO11: C3k2 backbone with attention at the top, path-aggregation neck, head with depth-wise class branches."""

from __future__ import annotations

from paceline.models.blocks import C2PSA, SPPF, C3k2, Concat, ConvUnit, Upsample
from paceline.models.families.scale import Scale
from paceline.models.graph import IMAGES, Node
from paceline.models.heads import DetectionHead

SCALES = {
    "n": Scale(depth=0.50, width=0.25, max_channels=1024),
    "s": Scale(depth=0.50, width=0.50, max_channels=1024),
    "m": Scale(depth=0.50, width=1.00, max_channels=512),
    "l": Scale(depth=1.00, width=1.00, max_channels=512),
    "x": Scale(depth=1.00, width=1.50, max_channels=512),
}


def yolo11_nodes(size: str, num_classes: int) -> list[Node]:
    """Nodes of YOLO11 in one of the sizes of `SCALES`; the last one is the head."""
    scale = SCALES[size]
    c1, c2, c3, c4, c5 = (scale.channels(base) for base in (64, 128, 256, 512, 1024))
    repeats = scale.repeats(2)
    c3k = size in ("m", "l", "x")  # the small sizes keep the plain bottleneck where this is named
    return [
        Node(ConvUnit(3, c1, 3, 2), (IMAGES,)),  # 0
        Node(ConvUnit(c1, c2, 3, 2), (0,)),
        Node(C3k2(c2, c3, repeats, c3k=c3k, ratio=0.25), (1,)),
        Node(ConvUnit(c3, c3, 3, 2), (2,)),
        Node(C3k2(c3, c4, repeats, c3k=c3k, ratio=0.25), (3,)),  # 4: stride 8
        Node(ConvUnit(c4, c4, 3, 2), (4,)),
        Node(C3k2(c4, c4, repeats, c3k=True), (5,)),  # 6: stride 16
        Node(ConvUnit(c4, c5, 3, 2), (6,)),
        Node(C3k2(c5, c5, repeats, c3k=True), (7,)),
        Node(SPPF(c5, c5), (8,)),
        Node(C2PSA(c5, repeats), (9,)),  # 10: stride 32
        Node(Upsample(), (10,)),
        Node(Concat(), (11, 6)),
        Node(C3k2(c5 + c4, c4, repeats, c3k=c3k), (12,)),  # 13
        Node(Upsample(), (13,)),
        Node(Concat(), (14, 4)),
        Node(C3k2(c4 + c4, c3, repeats, c3k=c3k), (15,)),  # 16: P3
        Node(ConvUnit(c3, c3, 3, 2), (16,)),
        Node(Concat(), (17, 13)),
        Node(C3k2(c3 + c4, c4, repeats, c3k=c3k), (18,)),  # 19: P4
        Node(ConvUnit(c4, c4, 3, 2), (19,)),
        Node(Concat(), (20, 10)),
        Node(C3k2(c4 + c5, c5, repeats, c3k=True), (21,)),  # 22: P5
        Node(DetectionHead((c3, c4, c5), num_classes, depthwise=True), (16, 19, 22)),  # 23
    ]
