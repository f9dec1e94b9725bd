"""Train a model through a row of stages, so that a stopped run can go on unchanged."""

import csv
import io
import json
import math
import time
from collections import deque
from dataclasses import asdict

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open

from moba_lab.card import write_atomically
from moba_lab.diagnose import first_not_finite
from moba_lab.model import Model
from moba_lab.place import Place
from moba_lab.settings import learning_rate, make_optimizer

LAST = "last.safetensors"
CURVE = "curve.csv"
# Parts of the context whose losses are kept apart, as long as they divide it.
PARTS = 16
IGNORED = -100


class Trainer:
    """A model, its optimiser, its data and its place in the run.

    Everything that decides the next step is in `save`'s file, so that a run continued
    from it is, on a CPU, bit for bit the run that was never stopped.

    Args:
        settings: `Settings`.
        data: function of (index of a stage, `Stage`) that returns its batches: an
            object with `next_batch()`, which returns tokens and targets as two
            (batch * context,) int64 arrays, targets of -100 not counting, and with
            `state_dict()`, which returns JSON, and `load_state_dict()`.
        place: `Place` where it trains; None means the CPU in float32.
        record: JSON that checkpoints carry along.
    """

    def __init__(self, settings, data, place=None, record=None):
        self.settings, self.data, self.record = settings, data, record or {}
        self.place = place or Place()
        self.stages, self.total = settings.stages, settings.steps
        torch.manual_seed(settings.seed)
        self.model = Model(settings.config).to(self.place.device)
        self.losses_of = self.place.compiled(self.model.losses)
        self.optimizer = make_optimizer(self.model, settings)
        self.step, self.seconds, self.saved = 0, 0.0, None
        self.losses, self.parts, self.rates = [], [], []
        self.pending, self.bad = deque(), torch.zeros((), device=self.place.device)
        self.enter_stage(0)

    def enter_stage(self, index):
        """Switch the attention and the data for a stage."""
        self.stage_index, self.mark = index, None
        if not self.stages:
            return
        stage = self.stages[index]
        self.model.set_attention(stage.attention)
        self.sampler = self.data(index, stage)
        rows = stage.batch // self.settings.accumulate
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * stage.context

    def train_step(self):
        """Take one step.

        Returns:
            loss in nats as a tensor, of which a GPU may not know the value yet.

        Raises:
            FloatingPointError: the loss or the gradient was not finite, at this step or
                since the last look at them; the model is as before the first such step.
        """
        while self.step >= sum(s.steps for s in self.stages[: self.stage_index + 1]):
            self.flush()
            self.enter_stage(self.stage_index + 1)
        self.mark = self.mark or (self.step, time.monotonic())
        self.model.train()
        rate = learning_rate(self.step, self.total, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.next_batch()
        loss, parts = self.backward(*batch)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.clip
        )
        # Once something is not finite, the optimiser skips all that follows.
        self.bad = torch.maximum(self.bad, 1.0 - torch.isfinite(loss + norm).float())
        self.optimizer.found_inf, self.optimizer.grad_scale = self.bad, None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending.append((loss, norm, parts, batch))
        self.step += 1
        if not self.place.is_gpu or self.step % self.settings.log_every == 0:
            self.flush()
        return loss

    def next_batch(self):
        """Return tokens and targets, (batch, context), and the number that counts."""
        stage = self.stages[self.stage_index]
        tokens, targets = self.sampler.next_batch()
        counted = max(1, int((targets != IGNORED).sum()))
        shape = stage.batch, stage.context
        tokens, targets = (self.place.put(x.reshape(shape)) for x in (tokens, targets))
        return tokens, targets, counted

    def backward(self, tokens, targets, counted):
        """Add up the gradients of a batch; return its loss and those of its parts."""
        rows = len(tokens) // self.settings.accumulate
        total, kept = 0.0, []
        for some in zip(tokens.split(rows), targets.split(rows), strict=True):
            with self.place.autocast():
                losses = self.losses_of(*some, self.cu_seqlens)
            loss = losses.sum() / counted
            loss.backward()
            total = total + loss.detach()
            kept.append(by_part(losses.detach(), some[1]))
        sums, counts = torch.stack(kept).sum(0)
        return total, sums / counts

    def flush(self):
        """Wait for the device, and look at the losses since the last time.

        Raises:
            FloatingPointError: as in `train_step`.
        """
        if not self.pending:
            return
        losses, norms, parts, _ = zip(*self.pending, strict=True)
        losses, norms = (torch.stack(x).tolist() for x in (losses, norms))
        good = np.isfinite(losses) & np.isfinite(norms)
        if not good.all():
            self.explain(int(good.argmin()), losses, norms)
        self.losses += losses
        self.parts += torch.stack(parts).tolist()
        self.pending.clear()
        self.measure_rate()

    def measure_rate(self):
        """Note the tokens per second since the last mark, at the steps of the curve."""
        (step, then), now = self.mark, time.monotonic()
        if self.step % self.settings.log_every and self.step < self.total:
            return
        stage = self.stages[self.stage_index]
        tokens = (self.step - step) * stage.batch * stage.context
        self.rates.append(tokens / max(now - then, 1e-9))
        self.mark = None

    def explain(self, index, losses, norms):
        """Raise the error of the step of `pending` that was the first to go wrong."""
        step = self.step - len(losses) + index
        tokens, targets, _ = self.pending[index][3]
        rate = learning_rate(step, self.total, self.settings)
        with self.place.autocast():
            where = first_not_finite(self.model, tokens, targets)
        saved = "there is no checkpoint yet"
        if self.saved:
            saved = (
                f"the last good checkpoint is {self.saved[0]} of step {self.saved[1]}"
            )
        raise FloatingPointError(
            f"expected a finite loss and gradient, got a loss of {losses[index]} and a "
            f"gradient of norm {norms[index]} at step {step} with learning rate "
            f"{rate:.2g}; first not finite: {where}; {saved}; lower --lr or lengthen "
            "--warmup, then start again or --resume from the last checkpoint"
        )

    def save(self, folder):
        """Write the checkpoint and the loss curve, each whole or not at all."""
        self.flush()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slot.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["parts"] = torch.tensor(self.parts, dtype=torch.float32)
        state = {
            "args": self.record,
            "settings": settings_json(self.settings),
            "step": self.step,
            "stage": self.stage_index,
            "sampler": self.sampler.state_dict() if self.stages else None,
            "seconds": self.seconds,
            "rates": self.rates,
        }
        data = safetensors.torch.save(tensors, {"state": json.dumps(state)})
        write_atomically(folder / LAST, data)
        write_atomically(folder / CURVE, self.curve().encode())
        self.saved = folder / LAST, self.step

    def load(self, folder):
        """Continue from what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no checkpoint.
            ValueError: the checkpoint is of a run with other settings.
        """
        tensors, state = read_checkpoint(folder)
        expected = self.record, settings_json(self.settings)
        if expected != (state["args"], state["settings"]):
            raise ValueError(
                f"expected a checkpoint of this run in {folder}, got one of a run with "
                "other settings; name another folder, or delete that one"
            )
        if self.stages:
            self.enter_stage(state["stage"])
            self.sampler.load_state_dict(state["sampler"])
        self.pending.clear()
        self.bad.zero_()
        self.step, self.seconds = state["step"], state["seconds"]
        self.rates = state["rates"]
        self.losses = tensors.pop("losses").tolist()
        self.parts = tensors.pop("parts").tolist()
        model, slots = {}, {}
        for name, tensor in tensors.items():
            if name.startswith("model."):
                model[name.removeprefix("model.")] = tensor
            else:
                _, index, key = name.split(".")
                slots.setdefault(int(index), {})[key] = tensor
        self.model.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.saved = folder / LAST, self.step

    @property
    def tokens_per_second(self):
        """Median over the rows of the curve, in which a slow start does not count."""
        return float(np.median(self.rates)) if self.rates else math.nan

    def curve(self):
        """Return the loss curve as CSV, one row per `log_every` steps."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["step", "bytes", "attention", "context", "bits_per_byte"])
        done = seen = 0
        for stage in self.stages:
            kinds = stage.attention
            kinds = kinds if isinstance(kinds, str) else " ".join(kinds)
            losses = self.losses[done : done + stage.steps]
            for first in range(0, len(losses), self.settings.log_every):
                part = losses[first : first + self.settings.log_every]
                seen += len(part) * stage.batch * stage.context
                bits = f"{np.mean(part) / math.log(2):.4f}"
                step = done + first + len(part)
                rows.writerow([step, seen, kinds, stage.context, bits])
            done += stage.steps
        return out.getvalue()


def by_part(losses, targets):
    """Sum losses over equal parts of the context.

    Args:
        losses: (B, S) nats, 0 where the target does not count.
        targets: (B, S).

    Returns:
        (2, PARTS): sums, and how many targets count; one part where PARTS does not
        divide S.

    >>> losses, targets = torch.ones(1, 32), torch.zeros(1, 32)
    >>> by_part(losses, targets)[:, 0].tolist()
    [2.0, 2.0]
    """
    parts = PARTS if losses.shape[1] % PARTS == 0 else 1
    pair = torch.stack([losses, (targets != IGNORED).to(losses.dtype)])
    sums = pair.unflatten(2, (parts, -1)).sum((1, 3))
    return sums.expand(2, PARTS)


def settings_json(settings):
    """Return `Settings` as JSON, to compare with that of a checkpoint."""
    return json.loads(json.dumps(asdict(settings)))


def read_checkpoint(folder):
    """Return the tensors and the state that `Trainer.save` wrote.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    path = folder / LAST
    if not path.exists():
        raise FileNotFoundError(
            f"expected a checkpoint at {path} to resume from, found none; start "
            "without --resume, or name the run's folder with --out"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["state"])
