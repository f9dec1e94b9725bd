"""Tasks hide what they say they hide, where they say it."""

import numpy as np
import pytest

from moba_lab.data import load_corpus
from moba_lab.tasks.definitions import Definitions, find_definitions
from moba_lab.tasks.example import IGNORED, Example, TaskSampler, fit
from moba_lab.tasks.haystack import Haystack, line_starts
from moba_lab.tasks.needle import DEPTHS, PREFIX, Needle, plant
from moba_lab.tasks.recall import Recall
from moba_lab.tasks.ruler import (
    TASKS,
    CommonWords,
    FrequentWords,
    MagicNumbers,
    VariableTracking,
)
from moba_lab.tasks.wording import ENGLISH, TERSE

LINES = [f"line {n} of the text = {n * n}\n".encode() for n in range(400)]
TEXT = np.frombuffer(b"".join(LINES), np.uint8)


@pytest.fixture(scope="module")
def code():
    return Haystack(list(load_corpus().held_out.values()))


def rng(seed=0):
    return np.random.default_rng(seed)


def tasks(code):
    return {
        "needle": Needle(code),
        "definitions": Definitions(code),
        **{name: task() for name, task in TASKS.items()},
    }


EVERY = ["needle", "definitions", *TASKS]


@pytest.mark.parametrize("name", EVERY)
def test_examples_fit_and_nearly_fill_their_length(name, code):
    task = tasks(code)[name]
    for seed, length in enumerate((3000, 4001, 6000)):
        example = task(rng(seed), length)
        # Whole lines, in code up to some hundred bytes long; words 9 at a time.
        assert length - 400 < len(example.text) <= length


@pytest.mark.parametrize("name", EVERY)
def test_needles_are_where_they_say(name, code):
    task = tasks(code)[name]
    for seed in range(10):
        example = task(rng(seed), 3000)
        held = tuple(example.prompt[a:b] for a, b in example.needles)
        assert held == (example.references if example.needles else ())
        for reference in example.references:
            assert reference in example.answer


@pytest.mark.parametrize("name", EVERY)
def test_sampler_masks_the_prompt_and_resumes(name, code):
    task = tasks(code)[name]
    whole, again = (TaskSampler(task, 2, 2048, seed=5) for _ in range(2))
    batches = [whole.next_batch() for _ in range(3)]
    again.next_batch()
    resumed = TaskSampler(task, 2, 2048, seed=0)
    resumed.load_state_dict(again.state_dict())
    for expected in batches[1:]:
        for a, b in zip(expected, resumed.next_batch(), strict=True):
            assert a.dtype == np.int64
            assert (a == b).all()
    tokens, targets = batches[0]
    assert tokens.shape == targets.shape == (2 * 2048,)
    examples = TaskSampler(task, 2, 2048, seed=5).next_examples()
    for example, row in zip(examples, targets.reshape(2, -1), strict=True):
        assert bytes(row[row != IGNORED].tolist()) == example.answer
        assert row[len(example.prompt) - 1] == example.answer[0]
    assert not (batches[0][0] == batches[1][0]).all()


def test_another_seed_gives_other_examples(code):
    for task in tasks(code).values():
        assert task(rng(0), 3000).text != task(rng(1), 3000).text


@pytest.mark.parametrize("depth", DEPTHS)
def test_needle_stands_at_its_depth(depth, code):
    example = Needle(code, depth=depth)(rng(3), 8192)
    first = example.needles[0][0] - len(PREFIX)
    rest = len(example.prompt) - 2 * len(PREFIX) - len(example.answer) - 1
    assert abs(first - depth * rest) < 150
    assert (first == 0) == (depth == 0)
    assert example.prompt.count(PREFIX) == 2
    assert len(set(example.answer.decode())) == 5
    assert example.prompt.endswith(PREFIX)
    hay = example.prompt[:first] + example.prompt[example.needles[0][1] + 1 :]
    assert any(hay.removesuffix(PREFIX) in text for text in code.texts)


