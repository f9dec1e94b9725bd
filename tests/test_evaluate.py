"""The command that measures transformers models: scores, rows that stay, errors."""

import math
import os
import re
import shutil
import sys
from dataclasses import replace

import browser
import numpy as np
import pytest
import torch
from hf_models import make
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import moba_fast.hf
from moba_lab.evaluate import answers, losses, run, supervise, tables, texts
from moba_lab.evaluate.options import read_options
from moba_lab.evaluate.run import Bench, work
from moba_lab.evaluate.statuses import FAILED, INTERRUPTED, WRONG
from moba_lab.evaluate.subject import load
from moba_lab.experiments import results
from moba_lab.notebooks.site import remote_loads
from moba_lab.place import Place
from moba_lab.tasks.haystack import Haystack
from moba_lab.viz import needle_scores

LINES = "".join(f"é_{n} = {n * n}  # 😀\n" for n in range(400))
SMALL = ["--block-size", "32", "--topk", "2", "--full-layers=-1"]
FEW = ["--depths", "2", "--samples", "1", "--windows", "2", "--repeats", "1"]


def byte_tokenizer():
    """Make a tokenizer of single bytes that puts a begin token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {x: i for i, x in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold a tiny model with its tokenizer, and text."""
    folder = tmp_path_factory.mktemp("evaluate")
    make("llama", vocab_size=259, num_hidden_layers=2).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    make("llama").save_pretrained(folder / "bare")
    (folder / "text").mkdir()
    (folder / "text" / "lines.txt").write_text(LINES, encoding="utf-8")
    return folder


def command(folder, out, *more):
    """Return the arguments of a small command."""
    model, data = str(folder / "tiny"), str(folder / "text")
    options = ["--model", model, "--data", data, "--out", str(out), "--device", "cpu"]
    return [*options, "--quiet", *SMALL, *FEW, *more]


def measure(*arguments):
    """Measure in this process."""
    return work(read_options(*arguments))


@pytest.fixture(scope="module")
def subject(folder):
    options = read_options(command(folder, folder, "--lengths", "512"))
    return load(options, Place())


@pytest.fixture
def haystack():
    return Haystack([np.frombuffer(LINES.encode(), np.uint8)])


@pytest.fixture(scope="module")
def measured(folder):
    """Measure all tasks with both kinds of attention, and return where that is."""
    out = folder / "out"
    assert measure(command(folder, out, "--lengths", "480")) == 0
    return out


def test_a_text_that_is_read_whole_is_warned_of_once(folder, tmp_path, capsys):
    few = command(folder, tmp_path, "--lengths", "64,65", "--tasks", "loss")
    few += ["--repeats", "0"]
    assert measure(few) == 0
    warning = "in 64 tokens MoBA equals full attention"
    assert capsys.readouterr().err.count(warning) == 1
    assert (tmp_path / "report.html").read_text().count(warning) == 1
    assert measure([*few, "--attention", "full"]) == 0
    assert warning not in capsys.readouterr().err


def test_every_task_has_its_rows(measured):
    rows = results.read(measured / "rows.csv")
    for kind in ("moba", "full"):
        own = [row for row in rows if row["attention"] == kind]
        assert [r["depth"] for r in own if r["task"] == "needle"] == [0, 1]
        assert len({r["subtask"] for r in own if r["task"] == "ruler"}) == 7
        assert [r["task"] for r in own].count("loss") == 1
        assert [r["task"] for r in own].count("prefill") == 1
        assert {r["block_size"] for r in own} == {32 if kind == "moba" else None}
        assert {r["kernel"] for r in own} == {"moba" if kind == "moba" else "sdpa"}
    assert len(rows) == 2 * 11
    for row in rows:
        assert row["status"] == "ok"
        assert row["transformers"]
        assert row["torch"] == torch.__version__
        assert row["command"].startswith("python -m moba_lab.evaluate --model ")


def test_attention_makes_a_difference(measured):
    moba, full = (
        row for row in results.read(measured / "rows.csv") if row["task"] == "loss"
    )
    assert abs(moba["loss"] - full["loss"]) > 1e-3
    # The first part lies in the first block, which both read.
    assert moba["part_losses"][0] == full["part_losses"][0]


