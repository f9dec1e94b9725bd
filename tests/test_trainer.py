"""What a trainer does at a step: accumulate, mask, skip and explain, on any data."""

import json
import math

import numpy as np
import pytest
import torch

from moba_lab.diagnose import first_not_finite
from moba_lab.flops import matrix_parameters, pairs, training_flops
from moba_lab.hub import load_dataset_corpus
from moba_lab.loop import FINISHED, Saving, run, tensorboard
from moba_lab.model import Config, Model
from moba_lab.place import Place, choose_place, peak_flops
from moba_lab.settings import Settings, Stage
from moba_lab.trainer import IGNORED, LAST, PARTS, Trainer

CONFIG = Config(
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    hidden=16,
    context=32,
    block_size=8,
    topk=2,
    attention=("moba", "full"),
)
STAGE = Stage(("moba", "full"), 32, 4, 6)


class Numbers:
    """Random tokens that are their own targets, some of which do not count."""

    def __init__(self, batch, context, masked=0.0):
        self.rng, self.size, self.masked = (
            np.random.default_rng(0),
            batch * context,
            masked,
        )

    def next_batch(self):
        tokens = self.rng.integers(1, 256, self.size)
        targets = np.where(self.rng.random(self.size) < self.masked, IGNORED, tokens)
        return tokens, targets

    def state_dict(self):
        return self.rng.bit_generator.state

    def load_state_dict(self, state):
        self.rng.bit_generator.state = state


def trainer_of(masked=0.0, place=None, **changed):
    settings = Settings(
        CONFIG, (STAGE,), **({"lr": 0.01, "warmup": 2, "log_every": 3} | changed)
    )
    return Trainer(settings, lambda i, s: Numbers(s.batch, s.context, masked), place)


def train_all(trainer):
    while trainer.step < trainer.total:
        trainer.train_step()
    return trainer


@pytest.mark.parametrize("masked", [0.0, 0.7])
def test_accumulated_batches_are_whole_batches(masked):
    whole = train_all(trainer_of(masked))
    parts = train_all(trainer_of(masked, accumulate=2))
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    np.testing.assert_allclose(parts.parts, whole.parts, rtol=1e-4)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(
            parts.model.state_dict()[name], weight, atol=1e-5, rtol=1e-4
        )


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="--accumulate 3 divides, got 4"):
        trainer_of(accumulate=3)


def test_only_targets_that_count_have_a_loss():
    trainer = trainer_of(masked=0.7)
    tokens, targets = Numbers(4, 32, 0.7).next_batch()
    counts = targets != IGNORED
    tokens = torch.from_numpy(tokens.reshape(4, 32))
    wanted = torch.from_numpy(np.where(counts, targets, 0).reshape(4, 32))
    with torch.no_grad():
        losses = trainer.model.losses(tokens, wanted)
    losses = losses[torch.from_numpy(counts.reshape(4, 32))]
    assert trainer.train_step() == pytest.approx(float(losses.mean()), rel=1e-5)
    [parts] = trainer.parts
    assert len(parts) == PARTS


def test_losses_of_parts_are_those_of_their_positions():
    trainer = trainer_of()
    tokens, targets = Numbers(4, 32).next_batch()
    with torch.no_grad():
        losses = trainer.model.losses(
            *(torch.from_numpy(x.reshape(4, 32)) for x in (tokens, targets))
        )
    trainer.train_step()
    expected = losses.unflatten(1, (PARTS, -1)).mean((0, 2))
    np.testing.assert_allclose(trainer.parts[0], expected, rtol=1e-5)


def test_data_of_any_kind_goes_on_where_it_was(tmp_path):
    whole = train_all(trainer_of(masked=0.5))
    stopped = trainer_of(masked=0.5)
    for _ in range(4):
        stopped.train_step()
    stopped.save(tmp_path)
    resumed = trainer_of(masked=0.5)
    resumed.load(tmp_path)
    assert train_all(resumed).losses == whole.losses
    with pytest.raises(ValueError, match="other settings"):
        trainer_of(lr=0.02).load(tmp_path)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("embedding.weight", "values of embedding"),
        ("layers.1.mlp.up.weight", "values of layers.1.mlp.up"),
        ("layers.0.attention.q_norm.weight", "values of layers.0.attention.q_norm"),
    ],
)
def test_what_is_not_finite_is_named_with_step_and_checkpoint(tmp_path, name, where):
    trainer = trainer_of()
    for _ in range(2):
        trainer.train_step()
    trainer.save(tmp_path)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.get_parameter(name).fill_(math.nan)
    before = trainer.model.layers[0].mlp.down.weight.clone()
    with pytest.raises(FloatingPointError) as caught:
        trainer.train_step()
    message = str(caught.value)
    assert "at step 3 with" in message
    assert f"first not finite: {where};" in message
    assert f"{tmp_path / LAST} of step 2" in message
    assert torch.equal(trainer.model.layers[0].mlp.down.weight, before)
    trainer.load(tmp_path)
    assert train_all(trainer).losses == train_all(trainer_of()).losses


