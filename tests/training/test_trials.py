"""Trials and plans: every plan trains, alike, and leaves the network of the run alone."""

from __future__ import annotations

from paceline.training.optim import OptimPlan
from paceline.training.precision import Precision

FP32, BF16 = Precision(name="fp32"), Precision(name="bf16")
SGD = OptimPlan(name="SGD", lr0=0.01, momentum=0.9, warmup_momentum=0.9, warmup_bias_lr=0.01, weight_decay=0.0005)
