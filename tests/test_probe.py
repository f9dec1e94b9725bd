from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moba_lab.model import Config
from moba_lab.probe import (
    Call,
    best_lookup,
    chance_of_hit,
    definition_recall,
    far_calls,
    find_calls,
)

TEXT = (
    b"def read_line(source):\n    return source.readline()\n\n\n"
    b"class Parser:\n    def __init__(self):\n        self.text = ''\n\n"
    b"    def parse_all(self, source):\n        self.text = read_line(source)\n"
)


class Planted:
    """A model whose head 1 of layer 0 alone reads block 0, from one token on."""

    def __init__(self, block_size=16, read_from=0):
        self.config = Config(block_size=block_size, topk=3, context=1024)
        self.read_from = read_from

    def __call__(self, tokens, return_aux):
        own = torch.arange(len(tokens)) // self.config.block_size
        selected = torch.full((2, len(tokens), 2, 3), -1)
        selected[..., 2] = own[None, :, None]
        selected[0, self.read_from :, 1, 0] = 0
        return None, [SimpleNamespace(selected=layer) for layer in selected]


def test_find_calls_takes_names_defined_once_and_before():
    assert find_calls(TEXT) == [Call("read_line", 4, TEXT.index(b"= read_line") + 2)]
    assert find_calls(b"go_there()\ndef go_there(): pass\n") == []
    assert find_calls(b"def again(): 0\ndef again(): 1\nagain()\n", shortest=3) == []
    assert find_calls(b"def tiny(): 0\ntiny()\n") == []
    assert find_calls(b"def __eq__(): 0\n__eq__()\n") == []
    assert find_calls(b"def walker(): 0\nfire_walker()\n") == []


def test_far_calls_keeps_a_distance_in_blocks():
    call = find_calls(TEXT)[0]
    blocks = call.call // 16 - (4 + 9) // 16
    assert far_calls(TEXT, 16, distance=blocks) == [call]
    assert far_calls(TEXT, 16, distance=blocks + 1) == []


def test_recall_finds_the_planted_head():
    call = TEXT.index(b"= read_line") + 2
    model = Planted(read_from=call)
    recall = definition_recall(model, [np.frombuffer(TEXT, np.uint8)], read=3)
    np.testing.assert_array_equal(recall.hit, [[0, 1], [0, 0]])
    np.testing.assert_array_equal(recall.control, np.zeros((2, 2)))
    assert recall.calls == 1
    end_of_block = (call // 16 + 1) * 16
    assert recall.queries == min(call + len("read_line"), end_of_block) - (call + 2)
    assert recall.chance == pytest.approx(chance_of_hit(call // 16, 1, 2))


def test_recall_reports_a_head_that_always_reads_the_block_as_no_better():
    recall = definition_recall(Planted(), [np.frombuffer(TEXT, np.uint8)])
    np.testing.assert_array_equal(recall.hit, recall.control)
    assert recall.hit[0, 1] == 1


def test_recall_needs_a_call():
    with pytest.raises(ValueError, match="at least 3 blocks of 16 bytes"):
        definition_recall(Planted(), [np.frombuffer(b"x = 1\n", np.uint8)])


@pytest.mark.parametrize(
    ("past", "wanted", "picks", "chance"),
    [(3, 1, 3, 1.0), (10, 2, 1, 0.2), (4, 2, 2, 5 / 6), (5, 1, 0, 0.0), (2, 1, 9, 1.0)],
)
def test_chance_of_hit(past, wanted, picks, chance):
    assert chance_of_hit(past, wanted, picks) == pytest.approx(chance)


def test_best_lookup_finds_the_call_whose_name_reads_its_definition():
    call = TEXT.index(b"= read_line") + 2
    texts = {
        "none.py": np.frombuffer(b"x = 1\n" * 9, np.uint8),
        "a.py": np.frombuffer(TEXT, np.uint8),
    }
    found = best_lookup(Planted(read_from=call + 4), texts, layer=0, head=1)
    assert (found.path, found.call.call, found.call.definition) == ("a.py", call, 4)
    # Of the seven bytes after the first two, the first two come too early.
    assert found.share == pytest.approx(5 / 7)


def test_best_lookup_without_any_call_says_so():
    texts = {"none.py": np.frombuffer(b"x = 1\n" * 9, np.uint8)}
    with pytest.raises(ValueError, match="expected a call 6 blocks of 16 bytes"):
        best_lookup(Planted(), texts, layer=0, head=1)
