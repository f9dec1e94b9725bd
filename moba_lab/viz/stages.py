"""Read what a recorded measurement says of its stages, and of the machine."""

from dataclasses import dataclass

STAGES = (
    *("partition", "pool", "gate", "route"),
    *("past", "current", "combine", "backward"),
)
CEILINGS = ("copy_bytes_per_s", "matmul_flops_per_s")


@dataclass(frozen=True)
class Stage:
    """Hold one measured stage.

    Attributes:
        name: of the stage.
        seconds: median.
        flops: what it must compute.
        bytes: what it must move.
        copying: seconds that a copy of so many bytes takes.
        computing: seconds that a matrix product of so many FLOP takes.
    """

    name: str
    seconds: float
    flops: float
    bytes: float
    copying: float
    computing: float

    @property
    def least(self):
        """Seconds that the ceilings allow."""
        return max(self.copying, self.computing)

    @property
    def share(self):
        """Speed, as a share of what the ceilings allow."""
        return self.least / self.seconds

    @property
    def bound(self):
        """Which ceiling is the lower one."""
        return "copying" if self.copying >= self.computing else "computing"

    @property
    def intensity(self):
        """FLOP per byte."""
        return self.flops / self.bytes


def ceilings(row):
    """Return the bytes per second of a copy and the FLOP per second of a product."""
    return tuple(float(row[column]) for column in CEILINGS)


def stages(row):
    """Read the stages of a recorded measurement that took time and must do something.

    Args:
        row: {column: text or number} with STAGE_s, STAGE_flops, STAGE_bytes,
            copy_bytes_per_s and matmul_flops_per_s, as `moba_fast.bench` records them.

    Returns:
        List of Stage.

    Raises:
        ValueError: if the measurement failed, or lacks the ceilings or all stages.
    """
    if row.get("status", "ok") != "ok":
        raise ValueError(f"expected a measurement, got {row['status']}")
    if missing := [column for column in CEILINGS if not row.get(column)]:
        raise ValueError(f"expected a measurement with {' and '.join(missing)}")
    copy, matmul = ceilings(row)
    found = []
    for name in STAGES:
        seconds, flops, size = (
            float(row.get(f"{name}_{what}") or 0) for what in ("s", "flops", "bytes")
        )
        found.append(Stage(name, seconds, flops, size, size / copy, flops / matmul))
    found = [stage for stage in found if stage.seconds and stage.least]
    if not found:
        raise ValueError("expected measured stages with their flops or bytes, got none")
    return found


def read_rows(rows):
    """Return the stages of one or two measurements.

    Raises:
        ValueError: if there are not one or two, or one cannot be read.
    """
    if not 1 <= len(rows) <= 2:
        raise ValueError(f"expected one or two measurements, got {len(rows)}")
    return [stages(row) for row in rows]


def shape(row):
    """Name the shape of a measurement in two short lines."""
    tokens = int(row["S"]) * int(row.get("batch") or 1)
    heads, block_size, topk = (int(row[n]) for n in ("H", "block_size", "topk"))
    return f"{tokens:,} tokens, {heads} heads,\nblocks of {block_size:,}, topk {topk}"


def with_blocks(row):
    """Name a measurement by its blocks."""
    return f"with blocks of {int(row['block_size']):,}"


def provenance(row):
    """Say on what, with what and when a row was measured."""
    versions = f"PyTorch {row['torch']}, Triton {row['triton']}"
    return f"{row['device']}, driver {row['driver']}, {versions}, {row['date'][:10]}"


def longest(found):
    """Return the stage that took the most time."""
    return max(found, key=lambda stage: stage.seconds)


def capitalized(parts):
    """Join parts of a title and begin it with a capital letter."""
    title = "; ".join(parts)
    return title[0].upper() + title[1:]