def test_rows_that_are_there_are_not_measured_again(
    measured, folder, tmp_path, monkeypatch, capsys
):
    measured = shutil.copytree(measured, tmp_path / "copy")
    before = (measured / "rows.csv").read_bytes()
    asked = []
    real = Bench.measure
    monkeypatch.setattr(
        Bench, "measure", lambda *x: asked.append(x[1].task) or real(*x)
    )
    assert measure(command(folder, measured, "--lengths", "480")) == 0
    assert asked == []
    assert (measured / "rows.csv").read_bytes() == before
    assert "not on this page" not in (measured / "report.html").read_text()
    more = command(folder, measured, "--lengths", "480", "--tasks", "loss")
    assert measure([*more, "--windows", "3", "--attention", "full"]) == 0
    assert asked == ["loss"]
    assert len(results.read(measured / "rows.csv")) == 22
    assert "also holds 20 rows of other" in (measured / "report.html").read_text()
    printed = capsys.readouterr().out
    assert re.search(r"\nloss, 480 tokens: full \d\.\d{4} ± ", printed)
    assert "20 more rows there" in printed


def test_a_point_without_memory_is_recorded_and_the_others_go_on(
    folder, tmp_path, monkeypatch
):
    real = losses.token_losses

    def token_losses(model, ids):
        if ids.shape[1] == 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(model, ids)

    monkeypatch.setattr(losses, "token_losses", token_losses)
    few = command(folder, tmp_path, "--lengths", "64,128,256", "--tasks", "loss")
    few += ["--attention", "full", "--repeats", "0", "--windows", "1"]
    assert measure(few) == FAILED

    def statuses():
        rows = results.read(tmp_path / "rows.csv")
        return {row["length"]: row["status"] for row in rows}

    expected = {64: "ok", 128: "out of memory", 256: "ok"}
    assert statuses() == expected
    assert not (tmp_path / "pending.json").exists()
    assert "Tried to allocate" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(losses, "token_losses", real)
    monkeypatch.setattr(run, "write_report", lambda *x: None)
    assert measure(few) == FAILED
    assert statuses() == expected
    assert measure([*few, "--retry"]) == 0
    assert statuses() == dict.fromkeys(expected, "ok")


def test_an_interrupted_command_keeps_its_rows(folder, tmp_path, monkeypatch):
    def interrupt(bench, point):
        raise KeyboardInterrupt

    few = command(folder, tmp_path, "--lengths", "64", "--tasks", "loss")
    monkeypatch.setattr(Bench, "loss", interrupt)
    assert measure(few) == INTERRUPTED
    [*_, last] = results.read(tmp_path / "rows.csv")
    assert last["task"] == "prefill"
    assert (tmp_path / "report.html").exists()


