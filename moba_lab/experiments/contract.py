"""What an experiment is made of; `runner.py` does the rest.

A module of this package that defines `EXPERIMENT = Experiment(...)` is found by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from moba_lab.data import BatchSampler, Corpus
from moba_lab.model import Model
from moba_lab.place import Place
from moba_lab.settings import Settings
from moba_lab.trainer import Trainer

SIZES = ("small", "full")


@dataclass(frozen=True)
class Run:
    """One model to train, and what its rows in the results say of it.

    name: unlike all others of the experiment and size; also the folder's name.
    settings: `moba_lab.settings.Settings`. Without stages nothing is trained, and the
        model is measured as it was initialised, or as `start` left it.
    data: called with (corpus, index of a stage, stage, seed), returns the stage's
        batches as `Trainer` wants them. A frozen dataclass, for its repr says whether
        a checkpoint belongs to this run. None where nothing is trained.
    labels: columns that tell this run from others, such as {"attention": "moba"}.
    start: name of the run of this experiment whose last weights this one starts from;
        it has to come earlier. None means freshly initialised by the seed.
    priority: runs of all experiments asked for go in its order, 0 first, so that what
        matters most is there when time runs out.
    """

    name: str
    settings: Settings
    data: Callable | None = None
    labels: dict = field(default_factory=dict)
    start: str | None = None
    priority: int = 0


@dataclass(frozen=True)
class Finished:
    """A run after its last step, for `Experiment.measure`.

    model: in evaluation mode, on the place's device, with the last stage's attention.
    corpus: the text, with its held-out files.
    trainer: holds losses, losses of parts of the context, and speed.
    """

    run: Run
    model: Model
    corpus: Corpus
    place: Place
    trainer: Trainer


@dataclass(frozen=True)
class Experiment:
    """A question, the runs that answer it, what is measured, and the picture.

    name: on the command line.
    question: one sentence.
    runs: function of a size, "small" or "full", that returns its list of `Run`.
    measure: function of a `Finished` that returns its rows, at least one: dicts of
        columns whose values are numbers, strings, or lists of numbers.
    figure: function of rows, as `results.read` returns them, that returns a Figure; it
        may get the rows of any part of the runs, at least one.
    """

    name: str
    question: str
    runs: Callable
    measure: Callable
    figure: Callable


@dataclass(frozen=True)
class TextBatches:
    """Batches of the corpus's training text.

    rename: share of the windows whose names get new spellings.
    whole_files: cut windows within files only, from files that are long enough.
    """

    rename: float = 0.0
    whole_files: bool = False

    def __call__(self, corpus, index, stage, seed):
        """Return the `BatchSampler` of a stage."""
        return BatchSampler(
            corpus.train,
            stage.batch,
            stage.context,
            seed + index,
            self.rename,
            self.whole_files,
        )
