"""Figures of tasks draw what they are given, and say it."""

import numpy as np
import pytest
import torch

from moba_lab import viz
from moba_lab.experiments import layerwise, needle, recall, router
from moba_lab.experiments.results import Row
from moba_lab.viz.needles import needle_heatmaps

MACHINE = {
    "device": "CPU",
    "cpu": "some CPU",
    "torch": "2.13",
    "precision": "fp32",
    "date": "2026-11-25T10:00:00Z",
}


def rows(*columns):
    return [Row(MACHINE | of) for of in columns]


def labelled(fig):
    axes = [ax for ax in fig.axes if ax.get_title() or ax.get_xlabel()]
    return axes and all(ax.get_xlabel() or not ax.get_xticks().size for ax in axes)


def needle_row(kind, decode, length, right, **more):
    right = np.array(right)
    return {
        "task": "needle",
        "attention": kind,
        "decode": decode,
        "length": length,
        "seed": 0,
        "right": tuple(right),
        "depth_scores": tuple(right.reshape(15, -1).mean(1)),
        "score": right.mean(),
        **more,
    }


def test_needle_heatmap_shows_scores_and_claims():
    routed = {"recall": (0.25, 0.75), "routing_errors": 0.2}
    everything, nothing = [1] * 30, [0] * 30
    fig = needle.figure(
        rows(
            needle_row(
                "full", "moba", 256, everything, recall=(1, 1), routing_errors=0
            ),
            needle_row("moba", "moba", 256, nothing, **routed),
            needle_row("moba", "full", 256, everything),
            {"task": "ruler", "length": 256},
            {"task": "needle", "attention": "base", "length": 256},
        )
    )
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:3] == ["full attention", "MoBA", "MoBA,\nanswer in full"]
    assert fig.finding.startswith("Keys found in 256 bytes, MoBA minus full: -1.000")
    assert "MoBA finds 0 % of the keys in 256 bytes" in fig.what_to_see
    assert {text.get_text() for text in fig.axes[0].texts} == {"100"}
    missed = fig.axes[4].get_lines()[1]
    assert missed.get_ydata() == [0.2]
    assert fig.axes[4].get_lines()[0].get_ydata() == [0.75]


def test_needle_heatmap_without_rows_says_so():
    assert "No needle" in needle.figure(rows({"task": "ruler"})).finding
    assert "No needle" in needle_heatmaps({}, (), (), [], "").finding


def test_recall_curves_compare_with_full_attention():
    one = {"seed": 0, "pairs": 8, "score": 1.0, "scores": (1, 1, 1), "recall": (0.5, 1)}
    of = []
    for name in recall.ARRANGEMENTS:
        of.append(one | {"arrangement": name, "attention": "full"})
        for size, score in ((8, 1.0), (16, 0.4)):
            row = {"arrangement": name, "attention": "moba", "block_size": size}
            of.append(one | row | {"score": score, "scores": (score,) * 3})
    fig = recall.figure(rows(*of, {"attention": "base", "pairs": 8}))
    assert fig.finding == (
        "Full attention answers 100 % of the queries, MoBA answers 40 to 100 % of the "
        "queries"
    )
    assert "no difference above 1.000" in fig.what_to_see
    assert "MoBA 100 % and 40 % with blocks of 8 and 16" in fig.what_to_see
    assert labelled(fig)


def test_two_seeds_of_recall_are_named_apart():
    one = {"arrangement": "in a row", "pairs": 8, "recall": (1, 1), "scores": (1, 1)}
    made = [
        one | {"attention": kind, "block_size": 8, "seed": seed, "score": score}
        for kind, scores in (("full", (1.0, 1.0)), ("moba", (0.9, 0.1)))
        for seed, score in enumerate(scores)
    ]
    fig = recall.figure(rows(*made))
    assert "blocks of 8, MoBA minus full: -0.10 and -0.90, a seed each" in fig.alt
    assert "10 to 90 %" in fig.finding
    joined = np.array(fig.axes[0].collections[-1].get_segments())
    assert joined[:, :, 1].tolist() == [[0.9, 1], [0.1, 1]]
    assert joined[0, 0, 0] < 8 < joined[1, 0, 0]


def test_a_gap_far_beyond_the_others_is_an_arrow_with_its_size():
    of = {"seed": 0, "score": 0.5}
    made = [
        of | {"full_layers": n, "loss": loss, "losses": (loss - 0.01, loss + 0.02)}
        for n, loss in ((0, 9.0), (1, 0.11), (2, 0.12), (6, 0.1))
    ]
    left, right = layerwise.figure(rows(*made)).axes
    assert left.get_yscale() == "log"
    assert [text.get_text() for text in right.texts] == ["+8.900"]
    assert right.get_ylim()[1] < 0.1


def test_layerwise_losses_show_gaps_to_all_layers():
    made = [
        {
            "full_layers": last,
            "seed": 0,
            "loss": loss,
            "score": 0.5,
            "losses": (loss - 0.1, loss + 0.1),
        }
        for last, loss in ((-1, 3.0), (0, 1.2), (2, 1.1), (6, 1.0))
    ]
    fig = layerwise.figure(rows(*made))
    assert fig.finding.startswith("No layer full, loss minus that of all 6: +0.200")
    assert "before fine-tuning 3.000" in fig.what_to_see
    marks = [line.get_ydata() for line in fig.axes[1].get_lines()[:2]]
    assert np.allclose(np.ravel(marks), [0.2, 0.1])
    assert labelled(fig)


def test_router_figure_draws_prediction_and_measurement():
    gate = {"what": "gate", "head_dim": 32, "topk": 2, "trials": 100, "predicted": 0.5}
    heads = {"what": "needle", "length": 256, "seed": 0, "right": (1, 0, 1)}
    fig = router.figure(
        rows(
            gate | {"snr": 0.7, "hits": 45},
            gate | {"snr": 0.9, "hits": 52},
            heads
            | {"key_conv": 1, "predicted_heads": (0.5, 0.25), "recall": (0.5, 0.5)},
            heads | {"key_conv": 3, "predicted_heads": (0.5, 0.25), "recall": (1, 1)},
            {"what": "needle", "attention": "base", "key_conv": 1},
        )
    )
    assert "within 0.050" in fig.finding
    assert "width 3 minus none: no difference above 1.000" in fig.what_to_see
    assert "off by 0.38 on average" in fig.what_to_see
    assert labelled(fig)


@pytest.mark.parametrize(
    "module", [layerwise, recall, router], ids=lambda m: m.EXPERIMENT.name
)
def test_figures_draw_the_rows_of_a_base_alone(module):
    row = {"attention": "base", "what": "needle", "pairs": 8, "full_layers": -1}
    row |= {"loss": 1.0, "seed": 0}
    assert module.figure(rows(row)).alt


def test_head_reads_counts_and_outlines():
    selected = torch.full((20, 2, 3), -1)
    selected[..., -1] = (torch.arange(20) // 4)[:, None]
    selected[16:, 0, 0] = 1
    selected[17:, 1, 1] = 2
    fig = viz.head_reads([selected, None], [16, 17, 18], [1], b"407")
    assert fig.finding == "1 of 2 heads read block 1 for '407'"
    assert "layer 0, head 0 reads the needle's block for 3" in fig.what_to_see
    assert [text.get_text() for text in fig.axes[0].texts] == ["3", "2"]
    fig = viz.head_reads([selected], [16, 17], [0, 3], b"40")
    assert fig.finding == "No head reads block 0 or 3 while '40' is written"
    with pytest.raises(ValueError, match="got 0 such layers"):
        viz.head_reads([None], [16], [1], b"4")
