"""Scores are exact, and routing errors are told from reading errors."""

import numpy as np
import pytest
import torch

from moba_lab.model import Config, Model
from moba_lab.tasks.example import Example
from moba_lab.tasks.needle import plant
from moba_lab.tasks.routing import outcome, read_needle
from moba_lab.tasks.scoring import (
    exact_matches,
    greedy,
    predictions,
    string_recall,
)

TEXT = b"".join(b"x_%d = %d\n" % (n, n * n) for n in range(30))


@pytest.fixture
def model():
    """A model that is not trained but has sharp opinions, so that modes differ."""
    torch.manual_seed(0)
    config = Config(
        width=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        hidden=32,
        block_size=16,
        topk=2,
        attention=("moba", "full", "moba"),
    )
    model = Model(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    return model


def examples():
    keys = (b"123", b"45678", b"90")
    return [plant(TEXT[: 10 * n], key, 0.3) for n, key in enumerate(keys, start=8)]


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_one_pass_finds_what_greedy_decoding_writes(model, decode):
    for example in examples():
        written = greedy(model, example.prompt, 6, decode=decode)
        right = Example(example.prompt, written, (written,))
        assert predictions(model, [right], decode) == [written]
        for wrong in range(6):
            answer = bytearray(written)
            answer[wrong] ^= 1
            one = Example(example.prompt, bytes(answer), ())
            assert not exact_matches(model, [one], decode)[0]
            assert (
                predictions(model, [one], decode)[0][: wrong + 1]
                == (written[: wrong + 1])
            )
        assert exact_matches(model, [right], decode)[0]


def test_the_ways_of_decoding_write_different_answers(model):
    prompts = [TEXT[: 9 * n] for n in range(5, 25)]
    sparse, full = (
        [greedy(model, prompt, 4, decode=decode) for prompt in prompts]
        for decode in ("moba", "full")
    )
    assert sparse != full
    right = [Example(p, a, (a,)) for p, a in zip(prompts, full, strict=True)]
    assert predictions(model, right, "full") == full
    assert predictions(model, right, "moba") != full


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_a_pack_says_what_its_examples_say_alone(model, decode):
    together = predictions(model, examples(), decode)
    assert together == [predictions(model, [e], decode)[0] for e in examples()]


def test_decoding_in_full_reads_what_the_gate_leaves_out(model):
    example = plant(TEXT, b"123456", 0.1)
    tokens = torch.tensor(list(example.text))
    n = len(example.prompt)
    with torch.no_grad():
        sparse, last = model(tokens), model(tokens, prompt_lengths=torch.tensor([n]))
        model.set_attention("full")
        dense = model(tokens)
    torch.testing.assert_close(sparse[:n], last[:n])
    assert not torch.allclose(sparse[n:], last[n:], atol=1e-3)
    assert not torch.allclose(dense[n:], last[n:], atol=1e-3)


def test_decoding_in_full_equals_full_attention_over_the_prompts_keys(model):
    """One layer: its keys do not depend on how anything attends."""
    model.layers = model.layers[:1]
    tokens = torch.tensor(list(TEXT))
    ends = torch.tensor([0, 100, 220], dtype=torch.int32)
    prompts = torch.tensor([70, 120])
    with torch.no_grad():
        mixed = model(tokens[:220], ends, prompt_lengths=prompts)
        sparse = model(tokens[:220], ends)
        model.set_attention("full")
        full = model(tokens[:220], ends)
    decoded = torch.zeros(220, dtype=torch.bool)
    decoded[70:100] = True
    torch.testing.assert_close(mixed[decoded], full[decoded])
    torch.testing.assert_close(mixed[~decoded], sparse[~decoded])
    assert not torch.allclose(sparse[decoded], full[decoded], atol=1e-3)


def test_what_was_chosen_is_not_shown_where_it_was_not_read(model):
    with pytest.raises(ValueError, match="got both"):
        model(torch.arange(9), return_aux=True, prompt_lengths=torch.tensor([5]))


def test_greedy_stops_behind_the_stop_byte(model):
    prompt = TEXT[:50]
    written = greedy(model, prompt, 8)
    stop = written[2:3]
    assert greedy(model, prompt, 8, stop) == written[: written.index(stop) + 1]
    assert greedy(model, prompt, 0) == b""


def test_an_unknown_way_of_decoding_is_refused(model):
    with pytest.raises(ValueError, match='"moba" or "full", got \'dense\''):
        greedy(model, b"abc", 1, decode="dense")


@pytest.mark.parametrize(
    ("answer", "references", "share"),
    [
        (b" 12 34\n", [b"12", b"34"], 1.0),
        (b" 34 and 12, I think", [b"12", b"34"], 1.0),
        (b" 12 99\n", [b"12", b"34"], 0.5),
        (b"", [b"12"], 0.0),
        ("Words VUBU mate", ["vubu", "Mate", "zegi"], 2 / 3),
        (b" 123\n", [b"12"], 1.0),
    ],
)
def test_string_recall_is_the_share_of_the_references_found(answer, references, share):
    assert string_recall(answer, references) == pytest.approx(share)


def test_choices_are_those_of_the_blocks_that_hold_the_needle(model):
    example = plant(TEXT, b"314159", 0.3)
    first, _ = example.needles[0]
    said, choices, _ = read_needle(model, example)
    assert said == predictions(model, [example])[0]
    assert choices.shape == (3, 2, 6)
    assert choices[1].all()
    tokens = torch.tensor(list(example.text[:-1]))
    _, aux = model(tokens, return_aux=True)
    query = len(example.prompt) - 1
    for layer in (0, 2):
        for head in (0, 1):
            for byte in range(6):
                wanted = (first + byte) // 16
                read = aux[layer].selected[query + byte, head].tolist()
                assert choices[layer, head, byte] == (wanted in read)
    model.set_attention("full")
    assert read_needle(model, example)[1].all()


def test_a_needle_in_the_current_block_is_always_read(model):
    example = plant(b"x\n", b"7", 1.0)
    for layer in model.layers:
        layer.attention.config = Config(head_dim=16, block_size=64, topk=1)
    assert read_needle(model, example)[1].all()


def test_choices_want_one_needle_that_the_answer_begins_with(model):
    with pytest.raises(ValueError, match="one needle"):
        read_needle(model, Example(b"ab", b"c", (b"c",)))
    with pytest.raises(ValueError, match="one needle"):
        read_needle(model, Example(b"ab", b"c", (b"a",), ((0, 1),)))


def test_outcomes_look_at_the_first_wrong_byte():
    choices = np.zeros((2, 2, 3), dtype=bool)
    choices[1, 0, 1] = True
    assert outcome(b"123", b"123", choices) == "right"
    assert outcome(b"923", b"123", choices) == "routing error"
    assert outcome(b"193", b"123", choices) == "reading error"
    assert outcome(b"199", b"123", choices) == "reading error"
    assert outcome(b"129", b"123", choices) == "routing error"
    assert outcome(b"123x", b"123\n", choices) == "reading error"