def test_a_killed_process_leaves_a_row_and_another_one_goes_on(
    folder, tmp_path, monkeypatch
):
    options = read_options(command(folder, tmp_path, "--lengths", "64"))
    start, commands = supervise.run, []

    def start_worker(arguments):
        commands.append(arguments)
        if len(commands) == 1:
            supervise.note(options, {"run": "loss 64", "part_losses": [0.5]})
            kill = "import os; os.kill(os.getpid(), 9)"
            return start([sys.executable, "-c", kill])
        return start([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(supervise, "run", start_worker)
    assert supervise.supervise(["--model", "m"], options) == INTERRUPTED
    own = ["--worker", str(os.getpid()), "--model", "m"]
    worker = [sys.executable, "-m", "moba_lab.evaluate", *own]
    assert commands == [worker, worker]
    assert read_options(own).supervisor == os.getpid()
    assert read_options(own).command == "python -m moba_lab.evaluate --model m"
    [row] = results.read(options.csv)
    assert (row["run"], row["status"]) == ("loss 64", "out of memory")
    assert "was killed" in row["message"]
    assert not options.pending.exists()


def test_a_process_whose_supervisor_is_gone_stops(folder, tmp_path):
    options = read_options(command(folder, tmp_path, "--lengths", "64"))
    assert work(replace(options, supervisor=os.getppid() + 1)) == INTERRUPTED
    assert not options.csv.exists()


def test_a_process_killed_before_it_measured_is_not_started_again(
    folder, tmp_path, monkeypatch, capsys
):
    options = read_options(command(folder, tmp_path, "--lengths", "64"))
    options.pending.write_text("of a command before")
    monkeypatch.setattr(supervise, "run", lambda arguments: -9)
    assert supervise.supervise([], options) == FAILED
    assert "before anything was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "bare"], "a tokenizer at .*bare.* name another place by --token"),
        (["--model", "nowhere"], "expected a language model at .*nowhere"),
        (["--model", "a.safetensors"], "first: python -m moba_lab.export a.safetens"),
        (["--lengths", "64,1024"], "at most 512 tokens, the positions .* got 1024"),
        (["--topk", "0"], "expected a number, 1 or more, got 0"),
        (["--tasks", "needle,maze"], "some of needle,ruler,loss,prefill, got 'maze'"),
        (["--attention", "flash"], "expected some of moba,full, got 'flash'"),
        (["--lengths", "1k"], "as in 1024,4096, got '1k'"),
        (["--full-layers=7"], "cannot be switched to MoBA: full_layers must be from"),
        (["--device", "tpu"], 'expected "auto", "cpu" or "cuda"'),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_errors_say_what_to_do(folder, tmp_path, changes, message, capsys):
    changes = [str(folder / x) if x in ("bare", "nowhere") else x for x in changes]
    try:
        status = measure(command(folder, tmp_path, "--lengths", "64", *changes))
    except SystemExit as error:
        status = error.code
    assert status == WRONG
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed
    assert not (tmp_path / "rows.csv").exists()


def test_a_model_whose_attention_cannot_be_switched(
    folder, tmp_path, monkeypatch, capsys
):
    refuse = classmethod(lambda cls: False)
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", refuse)
    few = command(folder, tmp_path, "--lengths", "64", "--tasks", "prefill")
    assert measure(few) == WRONG
    assert "--attention full measures it as it is" in capsys.readouterr().err
    assert measure([*few, "--attention", "full"]) == 0


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path, capsys):
    few = command(folder, tmp_path, "--lengths", "64")
    tiny = str(folder / "tiny")
    assert (
        measure([*few, "--model", str(folder / "bare"), "--tokenizer", tiny]) == WRONG
    )
    assert "of at most 61 tokens" in capsys.readouterr().err


def test_a_tokenizer_without_a_vocabulary_is_refused(folder, tmp_path, capsys):
    empty = Tokenizer(models.BPE({}, []))
    PreTrainedTokenizerFast(tokenizer_object=empty).save_pretrained(tmp_path)
    few = command(folder, tmp_path, "--lengths", "64", "--tokenizer", str(tmp_path))
    assert measure(few) == WRONG
    assert "got: one that makes no tokens" in capsys.readouterr().err


def test_text_that_is_too_short_fails_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda *x: None)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "short.txt").write_text("a line\n" * 20)
    few = command(folder, tmp_path, "--lengths", "64,256", "--tasks", "loss")
    assert measure([*few, "--data", str(tmp_path / "text")]) == FAILED
    rows = [r for r in results.read(tmp_path / "rows.csv") if r["task"] == "loss"]
    assert [r["status"] for r in rows] == 2 * ["ok"] + 2 * ["failed"]
    assert "give --data a folder with more text" in rows[-1]["message"]


