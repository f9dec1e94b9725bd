"""The signal-to-noise ratio predicts what the real gate finds."""

import math

import numpy as np
import pytest

from moba_lab.router import measured_snr, predicted_recall, simulate_recall, snr

SETTINGS = [
    # head_dim, block_size, topk, gap, related
    (32, 64, 2, 0.5, 1),
    (32, 16, 4, 1.0, 1),
    (64, 32, 2, 1.0, 1),
    (64, 128, 4, 1.0, 1),
    (128, 16, 2, 1.0, 1),
    (64, 64, 3, 1.8, 2),
]


@pytest.mark.parametrize(("head_dim", "block_size", "topk", "gap", "related"), SETTINGS)
def test_simulation_agrees_with_prediction(head_dim, block_size, topk, gap, related):
    trials = 2000
    found = simulate_recall(
        head_dim, block_size, 16, topk, gap, related, trials=trials, seed=3
    )
    expected = predicted_recall(snr(gap, head_dim, block_size), 15, topk - 1)
    # Four deviations of the count, and what the approximation costs.
    margin = 4 * math.sqrt(expected * (1 - expected) / trials) + 0.01
    assert found.shape == (trials,)
    assert found.mean() == pytest.approx(expected, abs=margin)


def test_prediction_equals_counting_draws_of_scores():
    rng = np.random.default_rng(0)
    for ratio, others, picks in ((0.3, 7, 1), (1.2, 20, 3), (2.5, 60, 5)):
        wanted = math.sqrt(2) * ratio + rng.normal(size=(100_000, 1))
        beaten = (rng.normal(size=(100_000, others)) > wanted).sum(1)
        measured = (beaten < picks).mean()
        assert predicted_recall(ratio, others, picks) == pytest.approx(
            measured, abs=7e-3
        )


def test_prediction_at_its_ends():
    assert predicted_recall(50.0, others=1000, picks=1) == 1
    assert predicted_recall(1.0, others=3, picks=4) == 1
    assert predicted_recall(1.0, others=3, picks=0) == 0
    recalls = [predicted_recall(x, 30, 2) for x in np.linspace(0, 4, 9)]
    assert recalls == sorted(recalls)
    assert recalls[0] == pytest.approx(2 / 31, abs=1e-5)


def test_measured_ratio_is_that_of_the_scores():
    rng = np.random.default_rng(1)
    scores = 3 * rng.normal(size=(20_000, 10))
    wanted = rng.integers(10, size=20_000)
    scores[np.arange(20_000), wanted] += 3 * math.sqrt(2) * 0.7
    scores[:, 9:][wanted[:, None] != 9] = -np.inf
    assert measured_snr(scores, wanted) == pytest.approx(0.7, abs=0.02)


def test_seed_decides_the_simulation():
    runs = [simulate_recall(16, 8, 6, 2, 0.9, trials=40, seed=s) for s in (0, 0, 1)]
    assert (runs[0] == runs[1]).all()
    assert not (runs[0] == runs[2]).all()


@pytest.mark.parametrize(("gap", "related"), [(1.1, 1), (-0.1, 1), (3.0, 9)])
def test_a_gap_that_no_keys_have_is_refused(gap, related):
    with pytest.raises(ValueError, match="gap <= related <= block_size"):
        simulate_recall(16, 8, 4, 2, gap, related)
