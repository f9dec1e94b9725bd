import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moba_lab import card
from moba_lab.card import byte_losses, compressed_bits, export, write_atomically
from moba_lab.data import load_corpus
from moba_lab.model import Config, Model, load_checkpoint
from moba_lab.options import command_of, parse_args, parse_stage, settings_of
from moba_lab.place import Place
from moba_lab.settings import Stage, learning_rate
from moba_lab.train import STOPPED, main, make_trainer, train
from moba_lab.trainer import CURVE, LAST, read_checkpoint

TINY = [
    *("--layers", "2", "--width", "16", "--heads", "2", "--kv-heads", "1"),
    *("--head-dim", "8", "--hidden", "16", "--block-size", "8", "--topk", "2"),
    *("--warmup", "3", "--threads", "1", "--lr", "0.01", "--log-every", "4"),
]
STAGES = ["--stage", "full:32:2:6", "moba:64:1:6"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        lines = (f"def name_{number}_{i}(): return {i}\n" for i in range(40))
        (folder / f"{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def tiny_args(tmp_path, *more):
    return parse_args([*TINY, *STAGES, "--out", str(tmp_path / "run"), *more])


def test_sigkill_and_resume_give_the_same_run_bit_for_bit(tmp_path, folder):
    options = [
        "--data",
        str(folder),
        *TINY,
        "--stage",
        "full:32:2:150",
        "moba:64:1:150",
    ]
    options += ["--checkpoint-every", "10", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "moba_lab.train", *options, str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 45
    while not (killed / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < read_checkpoint(killed)[1]["step"] < 300
    main(["--out", str(killed), "--resume"])
    main([*options, str(whole)])
    expected, resumed = load_file(whole / LAST), load_file(killed / LAST)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    assert len(resumed["losses"]) == 300
    assert (whole / CURVE).read_text() == (killed / CURVE).read_text()


@pytest.mark.parametrize("stop", [1, 6, 9])
def test_resume_in_and_between_stages(tmp_path, folder, stop):
    stream = load_corpus(folder).train
    torch.set_num_threads(1)
    whole = make_trainer(tiny_args(tmp_path), stream)
    stopped = make_trainer(tiny_args(tmp_path), stream)
    for _ in range(stop):
        stopped.train_step()
    stopped.save(tmp_path / "run")
    resumed = make_trainer(tiny_args(tmp_path, "--resume"), stream)
    while whole.step < whole.total:
        whole.train_step()
    while resumed.step < resumed.total:
        resumed.train_step()
    assert whole.losses == resumed.losses
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_stages_switch_attention_context_and_batch(tmp_path, folder):
    trainer = make_trainer(tiny_args(tmp_path), load_corpus(folder).train)
    assert trainer.model.config.context == 64
    for _ in range(6):
        trainer.train_step()
        assert trainer.model.attention == ("full", "full")
        assert trainer.cu_seqlens.tolist() == [0, 32, 64]
    trainer.train_step()
    assert trainer.model.attention == ("moba", "moba")
    assert trainer.cu_seqlens.tolist() == [0, 64]


def test_training_lowers_the_loss(tmp_path, folder):
    args = tiny_args(tmp_path, "--stage", "moba:64:2:60")
    trainer = train(args, load_corpus(folder).train)
    assert np.mean(trainer.losses[-5:]) < np.mean(trainer.losses[:5]) - 1


def test_seed_decides_the_run(tmp_path, folder):
    stream = load_corpus(folder).train
    losses = [
        make_trainer(tiny_args(tmp_path, "--seed", seed), stream).train_step()
        for seed in ("0", "0", "1")
    ]
    assert losses[0] == losses[1] != losses[2]


def test_curve_has_a_row_per_group_of_steps(tmp_path, folder):
    trainer = train(tiny_args(tmp_path), load_corpus(folder).train)
    rows = (tmp_path / "run" / CURVE).read_text().splitlines()
    assert rows[0] == "step,bytes,attention,context,bits_per_byte"
    cells = [row.split(",") for row in rows[1:]]
    assert [cell[:4] for cell in cells] == [
        ["4", "256", "full", "32"],
        ["6", "384", "full", "32"],
        ["10", "640", "moba", "64"],
        ["12", "768", "moba", "64"],
    ]
    mean = np.mean(trainer.losses[6:10]) / math.log(2)
    assert float(cells[2][4]) == pytest.approx(mean, abs=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, folder):
    trainer = make_trainer(tiny_args(tmp_path), load_corpus(folder).train)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.norm.weight[0] = torch.inf
    before = trainer.model.embedding.weight.clone()
    with pytest.raises(FloatingPointError, match=r"at step 1 .*lower --lr"):
        trainer.train_step()
    assert torch.equal(trainer.model.embedding.weight, before)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_resume_without_a_checkpoint_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        tiny_args(tmp_path, "--resume")


def test_resume_takes_the_settings_of_the_run(tmp_path, folder):
    train(tiny_args(tmp_path, "--seed", "7"), load_corpus(folder).train)
    args = parse_args(["--out", str(tmp_path / "run"), "--resume"])
    assert (args.seed, args.width, args.stage) == (7, 16, STAGES[1:])


@pytest.mark.parametrize("text", ["moba:64:1", "moba:64:1:x", "moba", "moba:64:1:2:3"])
def test_a_stage_that_cannot_be_read_is_explained(text):
    with pytest.raises(ValueError, match="ATTENTION:CONTEXT:BATCH:STEPS"):
        parse_stage(text)


def test_stage_with_a_kind_per_layer():
    assert parse_stage("moba,full:64:1:2") == Stage(("moba", "full"), 64, 1, 2)


def test_learning_rate_rises_and_falls():
    settings = settings_of(parse_args(["--lr", "2.0", "--warmup", "10"]))
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) >= 0.1


def test_command_makes_the_same_run(tmp_path):
    args = tiny_args(tmp_path)
    command = command_of(args)
    assert command.startswith("python -m moba_lab.train --stage full:32:2:6 moba:64:")
    again = parse_args([*command.split()[3:], "--out", str(args.out)])
    assert again == args


def test_export_writes_model_card_and_curve(tmp_path, folder):
    corpus = load_corpus(folder)
    trainer = train(tiny_args(tmp_path), corpus.train)
    path = tmp_path / "model.safetensors"
    export(trainer, "python -m moba_lab.train", corpus, path)
    model = load_checkpoint(path)
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=0, rtol=0.01)
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["command"] == "python -m moba_lab.train"
    assert written["held-out bytes"] == sum(map(len, corpus.held_out.values()))
    assert written["training"]["bytes read"] == 6 * 64 + 6 * 64
    bits = sum(byte_losses(model, text).sum() for text in corpus.held_out.values())
    expected = bits / written["held-out bytes"]
    assert written["bits per byte"]["model, per file"] == pytest.approx(expected, 1e-3)
    assert path.with_suffix(".csv").read_text() == trainer.curve()


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 30, 64, 65, 200])
def test_byte_losses_count_every_byte_once(n):
    torch.manual_seed(0)
    model = Model(Config(width=16, heads=2, kv_heads=1, head_dim=8, context=64))
    text = np.random.default_rng(0).integers(1, 256, n).astype(np.uint8)
    bits = byte_losses(model, text, pack=2)
    tokens = torch.tensor([0, *text.tolist()])
    for byte in range(n):
        windows_after_first = max(0, math.ceil((byte - 63) / 32))
        end = min(n, 64 + 32 * windows_after_first)
        start = max(0, end - 64)
        nats = model.losses(tokens[start:end], tokens[start + 1 : end + 1])
        expected = float(nats[byte - start]) / math.log(2)
        assert bits[byte] == pytest.approx(expected, rel=1e-4), byte