@pytest.mark.parametrize("kind", ["moba", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_losses_are_the_cross_entropy_of_the_logits(name, kind, monkeypatch):
    """Gemma 2 caps its logits, which a head on its own would not."""
    model = make(name)
    if kind == "moba":
        moba_fast.hf.enable(model, block_size=8, topk=2, full_layers=())
    ids = torch.randint(3, 61, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    expected = cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    whole = losses.token_losses(model, ids)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(losses, "LOGITS", 61 * 7)
    calls, sizes = [], []
    model.lm_head.register_forward_hook(lambda *x: sizes.append(x[-1].shape[1]))
    model.base_model.layers[0].register_forward_hook(lambda *x: calls.append(1))
    np.testing.assert_allclose(losses.token_losses(model, ids), whole, atol=1e-5)
    assert len(calls) == len(ids)
    assert max(sizes) == 7
    assert "forward" not in model.base_model.__dict__


def test_a_model_is_itself_again_after_an_error(monkeypatch):
    model, ids = make("llama"), torch.arange(3, 43)[None]
    monkeypatch.setattr(losses, "LOGITS", 61 * 7)
    monkeypatch.setattr(losses, "cross_entropy", lambda *x, **y: 1 / 0)
    # The error keeps its frames, as that of a notebook does.
    with pytest.raises(ZeroDivisionError) as error:
        losses.token_losses(model, ids)
    assert error.traceback
    assert "forward" not in model.base_model.__dict__


def test_bytes_of_tokens_add_up_to_the_text(subject):
    text = "aé\n😀 zwei  Wörter"
    ids, sizes = subject.ids_and_bytes(text)
    assert len(ids) == len(sizes) == 1 + len(text.encode())
    assert sizes[0] == 0
    assert sizes.sum() == len(text.encode())
    # The first token of a letter counts for all of it.
    assert sizes[1:5].tolist() == [1, 2, 0, 1]


def test_bits_per_byte_do_not_depend_on_how_a_text_is_cut():
    fine, coarse = np.ones((2, 9)), np.full((2, 5), 2.0)
    # The first token is told by nothing, and its bytes by no loss.
    fine[:, 0] = coarse[:, 0] = 7
    fine = losses.by_position(np.full((2, 8), 0.5), fine, parts=4)
    coarse = losses.by_position(np.full((2, 4), 1.0), coarse, parts=4)
    assert fine["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    assert coarse["bits_per_byte"] == pytest.approx(fine["bits_per_byte"])
    assert coarse["part_bits"] == pytest.approx(fine["part_bits"])
    assert coarse["perplexity"] == pytest.approx(math.e)


def test_windows_are_parts_of_the_text_that_do_not_overlap(subject, haystack):
    assert losses.text_windows(subject, haystack, 300, most=5)[0].shape == (5, 300)
    ids, sizes = losses.text_windows(subject, haystack, 300, most=99)
    assert ids.shape == sizes.shape
    assert 20 < len(ids) < len(LINES.encode()) / 300
    assert (ids[:, 0] == 1).all()
    began = [subject.tokenizer.decode(row[1:])[:200].encode() for row in ids]
    at = [LINES.encode().find(text) for text in began]
    assert min(at) == 0
    assert min(np.diff(at)) >= 299


@pytest.mark.parametrize("length", [200, 300])
def test_questions_fill_their_length_and_never_more(subject, haystack, length):
    rng = np.random.default_rng(0)
    made = [texts.needle(subject, haystack, rng, length, d) for d in (0.0, 0.5, 1.0)]
    made += [texts.ruler(subject, name, rng, length) for name in ("single",)]
    for question in made:
        size = len(subject.ids(question.prompt + question.answer)) + texts.SLACK
        assert length - 32 < size <= length
        assert question.answer.strip() in question.prompt
        assert question.prompt[-1] != " "
        assert question.answer[0] == " "


def test_a_needle_stands_at_its_depth(subject, haystack):
    for depth in (0.0, 0.5, 1.0):
        rng = np.random.default_rng(0)
        question = texts.needle(subject, haystack, rng, 400, depth)
        at = question.prompt.index(question.answer.strip()) / len(question.prompt)
        assert abs(at - depth) < 0.15


def test_answers_are_scored_as_ruler_does(subject, monkeypatch):
    said = iter([" 12 34\n", " 34", "56789", "no"])
    monkeypatch.setattr(answers, "answer", lambda *x: next(said))
    asked = [texts.Question("?", " 12 34\n", ("12", "34"))] * 2
    asked += [texts.Question("?", " 5678", ("5678",))] * 2
    found = answers.scores(subject, asked, 99)
    assert found["score"] == (1.0 + 0.5 + 1.0 + 0.0) / 4
    assert found["exact"] == 1 / 4
    assert (found["wanted"], found["said"]) == ("'12 34'", "' 34'")


def test_a_model_that_reads_everything_finds_everything(folder, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()

    def generate(model, ids, **options):
        prompt = tokenizer.decode(ids[0], skip_special_tokens=True)
        numbers = re.findall(r"(?:key|of \w+) is (\d+)", prompt)
        found = numbers[-1] if numbers else "nothing"
        said = torch.tensor(
            tokenizer(f" {found}\n", add_special_tokens=False).input_ids
        )
        return torch.cat([ids, said[None]], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    few = command(folder, tmp_path, "--lengths", "480", "--tasks", "needle,ruler")
    assert measure([*few, "--repeats", "0"]) == 0
    rows = results.read(tmp_path / "rows.csv")
    needles = [row for row in rows if row["task"] == "needle"]
    assert {(row["score"], row["exact"]) for row in needles} == {(1, 1)}
    scores = {row["subtask"]: row["score"] for row in rows}
    assert (scores["single"], scores["multi-value"]) == (1, 0.25)
    page = (tmp_path / "report.html").read_text()
    assert "MoBA finds 100 % of the keys; full attention finds 100 %" in page


@pytest.mark.parametrize("kind", ["moba", "full"])
def test_answers_are_greedy(subject, kind):
    question = texts.Question(LINES[:200], " 1234", ("1234",))
    prompt = subject.ids(question.prompt)
    subject.switch(kind)
    said = answers.answer(subject, prompt, question, 512)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(5 + texts.SLACK):
            logits = subject.model(torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == subject.tokenizer.eos_token_id:
                break
            if kind == "moba":
                # The prompt by MoBA and what follows in full is more than one call.
                break
    wanted = subject.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert said.startswith(wanted) if kind == "moba" else said == wanted


def test_the_page_is_whole_and_asks_for_nothing(measured):
    page = (measured / "report.html").read_text()
    assert remote_loads(page) == []
    assert page.count("data:image/png;base64,") == 2
    for text in (
        "Needle in a haystack",
        "Some answers",
        "multi-query",
        "bits per byte",
        "times as",
    ):
        assert text in page
    assert "python -m moba_lab.evaluate --model" in page
    assert "MoBA reads 2 blocks of 32 tokens, and in full in layers -1" in page
    for name in ("needle.png", "loss.png"):
        assert (measured / name).exists()


def test_the_page_in_a_browser(measured):
    executable = browser.find_chromium()
    if executable is None:
        pytest.skip(browser.missing_chromium())
    with sync_playwright() as playwright:
        options = {"executable_path": executable, "args": browser.FLAGS}
        chromium = playwright.chromium.launch(**options)
        with browser.watched_page(chromium) as (page, problems):
            page.goto((measured / "report.html").as_uri())
            assert [*browser.picture_problems(page), *problems] == []
            grounds = []
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                grounds.append(
                    page.evaluate("getComputedStyle(document.body).backgroundColor")
                )
            assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]


def test_a_needle_that_was_not_looked_for_is_blank():
    scores = {"moba": [[1.0, np.nan], [0.5, np.nan]]}
    fig = needle_scores(scores, [1024, 4096], [0.0, 1.0], "here")
    drawn = [text.get_text() for text in fig.axes[0].texts]
    assert drawn == ["100", "–", "50", "–"]
    assert fig.finding == "MoBA finds 75 % of the keys"
    assert "4K" not in fig.what_to_see


def test_speed_is_told_where_both_are_there():
    def row(kind, seconds):
        parts = "median", "quartile1", "quartile3"
        times = {f"prefill_{part}_s": seconds for part in parts}
        return results.Row(
            {"task": "prefill", "length": 64, "attention": kind, "tokens_per_s": 9.0}
            | {"prefill_repeats": 3, **times}
        )

    both = tables.prefill([row("full", 3.0), row("moba", 2.0)])
    assert [line[5] for line in both.rows] == ["1.50", "–"]
    assert tables.prefill([row("moba", 2.0)]).rows[0][5] == "–"