def test_a_text_without_a_last_newline_gets_one():
    assert plant(b"x", b"1", 1.0).prompt == b"x\n" + PREFIX + b"1\n" + PREFIX
    assert plant(b"", b"1", 0.5).prompt == PREFIX + b"1\n" + PREFIX


def test_pieces_are_whole_lines_anywhere_in_a_text():
    hay, firsts = Haystack([TEXT, TEXT[:500]]), set()
    for seed in range(200):
        piece = hay.draw(rng(seed), 300)
        assert 300 - len(LINES[-1]) < len(piece) <= 300
        assert b"".join(LINES[LINES.index(piece.splitlines(True)[0]) :]).startswith(
            piece
        )
        firsts.add(piece.splitlines()[0])
    assert len(firsts) > 100


def test_the_longest_piece_is_the_longest_text():
    hay = Haystack([TEXT[:500], TEXT])
    assert hay.draw(rng(), hay.longest) == TEXT.tobytes()


def test_pieces_never_cross_the_border_of_a_file():
    stream = np.concatenate(
        [np.frombuffer(b"\0aaaa\naa\n\0bb\nb\nbbb\n", np.uint8)] * 3
    )
    hay = Haystack.of_stream(stream)
    assert len(hay.texts) == 6
    for seed in range(50):
        piece = hay.draw(rng(seed), 8)
        assert set(piece) in ({ord("a"), 10}, {ord("b"), 10})


def test_a_haystack_that_is_too_short_says_how_long_it_is():
    with pytest.raises(ValueError, match=f"at most {len(TEXT)}, .* got 99999"):
        Haystack([TEXT]).draw(rng(), 99999)
    with pytest.raises(ValueError, match="expected texts with lines"):
        Haystack([np.frombuffer(b"no line", np.uint8)])


def test_line_starts_of_a_text_without_a_last_newline():
    assert line_starts(b"a\nb").tolist() == [0, 2]


def test_definitions_ask_for_a_line_that_is_alone(code):
    for seed in range(20):
        example = Definitions(code)(rng(seed), 2000)
        lines = example.prompt.splitlines()
        assert lines[-1].startswith(b"# where is ")
        name = lines[-1].split()[-1]
        found = [m for m in find_definitions(example.prompt) if m[1] == name]
        assert len(found) == 1
        assert found[0][0].strip() + b"\n" == example.answer


def test_definitions_of_a_text_without_any_are_refused():
    with pytest.raises(ValueError, match="got none in 500 bytes"):
        Definitions(Haystack([TEXT]))(rng(), 500)


@pytest.mark.parametrize("wording", [TERSE, ENGLISH])
@pytest.mark.parametrize("name", TASKS)
def test_ruler_tasks_can_be_solved_from_their_text_alone(name, wording):
    solve = SOLVERS[name]
    for seed in range(5):
        example = TASKS[name](wording=wording)(rng(seed), 6000)
        text = example.prompt.decode()
        found = solve(text)
        assert sorted(found) == sorted(r.decode() for r in example.references)
        assert example.answer.decode().split() == [
            r.decode() for r in example.references
        ]


def magic_numbers(text):
    *lines, last = text.splitlines()
    question = lines[-1] if last.startswith("The magic") else last
    pairs = [
        (words[-3], words[-1].rstrip("."))
        for words in map(str.split, lines)
        if len(words) > 2 and words[-2] == "is" and words[-1].rstrip(".").isdecimal()
    ]
    asked = question.replace(",", " ").split()
    return [value for key, value in pairs if key in asked]


def variables(text):
    rows = [line.replace("VAR ", "").split() for line in text.splitlines()]
    value = next(w for w in text.splitlines()[-1].split() if w.isdecimal())
    known = {value}
    for row in rows:
        if len(row) == 3 and row[1] == "=" and row[2] in known:
            known.add(row[0])
    return known - {value}


