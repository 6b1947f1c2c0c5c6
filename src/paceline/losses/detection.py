"""The detection loss: classes by binary cross-entropy, boxes by CIoU and by the distribution of their sides."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from paceline.boxes import anchor_points, box_distances, decode_boxes, paired_ciou
from paceline.losses.assign import Scene, TaskAlignedAssigner, may_ask
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.losses.config import LossConfig

KERNEL_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
"""Types of raw outputs that kernels take; they compute in float32."""
LAST_BIN_MARGIN = 0.01
"""Distances to learn stay this far below the last bin, in units of the stride."""


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over a batch, not divided by anything: sums of micro-batches add up to the sums of the whole batch.

    The loss of any number of batches together is (images x sum of `total`) / max(sum of `normaliser`, 1).
    All are tensors without dimensions, on the device.
    """

    box: Tensor
    """Gain x sum of (1 - CIoU) x target score."""
    cls: Tensor
    """Gain x sum of the binary cross-entropies of all points and classes."""
    dfl: Tensor
    """Gain x sum of the distribution focal losses x target score."""
    normaliser: Tensor
    """Sum of the target scores; carries no gradient."""
    joint: Tensor | None = None
    """Sum of the three parts where who computed them has added them up as well."""

    @property
    def total(self) -> Tensor:
        """Sum of the three parts."""
        return self.box + self.cls + self.dfl if self.joint is None else self.joint

    def detach(self) -> LossSums:
        """Return the same sums without their history."""
        return LossSums(
            box=self.box.detach(), cls=self.cls.detach(), dfl=self.dfl.detach(), normaliser=self.normaliser.detach()
        )


