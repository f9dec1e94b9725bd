"""Say what a training run does: its model, its stages, its optimiser."""

import math
from dataclasses import dataclass

import torch

from moba_lab.model import Config


@dataclass(frozen=True)
class Stage:
    """A part of a run: `steps` batches of `batch` sequences of `context` tokens.

    attention: "moba" or "full", or one of them for every layer.
    """

    attention: str | tuple[str, ...]
    context: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Settings:
    """What decides a run besides its data: model, stages, optimiser, seed.

    lr: peak learning rate, reached after `warmup` steps; see `learning_rate`.
    weight_decay: on matrices only.
    clip: largest norm of the gradient.
    accumulate: parts into which a batch is cut, for less memory; divides every batch.
    log_every: steps per row of the curve. On a GPU the host waits for it, and looks at
        the losses, only then.
    """

    config: Config
    stages: tuple[Stage, ...]
    seed: int = 0
    lr: float = 4e-3
    warmup: int = 350
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    log_every: int = 20

    def __post_init__(self):
        for stage in self.stages:
            if stage.batch % self.accumulate:
                raise ValueError(
                    f"expected a batch that --accumulate {self.accumulate} divides, "
                    f"got {stage.batch}; change one of them"
                )

    @property
    def steps(self):
        """Number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def make_optimizer(model, settings):
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, total, settings):
    """Rise linearly over `warmup` steps, then fall as a cosine to a twentieth.

    >>> settings = Settings(Config(), (), lr=1.0, warmup=10)
    >>> [round(learning_rate(step, 100, settings), 3) for step in (0, 9, 55, 99)]
    [0.1, 1.0, 0.525, 0.05]
    """
    peak, warmup = settings.lr, settings.warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
