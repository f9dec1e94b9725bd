"""Experiments: every one for a step, and a run that is killed loses nothing saved."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moba_lab import loop
from moba_lab.data import load_corpus
from moba_lab.experiments import results, runner
from moba_lab.experiments.__main__ import UNFINISHED, main
from moba_lab.experiments.contract import SIZES, Experiment, Run, TextBatches
from moba_lab.experiments.registry import choose, find
from moba_lab.experiments.runner import MODEL, Options, run_all
from moba_lab.experiments.statistics import (
    claim,
    fit_power_law,
    mean_interval,
    paired_difference,
)
from moba_lab.model import Config, Model
from moba_lab.settings import Settings, Stage
from moba_lab.trainer import LAST, read_checkpoint
from moba_lab.viz.style import canvas
from moba_lab.window_loss import whole_windows, window_losses

NAMES = sorted(find())
COLUMNS = {
    *("experiment", "size", "run", "seed", "command", "date", "device", "cpu"),
    *("torch", "python", "numpy", "precision", "digest", "parameters"),
}
CONFIG = Config(
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    hidden=16,
    context=64,
    block_size=8,
    topk=2,
    attention=("moba",) * 2,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        lines = (f"def name_{number}_{i}(): return {i}\n" for i in range(60))
        (folder / f"{number:02}.py").write_text("".join(lines))
    return folder


@pytest.fixture
def options(tmp_path, folder):
    return Options(out=tmp_path / "out", data=str(folder))


def tiny(name="run", steps=6, kind="moba", **changed):
    stages = (Stage(kind, 64, 2, steps),) if steps else ()
    settings = Settings(CONFIG, stages, lr=0.01, warmup=2, log_every=2)
    return Run(name, settings, TextBatches(), **changed)


def experiment(*runs, measure=lambda done: [{"loss": done.trainer.losses[-1]}]):
    def figure(rows):
        return canvas(1)

    return Experiment("tiny", "Does it run?", lambda size: list(runs), measure, figure)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_the_first_run_of_every_experiment(name, tmp_path, folder):
    """In `make test`: the pieces of every experiment fit together."""
    first = choose([name])[0].runs("small")[0]
    command = [name, "--steps", "1", "--only", first.name, "--out", str(tmp_path)]
    assert main([*command, "--data", str(folder)]) == 0
    rows = results.read(tmp_path / "small" / f"{name}.csv")
    assert rows
    for row in rows:
        assert row.keys() >= COLUMNS
        assert (row["experiment"], row["size"]) == (name, "small")
        assert row["steps"] == len(first.settings.stages)
    assert (tmp_path / "small" / f"{name}.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_in_its_small_size(name, tmp_path):
    torch.set_num_threads(2)
    assert main([name, "--out", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "small" / f"{name}.csv")
    runs = choose([name])[0].runs("small")
    assert {row["run"] for row in rows} == {run.name for run in runs}
    fig = choose([name])[0].figure(rows)
    assert fig.alt


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_runs_have_names_of_their_own_and_come_after_those_they_need(name, size):
    runs = choose([name])[0].runs(size)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) > 0
    ordered = sorted(runs, key=lambda run: run.priority)
    for place, run in enumerate(ordered):
        assert Path(run.name).name == run.name
        before = {other.name for other in ordered[:place]}
        assert run.start is None or run.start in before
        for stage in run.settings.stages:
            assert repr(run.data) == repr(replace(run.data))
            assert stage.steps > 0


def test_kill_and_run_again_finish_the_experiment_bit_for_bit(tmp_path, folder):
    """The command is killed at a moment of its own choosing and simply run again."""
    first = choose(["trailing"])[0].runs("small")[0].name
    options = ["--only", first, "--steps", "12", "--device", "cpu"]
    options += ["--data", str(folder), "--save-seconds", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["trailing", *options, "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moba_lab.experiments", *command, str(killed)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = Path("small") / "trailing" / first
    deadline = time.monotonic() + 60
    while not (killed / run / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = read_checkpoint(killed / run)[1]["step"]
    assert 0 < step < 12
    assert not results.read(killed / "small" / "trailing.csv")
    assert main([*command, str(killed)]) == main([*command, str(whole)]) == 0
    one, other = (
        results.read(out / "small" / "trailing.csv")[0] for out in (whole, killed)
    )
    assert one["losses_by_file"] == other["losses_by_file"]
    assert one["digest"] == other["digest"]
    weights = [load_file(out / run / MODEL) for out in (whole, killed)]
    assert all(torch.equal(weights[0][x], weights[1][x]) for x in weights[0])


def test_what_is_there_is_skipped_and_what_changed_is_made_again(options):
    one, two = tiny("one"), tiny("two")
    assert set(run_all([experiment(one)], options).values()) == {loop.FINISHED}
    states = run_all([experiment(one, two)], options)
    assert states == {("tiny", "one"): "skipped", ("tiny", "two"): loop.FINISHED}
    changed = tiny("one", steps=8)
    states = run_all([experiment(changed, two)], options)
    assert states == {("tiny", "one"): loop.FINISHED, ("tiny", "two"): "skipped"}
    rows = results.read(options.out / "small" / "tiny.csv")
    assert [(row["run"], row["steps"]) for row in rows] == [("two", 6), ("one", 8)]


def test_a_run_that_fails_does_not_stop_the_others(options, capsys):
    def measure(done):
        if done.run.name == "bad":
            raise ValueError("no such thing")
        return [{"loss": 1.0}]

    states = run_all([experiment(tiny("bad"), tiny("good"), measure=measure)], options)
    assert states["tiny", "bad"] == "failed: no such thing"
    assert states["tiny", "good"] == loop.FINISHED
    assert "no such thing" in capsys.readouterr().err
    trained = options.out / "small" / "tiny" / "bad" / LAST
    assert read_checkpoint(trained.parent)[1]["step"] == 6


def test_processes_share_the_runs_and_none_is_made_twice(options, monkeypatch, capsys):
    """While the first run is made, another process makes what does not wait for it."""
    made = []

    def wait(seconds):
        raise TimeoutError("nothing left but what others make")

    def measure(done):
        made.append(done.run.name)
        if made == ["a"]:
            with pytest.raises(TimeoutError, match="nothing left"):
                run_all([shared], options)
            assert made == ["a", "c"]
        return [{"loss": 1.0}]

    monkeypatch.setattr(runner.time, "sleep", wait)
    shared = experiment(tiny("a"), tiny("b", start="a"), tiny("c"), measure=measure)
    states = run_all([shared], options)
    assert [states["tiny", x] for x in "abc"] == [loop.FINISHED] * 2 + ["skipped"]
    assert made == ["a", "c", "b"]
    assert "Traceback" not in capsys.readouterr().err


def test_time_that_runs_out_saves_and_stops(options):
    late = replace(options, deadline=time.monotonic() - 1)
    states = run_all([experiment(tiny())], late)
    assert states == {("tiny", "run"): loop.OUT_OF_TIME}
    assert not results.read(options.out / "small" / "tiny.csv")
    assert main(["trailing", "--budget", "0", "--out", str(options.out)]) == UNFINISHED


def test_a_run_can_start_from_another_one_s_weights(options):
    found = {}

    def measure(done):
        found[done.run.name] = done.model.norm.weight.clone()
        return [{"loss": 1.0}]

    first, second = tiny("first"), tiny("second", steps=0, start="first")
    run_all([experiment(first, second, measure=measure)], options)
    assert torch.equal(found["first"], found["second"])
    assert not torch.equal(found["first"], torch.ones(16))
    states = run_all(
        [experiment(tiny("other", start="gone"), measure=measure)], options
    )
    assert "make that run first" in states["tiny", "other"]


def test_a_run_that_switches_reads_what_a_run_that_does_not_reads(folder):
    runs = {run.name: run for run in choose(["hybrid"])[0].runs("small")}
    corpus, read = load_corpus(folder), {}
    for name in ("moba-1", "hybrid-1"):
        run = runs[name]
        read[name] = []
        for index, stage in enumerate(run.settings.stages):
            data = run.data(corpus, index, stage, 1)
            read[name] += [data.next_batch()[0] for _ in range(stage.steps)]
    assert len(runs["hybrid-1"].settings.stages) == 2
    np.testing.assert_array_equal(*read.values())
    assert len({batch.tobytes() for batch in read["moba-1"]}) > 50


def test_a_checkpoint_of_another_run_is_refused(options):
    late = replace(options, deadline=time.monotonic() + 0.01)
    run_all([experiment(tiny(steps=2000))], late)
    assert (options.out / "small" / "tiny" / "run" / LAST).exists()
    states = run_all([experiment(tiny(steps=2001))], options)
    assert "other settings" in states["tiny", "run"]


def test_recorded_rows_are_those_of_the_run(options, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RECORDED", tmp_path)
    only = choose(["trailing"])[0].runs("small")[0].name
    command = ["trailing", "--only", only, "--steps", "1", "--out", str(options.out)]
    command += ["--data", options.data]
    assert main(command) == 0
    assert main([*command, "--record", "here"]) == 0
    assert results.recorded("trailing", ["none", "here"]) == results.read(
        options.out / "small" / "trailing.csv"
    )


def test_a_gpus_rows_go_before_those_of_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RECORDED", tmp_path)
    for kind in ("small", "h100", "h200"):
        results.write(tmp_path / f"train_tiny_{kind}.csv", [{"run": kind}])
        assert [row["run"] for row in results.recorded("tiny")] == [kind]


def test_unknown_names_and_devices_are_explained(capsys):
    with pytest.raises(ValueError, match=r"expected an experiment of .*, got 'no'"):
        choose(["no"])
    with pytest.raises(SystemExit):
        main(["trailing", "--device", "tpu"])
    assert 'expected "auto", "cpu" or "cuda"' in capsys.readouterr().err


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{"run": "a", "x": 0.5, "many": [1.0, 2.5]}, {"run": "a", "other": "2.11.0"}]
    results.add(path, rows)
    results.add(path, [{"run": "b", "x": 1}])
    results.add(path, [{"run": "a", "x": 2}])
    assert [(row["run"], row["x"]) for row in results.read(path)] == [
        ("b", 1),
        ("a", 2),
    ]
    results.add(path, rows)
    [_, one, two] = results.read(path)
    assert (one["many"], one["other"], two["other"]) == ((1, 2.5), None, "2.11.0")
    assert one["no such column"] is None


def test_windows_lie_in_one_file_and_losses_in_their_place():
    texts = {"a": np.arange(1, 200, dtype=np.uint8), "b": np.ones(9, np.uint8)}
    windows, files = whole_windows(texts, 64)
    assert windows.shape == (3, 65)
    assert windows[0, 0] == 0
    assert windows[1, 0] == windows[0, -1] == 64
    assert files.tolist() == [0, 0, 0]
    torch.manual_seed(0)
    model = Model(CONFIG).eval()
    losses = window_losses(model, windows, tokens_at_once=65)
    tokens = torch.from_numpy(windows[2])
    expected = model.losses(tokens[:-1], tokens[1:]).detach().numpy()
    np.testing.assert_allclose(losses[2], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 500 bytes, found none"):
        whole_windows(texts, 500)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    seeds = [mean_interval(rng.normal(1, 1, 3), "3 seeds") for _ in range(2000)]
    assert 0.935 < np.mean([i.low <= 1 <= i.high for i in seeds]) < 0.965
    counts = rng.integers(1, 9, 30)
    held = []
    for _ in range(1000):
        gap = 0.1 + rng.normal(0, 0.5, (2, 30)).mean(0, keepdims=True)
        interval = paired_difference(gap, np.zeros((1, 30)), counts)
        held.append(interval.low <= 0.1 <= interval.high)
    assert 0.91 < np.mean(held) < 0.98


def test_claims_are_rounded_to_the_weaker_side():
    interval = mean_interval([0.0001, -0.0001, 0.0011], "3 seeds")
    digits = float(claim(interval, "gap").split("above ")[1].split(" ")[0])
    assert digits >= interval.bound


def test_power_law_is_found_with_an_interval_around_it():
    rng, x = np.random.default_rng(0), np.array([1e12, 1e13, 1e14, 1e15])
    levels = rng.normal(1, 0.05, 20)
    losses = [(3 * c**-0.06) * levels * rng.normal(1, 0.002, (3, 20)) for c in x]
    law = fit_power_law(x, losses, np.ones(20), samples=200)
    assert law.exponent_interval[0] < -0.06 < law.exponent_interval[1]
    assert law.exponent_interval[1] - law.exponent_interval[0] < 0.01
    assert law(1e13) == pytest.approx(3 * 1e13**-0.06, rel=0.05)