def most_frequent(count):
    def solve(text):
        words = text.splitlines()[1].split()
        names, times = np.unique(words, return_counts=True)
        order = times.argsort()[::-1]
        assert (times[order[count:]] < times[order[count - 1]]).all()
        assert len(set(times[order[:count]])) == count or count > 3
        return names[order[:count]].tolist()

    return solve


SOLVERS = {
    "single": magic_numbers,
    "multi-key": magic_numbers,
    "multi-value": magic_numbers,
    "multi-query": magic_numbers,
    "variable tracking": variables,
    "common words": most_frequent(10),
    "frequent words": most_frequent(3),
}


def test_ruler_counts_keys_values_and_queries():
    example = MagicNumbers(keys=3, values=2, queries=2)(rng(), 1000)
    assert len(example.references) == 4
    assert example.prompt.count(b" is ") == 6


def test_chains_that_distract_have_other_values():
    example = VariableTracking(chains=3, hops=2)(rng(), 1000)
    assert example.prompt.count(b" = ") == 9
    assert variables(example.prompt.decode()) == {
        r.decode() for r in example.references
    }


@pytest.mark.parametrize("length", [70, 90, 120, 200])
def test_frequent_words_are_not_tied_in_short_texts(length):
    example = FrequentWords(vocabulary=5)(rng(), length)
    found = most_frequent(3)(example.prompt.decode())
    assert found == [r.decode() for r in example.references]


def test_fit_uses_any_measure():
    def words(text):
        return len(text.split())

    example = TASKS["single"](measure=words)(rng(), 100)
    assert 95 < words(example.text) <= 100


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Needle(Haystack([TEXT]), depth=2), "depth from 0 to 1, got 2"),
        (lambda: Needle(Haystack([TEXT]), digits=11), "1 to 10 digits, got 11"),
        (lambda: Needle(Haystack([TEXT]))(rng(), 20), "length of at least 47"),
        (lambda: MagicNumbers(keys=1, queries=2), "1 to keys = 1 queries, got 2"),
        (lambda: CommonWords(times=3, others=3), "less than times = 3, got 3"),
        (lambda: TERSE.keys(rng(), 3000), "at most 2450 different words, got 3000"),
        (lambda: Recall(pairs=70), "at least 210 for 70 pairs"),
        (lambda: Recall(pairs=40)(rng(), 101), "at least 160 tokens for 40 pairs"),
        (lambda: Recall(pairs=4)(rng(), 101).row(99), "100|99"),
        (lambda: Example(b"abc", b"de", ()).row(3), "at most 4 bytes, got 5"),
        (lambda: fit(lambda n: Example(b"abc", b"d", ()), 3), "at least 4, .* got 3"),
    ],
)
def test_what_cannot_be_made_is_explained(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("scattered", [False, True])
def test_recall_asks_for_every_pair_once(scattered):
    for seed in range(10):
        example = Recall(pairs=16, scattered=scattered)(rng(seed), 257)
        tokens, targets = example.row(256)
        keys = tokens[example.queries]
        assert len(set(keys)) == 16
        assert (example.queries >= 128).all()
        assert (example.places < 128).all()
        assert (example.places % 2 == 1).all()
        assert (tokens[example.places] == example.values).all()
        assert (tokens[example.places - 1] == keys).all()
        assert (targets[example.queries] == example.values).all()
        assert (targets != IGNORED).sum() == 16
        assert set(tokens[tokens >= 64]) == {*keys, *example.values}
        # A key stands in its pair and in its query, and nowhere else.
        assert all((tokens == key).sum() == 2 for key in keys)
        in_a_row = sorted(example.places) == list(range(1, 32, 2))
        assert in_a_row != scattered


def test_recall_sampler_resumes():
    whole = TaskSampler(Recall(pairs=4), batch=3, context=64, seed=1)
    whole.next_batch()
    resumed = TaskSampler(Recall(pairs=4), batch=3, context=64, seed=9)
    resumed.load_state_dict(whole.state_dict())
    for a, b in zip(whole.next_batch(), resumed.next_batch(), strict=True):
        assert (a == b).all()
