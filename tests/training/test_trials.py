"""Trials and plans: every plan trains, alike, and leaves the network of the run alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from paceline.batch import Batch
from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.blocks import Concat, ConvUnit, SplitChain, Upsample
from paceline.models.graph import DetectionModel, Node
from paceline.models.heads import DetectionHead
from paceline.parallel.single import SingleEngine
from paceline.training.compiling import Compiler
from paceline.training.ema import Ema
from paceline.training.optim import OptimPlan, build_optimizer
from paceline.training.plan import StepPlan, laid_out, threads_of
from paceline.training.precision import Precision
from paceline.training.schedule import Rates
from paceline.training.step import EagerStep
from paceline.training.trials import StepTrials, TrialSetting, noise

if TYPE_CHECKING:
    from collections.abc import Iterator

FP32, BF16 = Precision(name="fp32"), Precision(name="bf16")
SGD = OptimPlan(name="SGD", lr0=0.01, momentum=0.9, warmup_momentum=0.9, warmup_bias_lr=0.01, weight_decay=0.0005)
