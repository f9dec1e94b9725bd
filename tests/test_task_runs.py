"""Runs on tasks share what they should, and what they leave behind can be shipped."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from moba_lab.data import Corpus, load_corpus
from moba_lab.experiments import needle, recall, results, router
from moba_lab.experiments.task_runs import (
    HELD_OUT_SEED,
    DefinitionBatches,
    NeedleBatches,
    RecallBatches,
    RulerBatches,
    TaskPlan,
    paired_shares,
)
from moba_lab.model import CHECKPOINT, Model, config_json, load_card, load_checkpoint
from moba_lab.settings import Stage
from moba_lab.tasks.export import export
from moba_lab.tasks.haystack import Haystack
from moba_lab.tasks.needle import Needle
from moba_lab.tasks.scoring import exact_matches

PLAN = TaskPlan(
    width=32,
    layers=3,
    block_size=8,
    topk=2,
    first=((64, 4, 6),),
    second=(128, 2, 4),
    seeds=1,
    lr=1e-2,
    head_dim=16,
)
CODE = b"".join(b"def name_%d(x):\n    return x + %d\n" % (n, n) for n in range(200))


def corpus():
    text = np.frombuffer(CODE, np.uint8)
    train = np.concatenate([np.zeros(1, np.uint8), text])
    return Corpus(None, (), train, {"held_out.py": text[::-1].copy(), "b.py": text})


def test_kinds_of_layers():
    assert PLAN.kinds("moba") == ("moba",) * 3
    assert PLAN.kinds("hybrid") == ("moba", "moba", "full")


def test_runs_start_from_the_first_run_of_their_seed():
    data = NeedleBatches(5)
    base = PLAN.base("base", 2, data, {"task": "needle"})
    run = PLAN.run("moba", "moba", 2, data, {"task": "needle"}, base)
    alone = PLAN.run("moba", "moba", 2, data, {})
    assert (base.name, run.name, run.start, alone.start) == (
        "base-2",
        "moba-2",
        "base-2",
        None,
    )
    assert base.settings.stages == (Stage(("full",) * 3, 64, 4, 6),)
    assert run.settings.stages == (Stage(("moba",) * 3, 128, 2, 4),)
    assert run.settings.lr == alone.settings.lr / 2
    assert base.labels == {"task": "needle", "attention": "base"}
    Model(base.settings.config).load_state_dict(Model(run.settings.config).state_dict())


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("module", [needle, recall, router])
def test_models_of_runs_take_the_weights_they_start_from(module, size):
    runs = {run.name: run for run in module.runs(size)}
    shapes = {}
    with torch.device("meta"):
        for name, run in runs.items():
            state = Model(run.settings.config).state_dict()
            shapes[name] = {k: v.shape for k, v in state.items()}
    for name, run in runs.items():
        if run.start:
            assert shapes[name] == shapes[run.start]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (NeedleBatches(5), 129),
        (DefinitionBatches(), 400),
        (RulerBatches(("single", "multi-key")), 129),
        (RecallBatches(4, 60), 129),
    ],
)
def test_batches_are_the_same_for_all_runs_of_a_seed(data, length):
    stage = Stage("moba", length - 1, 2, 4)
    one, same, other = (data(corpus(), 0, stage, seed) for seed in (0, 0, 1))
    (a, _), (b, _), (c, _) = (sampler.next_batch() for sampler in (one, same, other))
    assert (a == b).all()
    assert not (a == c).all()
    held_out = data.held_out(corpus(), length, 3)
    again = data.held_out(corpus(), length, 2)
    assert all(
        (x.row(length - 1)[0] == y.row(length - 1)[0]).all()
        for x, y in zip(held_out, again, strict=False)
    )
    [last] = data.held_out(corpus(), length, 1, first=2)
    assert (last.row(length - 1)[0] == held_out[2].row(length - 1)[0]).all()
    assert HELD_OUT_SEED > 1000


def test_shares_that_never_differ_are_not_known_to_be_equal():
    same = np.ones((1, 60))
    gap = paired_shares(same, same)
    assert (gap.mean, gap.low, gap.high) == (0, -0.05, 0.05)
    assert gap.over.startswith("60 texts")
    some = same.copy()
    some[0, :30] = 0
    gap = paired_shares(some, same)
    assert gap.low < gap.mean == -0.5 < gap.high < -0.3


def test_an_exported_run_can_be_loaded_and_tells_how_it_was_made(tmp_path):
    model = Model(PLAN.config("moba"))
    csv = tmp_path / "small" / "needle.csv"
    folder = csv.with_suffix("") / "needle-moba-0"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(
        model.state_dict(),
        folder / "model.safetensors",
        {"config": config_json(model.config)},
    )
    row = {"task": "needle", "seed": 0, "command": "python -m one"}
    made = row | {"run": "needle-moba-0", "attention": "moba", "recall": [0.5, 1.0]}
    rows = [made | {"length": 64, "score": 1.0}, made | {"length": 128, "score": 0.5}]
    base = row | {"run": "base", "attention": "base", "command": "python -m first"}
    results.write(csv, [*rows, base])
    path = tmp_path / "needle.safetensors"
    export(csv, "needle-moba-0", path)
    loaded = load_checkpoint(path)
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0.01, atol=0)
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["command"], card["starts from"]) == (
        "python -m one",
        "python -m first",
    )
    assert [of["score"] for of in card["measured"]] == [1.0, 0.5]
    with pytest.raises(ValueError, match="found none"):
        export(csv, "needle-full-0", path)


def test_the_shipped_model_finds_keys_and_has_a_card():
    path = CHECKPOINT.with_name("needle.safetensors")
    model, card = load_checkpoint(path), load_card(path)
    assert card["config"] == json.loads(config_json(model.config))
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["command"].startswith("python -m moba_lab.experiments needle ")
    haystack = Haystack(list(load_corpus().held_out.values()))
    asked = [Needle(haystack)(np.random.default_rng(n), 160) for n in range(20)]
    # A guess is right once in 30,240 times.
    assert exact_matches(model, asked).mean() > 0.4
    assert path.stat().st_size < 300_000
