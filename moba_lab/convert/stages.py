"""Train one stage with the library's `Trainer`, so that it can be stopped at any time.

The library writes a checkpoint file by file. A note is put into its folder when the
last file is there, and only folders with a note are gone on with.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from moba_lab.card import write_atomically
from moba_lab.convert import checks, texts
from moba_lab.convert import model as models

NOTE = "whole"
# The learning rate rises for a twentieth of a stage, and falls to a tenth.
WARMUP, FLOOR = 0.05, 0.1


@dataclass(frozen=True)
class Job:
    """What all stages of a run have in common.

    folder: Path of its files.
    stages: tuple of `moba_lab.settings.Stage`.
    settings: of MoBA.
    tokens: (n,) int32 to train on.
    held_out: list of bytes to measure on.
    tuning: rows to fine-tune on, or None.
    tokenizer: of the model.
    place: `moba_lab.place.Place`.
    rate: peak learning rate.
    args: the command's options.
    """

    folder: Path
    stages: tuple
    settings: dict
    tokens: object
    held_out: list
    tuning: list | None
    tokenizer: object
    place: object
    rate: float
    args: object

    def model_of(self, index):
        """Return where the trained model of a stage goes."""
        if index == len(self.stages) - 1:
            return self.folder / "model"
        return self.folder / f"stage-{index + 1}" / "model"

    @property
    def longest(self):
        """Tokens of the longest stage."""
        return max(stage.context for stage in self.stages)


def run_stage(job, index, start, signals=None):
    """Train a stage to its end, or to Ctrl-C, from where it was stopped.

    Args:
        job: `Job`.
        index: of the stage.
        start: name or folder of the model that it starts from.
        signals: `moba_lab.loop.Signals`; the first one stops it after its step.

    Returns:
        Path of the folder of the trained model, None where it was interrupted.
    """
    stage = job.stages[index]
    folder = job.folder / f"stage-{index + 1}"
    done = job.model_of(index)
    if done.exists():
        return done
    settings = None if stage.attention == "full" else job.settings
    model = load_for(job, index, start)
    models.switch(model, settings)
    if job.args.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    watch = Watch(job, index, folder, settings, signals)
    trainer = Trainer(
        model=model,
        args=arguments(job, stage, folder / "checkpoints"),
        train_dataset=data_of(job, index),
        data_collator=texts.collate,
        callbacks=[watch],
    )
    if job.args.quiet:
        trainer.remove_callback(PrinterCallback)
    checkpoint = newest(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if watch.interrupted:
        return None
    models.save(trainer.model, job.tokenizer, done)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return done


def load_for(job, index, start):
    """Load the model of a stage; its positions reach to the run's longest stage.

    Paper: section 3.3, positions are interpolated once, at the first longer stage.
    """
    _, text = models.load_config(start)
    longer = job.stages[index].context > text.max_position_embeddings
    half = job.args.lora and job.place.precision == "bf16"
    return models.load(
        start,
        longest=job.longest if longer else None,
        lora=job.args.lora,
        dtype=torch.bfloat16 if half else torch.float32,
        seed=job.args.seed,
    )


def data_of(job, index):
    """Return what a stage reads."""
    stage = job.stages[index]
    if stage.attention == "tune":
        return texts.answers(job.tokenizer, job.tuning, stage.context)
    return texts.Windows(job.tokens, stage.context, job.args.seed + index)


def arguments(job, stage, folder):
    """Return the library's arguments of a stage."""
    micro = min(job.args.micro_batch, stage.batch)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch // micro,
        learning_rate=job.rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FLOOR},
        warmup_steps=round(WARMUP * stage.steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=job.place.precision == "bf16",
        use_cpu=job.place.device == "cpu",
        seed=job.args.seed,
        save_steps=job.args.save_every,
        # One that is whole stays while the next is written.
        save_total_limit=2,
        logging_steps=10,
        disable_tqdm=job.args.quiet,
        report_to=[],
        dataloader_pin_memory=job.place.is_gpu,
    )


def newest(folder):
    """Return the newest whole checkpoint below a folder, or None."""
    folders = sorted(
        (int(path.parent.name.rpartition("-")[2]), path.parent)
        for path in folder.glob(f"checkpoint-*/{NOTE}")
    )
    return folders[-1][1] if folders else None


class Watch(TrainerCallback):
    """Look at a stage on the way: held-out losses, signals, whole checkpoints.

    Args:
        job: `Job`.
        index: of the stage.
        folder: Path of the stage's files.
        settings: of the attention that is trained; None in full.
        signals: `moba_lab.loop.Signals`, or None.
    """

    def __init__(self, job, index, folder, settings, signals=None):
        self.job, self.stage, self.settings = job, job.stages[index], settings
        self.index, self.path = index, folder / "checks.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else []
        self.windows = texts.held_out_windows(
            job.tokenizer, job.held_out, self.stage.context, job.args.windows
        )
        self.interrupted, self.loss, self.began = False, None, time.monotonic()
        self.signals = signals

    def on_train_begin(self, args, state, control, model=None, **others):
        """Forget the checks after the checkpoint, or make the first one."""
        self.rows = [row for row in self.rows if row["step"] <= state.global_step]
        if not self.rows:
            self.check(model, 0)

    def on_log(self, args, state, control, logs=None, **others):
        """Note the training loss."""
        self.loss = logs.get("loss", self.loss)

    def on_step_end(self, args, state, control, model=None, **others):
        """Check where that is due, and stop where a signal or the gap says so."""
        step, last = state.global_step, state.global_step >= state.max_steps
        if step % self.job.args.check_every == 0 or last:
            self.check(model, step)
            if self.settings is not None and self.job.args.stop_gap is not None:
                at = self.job.args.stop_gap
                control.should_training_stop |= checks.may_stop(self.rows, at)
        if self.signals and self.signals.came and not last:
            self.interrupted = control.should_training_stop = control.should_save = True
        return control

    def on_save(self, args, state, control, **others):
        """Note that every file of a checkpoint is there."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomically(folder / NOTE, b"")

    def check(self, model, step):
        """Measure held-out losses, and keep them at once."""
        found = checks.measure(model, self.windows, self.job.settings, self.settings)
        before = sum(
            s.steps * s.batch * s.context for s in self.job.stages[: self.index]
        )
        stage = self.stage
        row = {
            "stage": self.index + 1,
            "trained": stage.attention,
            "length": stage.context,
            "step": step,
            "tokens": before + step * stage.batch * stage.context,
            "train_loss": self.loss,
            "seconds": time.monotonic() - self.began,
            **found,
        }
        self.rows = [r for r in self.rows if r["step"] < step] + [row]
        write_atomically(self.path, json.dumps(self.rows, indent=1).encode())
