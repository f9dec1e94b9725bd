"""Put recorded measurements into sentences, without a number of their own."""

import re
from collections import defaultdict

from moba_lab.recorded import pick, program


def account(rows, workloads):
    """Say what of some workloads was recorded and what was not, one line each.

    Example:
        >>> from moba_lab.recorded import Row
        >>> row = Row(workload="A", S=8, kernel="triton", status="ok")
        >>> bad = Row(row, kernel="aten", status="out of memory")
        >>> account([row, bad], ["A", "B"])
        ['A: 1 measured; flash at 8 tokens: out of memory', 'B: not recorded']
        >>> account([Row(row, message="a busy GPU"), row], ["A"])
        ['A: 2 measured; 1 of them: a busy GPU']
    """
    lines = []
    for name in workloads:
        of = pick(rows, workload=name)
        parts = [f"{len(pick(of, status='ok'))} measured"] if of else ["not recorded"]
        parts += [
            f"{program(row)} at {row['S']:,} tokens: {row['status']}"
            for row in of
            if row["status"] != "ok"
        ]
        notes = [row["message"] for row in pick(of, status="ok") if row["message"]]
        parts += [f"{notes.count(note)} of them: {note}" for note in sorted(set(notes))]
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def losses(rows):
    """List where dense attention is faster, one line per workload and program.

    Example:
        >>> from moba_lab.recorded import Row
        >>> same = {"workload": "F", "topk": 3, "direction": "forward"}
        >>> ours = [Row(same, kernel="triton", S=8, speedup=0.5)]
        >>> ours.append(Row(same, kernel="triton", S=16, speedup=1.5))
        >>> losses([*ours, Row(same, kernel="aten", S=8, speedup=2.0)])
        ['F, topk 3, forward, triton: at 1 of 2 lengths, at last 0.50x at 8 tokens']
    """
    groups = defaultdict(dict)
    for row in rows:
        if row["speedup"] is not None:
            clustered = ", clustered" if row["routing"] == "clustered" else ""
            name = (
                f"{row['workload']}, topk {row['topk']}, {row['direction']}, "
                f"{program(row)}{clustered}"
            )
            groups[name][row["S"]] = row["speedup"]
    lines = []
    for name, speedups in groups.items():
        lost = [tokens for tokens, speedup in speedups.items() if speedup < 1]
        if lost:
            lines.append(
                f"{name}: at {len(lost)} of {len(speedups)} lengths, at last "
                f"{speedups[max(lost)]:.2f}x at {max(lost):,} tokens"
            )
    return lines


def against(row, work):
    """Hold a count by hand against what a row says that its stages had to do.

    Args:
        row: Row.
        work: dict from stage to (FLOPs, bytes).

    Returns:
        For each stage that both have, the recorded FLOPs and bytes over the counted.

    Example:
        >>> from moba_lab.recorded import Row
        >>> against(Row(past_flops=8, past_bytes=11), {"past": (8, 10), "gate": (1, 1)})
        'past 1.00 and 1.10'
    """
    parts = []
    for stage, counted in work.items():
        found = row[f"{stage}_flops"], row[f"{stage}_bytes"]
        if None not in found:
            flops, size = (a / b for a, b in zip(found, counted, strict=True))
            parts.append(f"{stage} {flops:.2f} and {size:.2f}")
    return ", ".join(parts) or "not recorded"


def clustered_cost(rows):
    """List the time of clustered choices over that of random ones, one line each.

    Example:
        >>> from moba_lab.recorded import Row
        >>> row = Row(workload="E", kernel="triton", direction="forward", S=8, H=1)
        >>> one = Row(row, routing="random", total_median_s=2.0)
        >>> clustered_cost([one, Row(row, routing="clustered", total_median_s=3.0)])
        ['E, triton, forward: 1.50 times the time of random choices']
    """
    same = ("workload", "kernel", "direction", "S", "H", "block_size", "topk")
    lines = []
    for row in pick(rows, routing="clustered"):
        for other in pick(rows, routing="random", **{name: row[name] for name in same}):
            both = row["total_median_s"], other["total_median_s"]
            if None not in both:
                what = f"{row['workload']}, {program(row)}, {row['direction']}"
                ratio = f"{both[0] / both[1]:.2f} times the time of random choices"
                lines.append(f"{what}: {ratio}")
    return lines


def over_peers(row):
    """Say how much faster a row is than every dense attention that ran beside it.

    Example:
        >>> from moba_lab.recorded import Row
        >>> over_peers(Row(dense_notes="flash: 3 s; cudnn: 2 s", total_median_s=0.5))
        '6.0x over flash, 4.0x over cudnn'
    """
    peers = dense_times(row).items()
    return ", ".join(f"{t / row['total_median_s']:.1f}x over {x}" for x, t in peers)


def dense_times(row):
    """Return the seconds of every dense attention that was measured beside a row.

    Example:
        >>> from moba_lab.recorded import Row
        >>> notes = "flash-attn: 0.5 s (0.4 to 0.6); flash: 2 s; cudnn: out of memory"
        >>> dense_times(Row(dense_notes=notes))
        {'flash-attn': 0.5, 'flash': 2.0}
    """
    notes = row["dense_notes"] or ""
    found = re.findall(r"([\w-]+): ([\d.]+) s(?: \([^;]*\))?(?:;|$)", notes)
    return {name: float(seconds) for name, seconds in found}