def test_a_gradient_that_is_not_finite_is_named_by_its_layer():
    trainer = trainer_of()

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    up = trainer.model.layers[0].mlp.up
    up.forward = lambda x: Explode.apply(torch.nn.functional.linear(x, up.weight))
    with pytest.raises(FloatingPointError) as caught:
        trainer.train_step()
    # The first in the order of the backward pass that gets such a gradient.
    assert "first not finite: gradients of layers.0.mlp_norm" in str(caught.value)
    assert "gradient of norm nan at step 0" in str(caught.value)


def test_a_finite_model_has_nothing_to_name():
    tokens = torch.arange(32)[None]
    assert "nothing" in first_not_finite(Model(CONFIG), tokens, tokens)


def test_looking_seldom_finds_the_same_step_and_keeps_the_weights_before_it():
    """As on a GPU, where the host looks only once per row of the curve."""
    trainer = trainer_of(place=Late(), log_every=6)
    data = trainer.sampler.next_batch
    weights = []

    def next_batch():
        weights.append(trainer.model.embedding.weight.clone())
        if len(weights) == 4:
            # An infinite rate of one parameter's gradient, for one step only.
            scale = trainer.model.norm.weight
            handle = scale.register_hook(lambda g: (handle.remove(), g * math.inf)[1])
        return data()

    trainer.sampler.next_batch = next_batch
    for _ in range(5):
        trainer.train_step()
    with pytest.raises(FloatingPointError, match="at step 3 with"):
        trainer.train_step()
    assert torch.equal(trainer.model.embedding.weight, weights[3])
    assert not torch.equal(weights[3], weights[2])


class Late(Place):
    """A CPU at which the host looks as seldom as at a GPU."""

    is_gpu = True

    def put(self, array):
        return torch.from_numpy(array)


def test_bf16_trains_and_keeps_weights_in_float32():
    trainer = train_all(trainer_of(place=Place("cpu", "bf16")))
    exact = train_all(trainer_of())
    assert trainer.model.embedding.weight.dtype == torch.float32
    assert trainer.losses != exact.losses
    np.testing.assert_allclose(trainer.losses, exact.losses, rtol=0.02)


@pytest.mark.slow
def test_compiled_models_train_alike():
    torch.set_num_threads(1)
    compiled = train_all(trainer_of(place=Place(compile=True)))
    np.testing.assert_allclose(
        compiled.losses, train_all(trainer_of()).losses, rtol=1e-4
    )


def test_places_that_are_not_there_are_explained():
    assert choose_place("auto").device in ("cpu", "cuda")
    with pytest.raises(ValueError, match="expected a precision of auto, fp32, bf16"):
        choose_place("cpu", "fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="PyTorch finds none; use --device cpu"):
            choose_place("cuda")


def test_the_peak_says_where_it_is_from(monkeypatch):
    peak_flops.cache_clear()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    peak, source = peak_flops(Place("cuda", "bf16"))
    assert (peak, source) == (989e12, "H100 data sheet, dense bf16")
    monkeypatch.setattr("moba_fast.ceilings.matmul_rate", lambda device: 7.0)
    assert peak_flops(Place())[0] == 7.0
    peak_flops.cache_clear()


@pytest.mark.parametrize("kind", ["moba", "full"])
def test_flops_are_those_that_pytorch_counts(kind):
    """Matrices against PyTorch's own counter, pairs against the choice itself."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = Model(CONFIG)
    model.set_attention(kind)
    tokens = torch.randint(256, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model.losses(tokens, tokens).sum().backward()
    matrices, _ = training_flops(CONFIG, kind, 32)
    assert matrices == 6 * matrix_parameters(CONFIG)
    counted = counter.get_flop_counts()["Global"]
    products = sum(
        flops for op, flops in counted.items() if "mm" in str(op).split(".")[1]
    )
    assert products == 64 * matrices
    _, aux = model(tokens[0], return_aux=True)
    read = sum(int((aux[0].weights(query)[0] > 0).sum()) for query in range(32))
    sizes = (8, 2) if kind == "moba" else (32, 1)
    assert pairs(32, *sizes)[0] == read


def test_tensorboard_gets_every_row_of_the_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of()
    log = tensorboard(tmp_path / "tensorboard", 0)
    assert run(trainer, tmp_path, Saving(), log) == FINISHED
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = events.Scalars("loss/nats")
    assert [event.step for event in loss] == [3, 6]
    assert loss[0].value == pytest.approx(np.mean(trainer.losses[:3]), rel=1e-5)


def test_a_dataset_from_a_file_is_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {n}\n" * 9, "other": n} for n in range(20)]
    rows += [{"text": "", "other": 0}, {"text": None, "other": 0}, rows[3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_dataset_corpus(f"json:{path}")
    assert len(corpus.files) == 20
    assert list(corpus.held_out) == ["00", "16"]
    assert corpus.held_out["16"].tobytes() == b"row 16\n" * 9
    with pytest.raises(ValueError, match=r"named 'body' in json:.*got text, other"):
        load_dataset_corpus(f"json:{path}", column="body")