class DetectionLoss:
    """Compares raw outputs with the ground truth; computed in float32 at least, also under autocast."""

    def __init__(
        self,
        config: LossConfig,
        num_classes: int,
        reg_max: int = 16,
        strides: tuple[int, ...] = (8, 16, 32),
        assigner: TaskAlignedAssigner | None = None,
        *,
        fixed_shapes: bool = False,
    ) -> None:
        """Take the head's properties.

        fixed_shapes: let no shape follow from the data on a CPU either, as a compiler or a graph needs it.
        """
        assert reg_max > 1, "distances that are not a distribution have no loss here yet"
        self.config = config
        self.num_classes = num_classes
        self.reg_max = reg_max
        self.strides = strides
        self.fixed_shapes = fixed_shapes
        self.assigner = assigner or TaskAlignedAssigner(least_side_px=float(strides[1]), fixed_shapes=fixed_shapes)
        self._made: dict[tuple[tuple[int, int], torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, predictions: tuple[Tensor, ...], batch: Batch) -> LossSums:
        """Return the sums for raw outputs (BA(4R), BAK) and the batch that they were computed from."""
        raw, logits = predictions
        assert raw.shape[-1] == 4 * self.reg_max, raw.shape
        assert logits.shape[-1] == self.num_classes, logits.shape
        kind = raw.device.type
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)  # which 2.11 cannot trace
        with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
            if self._suits_kernels(raw, logits):
                return self._sums_by_kernels(raw.contiguous(), logits.contiguous(), batch)
            dtype = torch.promote_types(raw.dtype, torch.float32)
            return self._sums(raw.to(dtype), logits.to(dtype), batch)

    def _suits_kernels(self, raw: Tensor, logits: Tensor) -> bool:
        """Say whether kernels compute this loss here; a compiler writes its own."""
        return (
            not torch.compiler.is_compiling()
            and usable(raw.device)
            and isinstance(self.assigner, TaskAlignedAssigner)
            and self.reg_max & (self.reg_max - 1) == 0
            and all(2 * stride == further for stride, further in pairwise(self.strides))
            and {raw.dtype, logits.dtype} <= KERNEL_DTYPES
        )

    def _anchors(self, size_hw: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return points and strides for images of a size, made once; a compiler puts them into its own code."""
        if torch.compiler.is_compiling():
            return anchor_points(size_hw, self.strides, device=device, dtype=dtype)
        key = (size_hw, device, dtype)
        if key not in self._made:
            self._made[key] = anchor_points(size_hw, self.strides, device=device, dtype=dtype)
        return self._made[key]

    def _sums_by_kernels(self, raw: Tensor, logits: Tensor, batch: Batch) -> LossSums:
        from paceline.losses import fused  # needs Triton

        points, strides = self._anchors(batch.size_hw, raw.device, torch.float32)
        grid = fused.Grid(
            points=points,
            strides=strides,
            size_hw=batch.size_hw,
            finest=self.strides[0],
            num_levels=len(self.strides),
        )
        targets = fused.assign(
            raw.detach(),
            logits.detach(),
            grid,
            batch,
            topk=self.assigner.topk,
            least_side_px=self.assigner.least_side_px,
        )
        gains = fused.Gains(box=float(self.config.box), cls=float(self.config.cls), dfl=float(self.config.dfl))
        total, box, classes, dfl, normaliser = fused.sums(raw, logits, grid, batch, targets, gains)
        return LossSums(box=box, cls=classes, dfl=dfl, normaliser=normaliser, joint=total)

    def _sums(self, raw: Tensor, logits: Tensor, batch: Batch) -> LossSums:
        points, strides = self._anchors(batch.size_hw, raw.device, raw.dtype)
        scene = Scene(
            points=points,
            predicted_boxes=decode_boxes(raw.detach(), points, strides),
            logits=logits.detach(),
            boxes=batch.boxes.to(raw.dtype),
            labels=batch.labels,
            valid=batch.valid,
        )
        assignment = self.assigner(scene)
        owner, weight = assignment.ground_truth, assignment.target_score

        # Cross-entropy of a logit x with target t is softplus(x) - t x, and t is 0 but for one class of some points.
        own_logits = logits.gather(2, batch.labels.gather(1, owner).unsqueeze(-1)).squeeze(-1)
        classes = F.softplus(logits).sum() - (own_logits * weight).sum()

        # A CPU leaves out the points that learn nothing; another device would have to be asked how many they are.
        boxes = scene.boxes.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))
        if not self.fixed_shapes and may_ask(weight):
            cell = weight.flatten().nonzero()[:, 0]
            point = cell % len(points)
            raw, boxes, weight = (t.flatten(0, 1).index_select(0, cell) for t in (raw, boxes, weight.unsqueeze(-1)))
            points, strides, weight = points[point], strides[point], weight.squeeze(-1)
        overlap = paired_ciou(decode_boxes(raw, points, strides), boxes)
        focal = distribution_focal_loss(raw, box_distances(points, boxes) / strides.unsqueeze(-1))
        return self._weighed(((1 - overlap) * weight).sum(), classes, (focal * weight).sum(), weight.sum())

    def _weighed(self, box: Tensor, classes: Tensor, dfl: Tensor, normaliser: Tensor) -> LossSums:
        gains = self.config
        return LossSums(box=gains.box * box, cls=gains.cls * classes, dfl=gains.dfl * dfl, normaliser=normaliser)


def distribution_focal_loss(raw: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy of each side's distribution with the two bins around its distance, mean of the four sides: ...

    `raw` is ...(4R), logits; `distances` are ...4 in units of the stride. Each of the two bins has a share that falls
    with its way to the distance, so that the mean of the two is the distance. Source: arXiv 2006.04388, equation 6.
    """
    bins = raw.shape[-1] // 4
    logits = raw.reshape(*raw.shape[:-1], 4, bins)
    distances = distances.clamp(0, bins - 1 - LAST_BIN_MARGIN)
    lower = distances.floor()
    two_bins = torch.stack((lower, lower + 1), dim=-1).long()
    shares = torch.stack((lower + 1 - distances, distances - lower), dim=-1)
    return (logits.logsumexp(dim=-1) - (logits.gather(-1, two_bins) * shares).sum(dim=-1)).mean(dim=-1)
