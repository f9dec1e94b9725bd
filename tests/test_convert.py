"""A dense model is switched, trained on, stopped at any time, and loaded again."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from hf_models import CONFIGS, make
from packaging.version import Version
from safetensors.torch import load_file
from test_export import write
from transformers import AutoModelForCausalLM, AutoTokenizer

import moba_fast.hf
from moba_lab.convert import __main__ as command
from moba_lab.convert import checks, coverage, model, stages, texts
from moba_lab.convert.figure import figure
from moba_lab.experiments import results
from moba_lab.export import byte_tokenizer, export
from moba_lab.model import CHECKPOINT
from moba_ref.definition import token_mask

SIZES = ["--block-size", "4", "--topk", "2", "--full-layers=-1", "--lr", "0.01"]
FEW = ["--windows", "2", "--check-every", "2", "--save-every", "2", "--quiet"]
# Whether the library reads a model's attention from its file.
READS_ATTENTION = Version(transformers.__version__) >= Version("5.24")
STAGES = ["--stage", "full:16:2:3", "moba:64:2:6"]
KINDS = "moba", "full"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    export(write(folder)[1], folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(20):
        lines = (f"def name_{n}_{i}(): return {i}\n" for i in range(10))
        (folder / f"{n:02}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(start, data):
    """Return a function that runs a command."""

    def run(out, *more, base=(*STAGES, *SIZES)):
        words = ["--model", str(start), "--data", str(data), "--out", str(out)]
        words += ["--device", "cpu", *FEW, *base, *more]
        return command.main(list(map(str, words)))

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out, "--control") == 0
    return out


def weights(out, kind="moba"):
    return load_file(out / kind / "model" / "model.safetensors")


def rows(out):
    """Return the rows of a run without what differs between two that are the same."""
    gone = ("seconds", "date", "command")
    found = results.read(out / "checks.csv")
    return [{k: v for k, v in row.items() if k not in gone} for row in found]


def assert_same_run(out, whole):
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(out)[name], tensor), name
    assert rows(out) == [row for row in rows(whole) if row["run"] == "moba"]


@pytest.mark.parametrize("after", [2, 4, 6])
def test_a_run_that_was_cut_anywhere_is_the_one_that_never_was(
    run, whole, tmp_path, monkeypatch, after
):
    calls, whole_measure = iter(range(after)), checks.measure

    def measure(*args):
        if next(calls, None) is None:
            raise RuntimeError("cut")
        return whole_measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checks, "measure", measure)
        with pytest.raises(RuntimeError, match="cut"):
            run(tmp_path / "run")
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_half_written_checkpoint_is_passed_over(run, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    saved = []

    def cut(self, args, state, control, **others):
        saved.append(state.global_step)
        if len(saved) == 3:
            raise RuntimeError("cut")
        return on_save(self, args, state, control, **others)

    on_save = stages.Watch.on_save
    with monkeypatch.context() as patch:
        patch.setattr(stages.Watch, "on_save", cut)
        with pytest.raises(RuntimeError, match="cut"):
            run(out)
    assert saved == [2, 3, 2]
    [half] = (out / "moba" / "stage-2" / "checkpoints").iterdir()
    (half / "optimizer.pt").write_bytes(b"half of it")
    assert run(out) == 0
    assert_same_run(out, whole)


def test_a_signal_saves_and_says_so(run, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command.Signals, "__enter__", lambda self: self)
        patch.setattr(command.Signals, "came", True, raising=False)
        patch.setattr(command.Signals, "restore", lambda self: None)
        assert run(tmp_path / "run") == command.STOPPED
    names = {x.name for x in (tmp_path / "run" / "moba").iterdir()}
    assert names == {"stage-1"}
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_what_is_saved_runs_moba_unasked(whole):
    folder = whole / "moba" / "model"
    asked = {} if READS_ATTENTION else {"attn_implementation": "moba"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **asked)
    settings = {"block_size": 4, "topk": 2, "full_layers": [-1], "decode": "full"}
    assert loaded.config._attn_implementation == "moba"
    assert loaded.config.moba == {**settings, "dense": "sdpa"}
    ids = torch.arange(1, 61)[None]
    with torch.no_grad():
        sparse = loaded(ids).logits
        dense = moba_fast.hf.disable(loaded)(ids).logits
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, dense)
    assert (sparse - dense).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [0, 97]


def test_the_checks_are_of_the_saved_model(whole, data):
    [last] = [r for r in results.read(whole / "checks.csv") if r["run"] == "moba"][-1:]
    folder = whole / "moba" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba")
    held = [(data / name).read_bytes() for name in ("00.py", "16.py")]
    windows = texts.held_out_windows(byte_tokenizer(64), held, 64, 2)
    losses = [
        loaded(row[None], labels=row[None]).loss.item()
        for row in torch.from_numpy(windows)
    ]
    assert last["loss_moba"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert last["gap"] == pytest.approx(
        last["trailing_moba"] - last["trailing_full"], abs=1e-4
    )
    assert last["trailing_moba"] == pytest.approx(last["parts_moba"][-1], abs=0.2)


def test_the_control_starts_alike_and_never_runs_moba(whole):
    kinds = {kind: [] for kind in KINDS}
    for row in results.read(whole / "checks.csv"):
        kinds[row["run"]].append(row)
    first = [kinds[kind][0]["loss_full"] for kind in kinds]
    assert first[0] == first[1]
    assert [row["step"] for row in kinds["moba"]] == [0, 2, 3, 0, 2, 4, 6]
    assert {row["trained"] for row in kinds["full"]} == {"full"}
    # Alike until the switch, and not after it.
    apart = [
        kinds["moba"][i]["loss_full"] - kinds["full"][i]["loss_full"] for i in (3, 6)
    ]
    assert apart[0] == 0 != apart[1]
    assert kinds["moba"][-1]["loss_moba"] < kinds["moba"][3]["loss_moba"] - 0.1
    plain = AutoModelForCausalLM.from_pretrained(whole / "full" / "model")
    assert plain.config._attn_implementation == "sdpa"


def test_adapters_alone_are_trained_and_end_up_in_the_weights(run, start, tmp_path):
    out = tmp_path / "run"
    assert run(out, "--lora", 2, "--gradient-checkpointing", "--control") == 0
    before, after = load_file(start / "model.safetensors"), weights(out)
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if "_proj" in k}


def test_a_stage_ends_when_the_gap_is_small(run, tmp_path):
    assert run(tmp_path / "run", "--stop-gap", 100) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 2, 3, 0, 2]


def test_longer_texts_squeeze_the_positions_once(run, tmp_path):
    longer = ["--stage", "full:64:1:1", "full:128:1:1", "moba:256:1:1", *SIZES]
    assert run(tmp_path / "run", base=longer) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "moba" / "model")
    config = loaded.config
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["factor"] == 4
    frequencies = 500.0 ** -(torch.arange(0, 8, 2) / 8) / 4
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, frequencies)
    first = tmp_path / "run" / "moba" / "stage-1" / "model"
    second = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "moba" / "stage-2" / "model"
    ).config
    assert second.rope_parameters["factor"] == 4
    unchanged = AutoModelForCausalLM.from_pretrained(first).config
    assert unchanged.rope_parameters["rope_type"] == "default"


def test_only_answers_count(run, tmp_path):
    path = tmp_path / "answers.json"
    asked = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, asked)))
    more = ["--tune", f"json:{path}", "--stage", "tune:16:2:2"]
    assert run(tmp_path / "run", *more, base=SIZES) == 0
    found = texts.answers(byte_tokenizer(64), asked, 7)
    assert [bytes(row["input_ids"].tolist()) for row in found] == [
        f"\0{n}+1={n + 1}\0".encode() for n in range(9)
    ]
    batch = texts.collate([found[0], {k: v[:-1] for k, v in found[1].items()}])
    assert batch["labels"].tolist() == [
        [-100] * 5 + [ord("1"), 0],
        [-100] * 5 + [ord("2"), -100],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [7, 6]


def test_messages_are_asked_by_the_chat_template():
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
    asked, said = texts.question_and_answer(tokenizer, {"messages": messages})
    assert bytes(asked).strip(b"\0") == b"u:hi;a:"
    assert bytes(said) == b"yo;"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "tests"], "expected a language model at tests; got"),
        (["--stage", "sparse:16:1:1"], "expected full, moba, tune as attention"),
        (["--stage", "tune:16:1:1"], "name them by --tune"),
        (["--stage", "full:16:1:1", "moba:999:1:1"], "tokens together, got"),
        (["--stage", "full:16:1:1", "moba:9999:1:1"], "tokens to train on, got"),
        (["--full-layers=-9"], "full_layers must be from -3 to 2"),
        (["--stage", "moba:64:3:1", "--micro-batch", "2"], "--micro-batch to divide"),
    ],
)
def test_errors_say_what_to_do(run, tmp_path, capsys, more, said):
    assert run(tmp_path / "run", *more) == 2
    assert not (tmp_path / "run" / command.OPTIONS).exists()
    assert said in capsys.readouterr().err


def test_positions_that_cannot_be_longer_are_found_first(start, tmp_path, capsys):
    folder = shutil.copytree(start, tmp_path / "yarn")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    words = ["--model", str(folder), "--out", str(tmp_path / "run")]
    assert command.main([*words, "--stage", "full:16:1:1", "moba:128:1:1"]) == 2
    assert "stay within the model's 64 tokens" in capsys.readouterr().err


def test_another_runs_folder_is_left_alone(run, whole, capsys):
    assert run(whole, "--topk", "3") == 2
    assert "got others for settings, topk; name another folder" in (
        capsys.readouterr().err
    )


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for default in ("build/convert", "paper", "text", 0, 1, 50, 25, 16, "auto"):
        assert f"(default: {default})" in said


def test_a_launcher_of_several_processes_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path / "run") == 2
    assert "expected one process" in capsys.readouterr().err


def test_a_key_convolution_is_refused(tmp_path, capsys):
    needle = CHECKPOINT.with_name("needle.safetensors")
    assert command.main(["--model", str(needle), "--out", str(tmp_path / "run")]) == 2
    assert "key_conv=3" in capsys.readouterr().err


def test_other_scalings_of_positions_are_refused():
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=re.escape("'yarn', which does not combine")):
        model.interpolate(config, 1024)


def test_reading_every_block_leaves_no_gap():
    dense = make("qwen3")
    windows = np.random.default_rng(0).integers(3, 61, (2, 48))
    settings = {"block_size": 4, "topk": 12, "full_layers": [], "decode": "full"}
    found = checks.measure(dense, windows, settings, None)
    assert found["gap"] == pytest.approx(0, abs=1e-4)
    assert dense.config._attn_implementation == "sdpa"
    found = checks.measure(dense, windows, settings | {"topk": 1}, None)
    assert abs(found["gap"]) > 0.1
    assert len(found["parts_moba"]) == 16


def test_the_share_that_is_kept_is_that_of_the_definitions_mask():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(30, h, 8, generator=generator) for h in (4, 2))
    queries, sizes = torch.tensor([3, 17, 29]), {"block_size": 4, "topk": 3}
    mask = token_mask(q.double().numpy(), k.double().numpy(), **sizes)
    mask = torch.from_numpy(mask).transpose(0, 1)[:, queries]
    scores = torch.einsum("qhd,khd->hqk", q[queries], k.repeat_interleave(2, 1))
    scores = scores * 8**-0.5
    later = torch.arange(30) > queries[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    found = coverage.kept(q, k, **sizes, queries=queries)
    torch.testing.assert_close(found, (weights * mask).sum(-1))
    best = coverage.kept(q, k, **sizes, queries=queries, best=True)
    pairs = torch.nn.functional.pad(weights, (0, 2)).unflatten(2, (8, 4)).sum(3)
    expected = pairs[..., 7][:, 2] + pairs[:, 2, :7].topk(2).values.sum(-1)
    torch.testing.assert_close(best[:, 2], expected)
    assert (best >= found - 1e-6).all()


def test_all_layers_are_asked_in_full_attention():
    dense, ids = make("qwen3"), torch.arange(3, 51)
    gate, best = coverage.kept_by_layer(dense, ids, block_size=4, topk=12, last=8)
    assert gate.shape == best.shape == (4, 4)
    torch.testing.assert_close(gate, torch.ones(4, 4))
    assert dense.config._attn_implementation == "sdpa"
    assert not hasattr(dense.config, "moba")


def test_recovery_compares_the_same_texts_with_the_control(whole, run, capsys):
    rows = results.read(whole / "checks.csv")
    moba, full = ([r for r in rows if (r["run"], r["stage"]) == (k, 2)] for k in KINDS)
    lost, left, error = checks.recovery(moba, full)
    assert lost == full[-1]["gap"]
    assert checks.recovery(moba[:-1], full) == checks.recovery(moba[:-1], full[:-1])
    expected = moba[-1]["trailing_moba"] - full[-1]["trailing_full"]
    assert left == pytest.approx(expected, abs=1e-5)
    each = np.subtract(moba[-1]["ends_moba"], full[-1]["ends_full"])
    assert error == pytest.approx(np.std(each, ddof=1) / len(each) ** 0.5)
    assert run(whole, "--control") == 0
    assert f"  {left:.3f} +- {error:.3f} of the model" in capsys.readouterr().out


def test_the_figure_says_what_the_rows_hold(whole):
    rows = results.read(whole / "checks.csv")
    drawn = figure(rows)
    moba = [r for r in rows if (r["run"], r["stage"]) == ("moba", 2)]
    assert f"to {moba[-1]['trailing_moba']:.3f}" in drawn.alt
    last = [r for r in rows if r["run"] == "full"][-1]
    left = moba[-1]["trailing_moba"] - last["trailing_full"]
    assert f"the switch costs {last['gap']:.2f} nats" in drawn.alt
    assert f"after 768 tokens with MoBA {left:.2f} are left" in drawn.alt
    lines = drawn.axes[0].lines
    assert [list(x.get_xdata()) for x in lines] == [[0, 256, 512, 768]] * 4
    alone = figure([row for row in rows if row["run"] == "moba"]).alt
    assert f"{moba[-1]['gap']:.2f} are left, on the same weights" in alone
    with pytest.raises(ValueError, match="rows of a stage of MoBA"):
        figure([row for row in rows if row["run"] == "full"])
