"""Recorded measurements are read as they are, and compared only where they may be."""

import csv

import pytest

from moba_lab import findings, recorded
from moba_lab.recorded import Curve, Row

FILES = sorted(recorded.FOLDER.glob("bench_*.csv"))
ROW = {
    **{"S": 64, "H": 2, "batch": "", "kernel": "triton", "status": "ok"},
    **{"direction": "forward", "device": "H100", "driver": "580.1", "torch": "2.11.0"},
    **{"triton": "3.6", "date": "2026-11-24T13:03:08Z", "routing": "random"},
    **{"total_median_s": 0.5, "total_quartile1_s": 0.25, "total_quartile3_s": 1.0},
    **{"dense_median_s": 2.0, "dense_quartile1_s": 1.5, "dense_quartile3_s": 2.5},
}


def write(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(ROW | row for row in rows)
    return path


def row(**changed):
    return Row({name: value for name, value in (ROW | changed).items() if value != ""})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_the_project_is_read(path):
    rows = recorded.read(path.name)
    with path.open(newline="", encoding="utf-8") as file:
        raw = list(csv.DictReader(file))
    assert len(rows) == len(raw)
    assert [str(row["S"]) for row in rows] == [row["S"] for row in raw]
    said = recorded.source(rows)
    assert said.startswith(raw[0]["device"])
    beside = f"driver {raw[0]['driver']}" if raw[0]["driver"] else raw[0]["cpu"]
    assert f"{beside}, PyTorch {raw[0]['torch']}" in said
    assert said.endswith(raw[-1]["date"].partition("T")[0])


def test_cells_become_numbers_texts_or_nothing(tmp_path):
    [found] = recorded.read(write(tmp_path / "bench.csv", {}))
    assert found["S"] == 64
    assert found["total_median_s"] == 0.5
    assert (found["triton"], found["batch"], found["no such"]) == ("3.6", None, None)
    with pytest.raises(ValueError, match="S must hold numbers, got '64K'"):
        recorded.read(write(tmp_path / "bench.csv", {"S": "64K"}))


def test_a_file_that_is_not_there_or_empty_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"in none\.csv; on a GPU, record"):
        recorded.read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="has no row: the run that wrote it"):
        recorded.read(write(tmp_path / "bench.csv"))


def test_the_source_names_days_and_refuses_a_second_machine():
    later = row(date="2026-11-26T01:00:00Z")
    assert recorded.source([later, row()]) == (
        "H100, driver 580.1, PyTorch 2.11.0, Triton 3.6, 2026-11-24 to 2026-11-26"
    )
    cpu = row(device="CPU", driver="", cpu="Xeon")
    assert recorded.source([cpu]) == "CPU, Xeon, PyTorch 2.11.0, 2026-11-24"
    for other in ({"device": "H200"}, {"driver": "590"}, {"torch": "2.13.0"}):
        with pytest.raises(ValueError, match="one machine, got 2"):
            recorded.source([row(), row(**other)])
    with pytest.raises(ValueError, match="one machine, got 0"):
        recorded.source([])


def test_curves_are_sorted_and_hold_values_of_one_head():
    rows = [row(S=128, batch=2), row(), row(kernel="aten", total_median_s=8.0)]
    found = recorded.curves(rows)
    assert list(found) == ["dense", "flash", "triton"]
    assert found["triton"] == Curve(
        (64, 128), (0.25, 0.125), (0.125, 0.0625), (0.5, 0.25)
    )
    assert found["dense"].middle == (1.0, 0.5)
    assert found["flash"].middle == (4.0,)


def test_a_call_without_result_leaves_a_gap_but_not_in_the_dense_curve():
    failed = row(S=128, status="out of memory", total_median_s="")
    found = recorded.curves([row(), failed])
    assert found["triton"].tokens == (64,)
    assert found["dense"].tokens == (64, 128)
    half = row(S=128, status="out of memory")
    assert recorded.curves([half])["dense"].tokens == (128,)
    assert "triton" not in recorded.curves([half])
    assert recorded.curves([]) == {}


def test_memory_has_curves_where_it_was_recorded():
    rows = [row(peak_bytes=10, dense_peak_bytes=4), row(S=128, peak_bytes=20)]
    found = recorded.curves(rows, "memory")
    assert found["triton"].middle == (5, 10)
    assert found["dense"] == Curve((64,), (2,), (2,), (2,))


@pytest.mark.parametrize(
    ("dense", "ours", "expected"),
    [
        ([1, 4, 9], [2, 3, 4], 2),
        ([1, 4, 9], [1, 4, 9], 1),
        ([5, 4, 9], [4, 5, 8], 4),
        ([1, 4, 9], [0, 0, 10], None),
    ],
)
def test_the_crossover_holds_for_all_longer_lengths(dense, ours, expected):
    curves = [Curve((1, 2, 4), tuple(x), tuple(x), tuple(x)) for x in (dense, ours)]
    assert recorded.faster_from(*curves) == expected


def test_a_crossover_needs_a_common_length():
    one, other = (Curve((n,), (1,), (1,), (1,)) for n in (64, 128))
    assert recorded.faster_from(one, other) is None


def test_clustered_choices_are_compared_with_random_ones_of_the_same_shape():
    clustered = row(routing="clustered", total_median_s=1.0)
    rows = [clustered, row(), row(S=128, total_median_s=0.1), row(kernel="aten")]
    assert len(findings.clustered_cost(rows)) == 1
    assert "2.00 times" in findings.clustered_cost(rows)[0]
    assert findings.clustered_cost(rows[1:]) == []