def test_compressed_bits_are_those_of_the_compressors():
    rng = np.random.default_rng(0)
    source, short = rng.choice([b"def", b"self", b"if", b" "], 3000), bytes(50)
    source = b"".join(source)
    texts = {"a": np.frombuffer(source, np.uint8), "b": np.frombuffer(short, np.uint8)}
    bits = compressed_bits(texts)
    alone = len(zlib.compress(source, 9)) + len(zlib.compress(short, 9))
    joined = len(lzma.compress(source + short, preset=9))
    size = len(source) + len(short)
    assert len(zlib.compress(source, 9)) != len(zlib.compress(source, 1))
    assert bits["zlib level 9"]["per file"] == round(8 * alone / size, 4)
    assert bits["lzma preset 9"]["concatenated"] == round(8 * joined / size, 4)


def test_card_names_the_device_and_the_processor(monkeypatch):
    known = {"device": "NVIDIA H200", "cpu": "Xeon"}
    monkeypatch.setattr(card, "describe_machine", {"cuda": known}.get)
    trainer = SimpleNamespace(place=Place("cuda"), record={"threads": 3})
    expected = {"device": "NVIDIA H200", "processor": "Xeon", "threads": 3}
    assert card.hardware_of(trainer) == expected


def test_ctrl_c_saves_and_resume_finishes_the_same_run(tmp_path, folder):
    command = [sys.executable, "-m", "moba_lab.train", "--data", str(folder), *TINY]
    command += ["--stage", "moba:64:1:400", "--checkpoint-every", "399", "--device"]
    command += ["cpu", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    # The progress bar moves once steps are taken.
    shown = ""
    while "bits per byte" not in shown:
        shown += process.stderr.read(1)
        assert process.poll() is None, shown
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == STOPPED, error
    assert "Traceback" not in error
    step = read_checkpoint(tmp_path / "run")[1]["step"]
    assert f"stopped after {step} of 400 steps" in out
    assert 0 < step < 399
    args = parse_args(["--out", str(tmp_path / "run"), "--resume"])
    resumed = train(args, load_corpus(folder).train)
    whole = make_trainer(parse_args(command[3:]), load_corpus(folder).train)
    while whole.step < whole.total:
        whole.train_step()
    assert whole.losses == resumed.losses
