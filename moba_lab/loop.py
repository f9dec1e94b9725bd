"""Run a trainer to its end, or to a signal or a deadline, and save on the way."""

import math
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

FINISHED, INTERRUPTED, OUT_OF_TIME = "finished", "interrupted", "out of time"


@dataclass(frozen=True)
class Saving:
    """When a run is saved, besides at its end and when it is stopped.

    steps: after so many steps; None means not by steps.
    seconds: after so many seconds.
    deadline: value of `time.monotonic()` at which to save and stop; None means never.
    """

    steps: int | None = None
    seconds: float = math.inf
    deadline: float = math.inf

    def is_due(self, step, seconds):
        """Say whether to save after this step, so long after the last time."""
        by_steps = self.steps and step % self.steps == 0
        return bool(by_steps or seconds > self.seconds)


class Signals:
    """Note the first Ctrl-C instead of raising it, so that a step is never cut.

    The second one raises KeyboardInterrupt, as always. Outside the main thread signals
    cannot be caught, and nothing changes.
    """

    def __enter__(self):
        self.came = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        self.restore()

    def note(self, *_):
        """Remember that a signal came; the next one acts as it did before."""
        self.came = True
        self.restore()

    def restore(self):
        """Put the handlers of before back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def run(trainer, folder, saving, log=None, label="", quiet=False):
    """Train to the last step, with checkpoints in between.

    Args:
        trainer: `moba_lab.trainer.Trainer`, new or loaded.
        folder: Path where it is saved.
        saving: `Saving`.
        log: function of a trainer, called after every row of its curve.
        label: words before the progress bar.
        quiet: show no progress bar.

    Returns:
        FINISHED, INTERRUPTED or OUT_OF_TIME; the run is saved in any case.
    """
    folder, before, start = Path(folder), trainer.seconds, time.monotonic()
    saved, state = start, FINISHED
    bar = tqdm(
        desc=label or None,
        total=trainer.total,
        initial=trainer.step,
        unit="step",
        mininterval=1.0,
        disable=quiet,
    )
    with Signals() as signals, bar:
        while trainer.step < trainer.total:
            if signals.came or time.monotonic() > saving.deadline:
                state = INTERRUPTED if signals.came else OUT_OF_TIME
                break
            trainer.train_step()
            now = time.monotonic()
            trainer.seconds = before + now - start
            show(bar, trainer)
            if log and trainer.step % trainer.settings.log_every == 0:
                log(trainer)
            if saving.is_due(trainer.step, now - saved):
                trainer.save(folder)
                saved = time.monotonic()
        trainer.flush()
        trainer.seconds = before + time.monotonic() - start
        trainer.save(folder)
    return state


def show(bar, trainer):
    """Move the progress bar on, with the last loss that the host knows."""
    bar.update(trainer.step - bar.n)
    if trainer.losses:
        bar.set_postfix_str(
            f"{trainer.losses[-1] / math.log(2):.3f} bits per byte", refresh=False
        )


def tensorboard(folder, first_step):
    """Return a `log` for `run` that writes TensorBoard's files.

    Args:
        folder: where they go.
        first_step: step of the run; what was written of later ones is dropped.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "expected TensorBoard for --tensorboard, found none; install it with "
            "pip install 'moba-notebooks[train]', or leave the option out"
        ) from error
    writer = SummaryWriter(folder, purge_step=first_step)

    def log(trainer):
        step, every = trainer.step, trainer.settings.log_every
        trainer.flush()
        recent = trainer.losses[-every:]
        writer.add_scalar("loss/nats", sum(recent) / len(recent), step)
        writer.add_scalar("loss/first part", trainer.parts[-1][0], step)
        writer.add_scalar("loss/last part", trainer.parts[-1][-1], step)
        writer.add_scalar("tokens per second", trainer.rates[-1], step)
        writer.add_scalar(
            "learning rate", trainer.optimizer.param_groups[0]["lr"], step
        )
        writer.flush()

    return log
