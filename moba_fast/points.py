"""Say what one measurement is of, and draw its inputs."""

from dataclasses import asdict, dataclass

import torch

# How far queries of a run lie from the direction that they share, in its own length.
SPREAD_OF_RUN = 0.1


@dataclass(frozen=True)
class Point:
    """Describe one measurement.

    Attributes:
        S: tokens of a sequence.
        H: query heads.
        HK: key/value heads.
        D: head dimension.
        block_size: tokens per block.
        topk: blocks per query.
        dtype: name of a torch dtype.
        backward: whether the gradients are computed, too.
        batch: sequences of S tokens in the pack.
        routing: "random", so that queries choose blocks all over their past, or
            "clustered"; see `clustered`.
        workload: name of the group that the point belongs to; may be empty.
        backends: names of the backends to measure; empty: all of the suite's.
    """

    S: int
    H: int
    HK: int
    D: int
    block_size: int
    topk: int
    dtype: str
    backward: bool = False
    batch: int = 1
    routing: str = "random"
    workload: str = ""
    backends: tuple = ()

    @property
    def direction(self):
        """What is measured, in words."""
        return "forward+backward" if self.backward else "forward"

    @property
    def columns(self):
        """What the point says, as columns of a table."""
        columns = asdict(self)
        del columns["backward"], columns["backends"]
        return columns | {"direction": self.direction}

    @property
    def cu_seqlens(self):
        """Offsets of the sequences, (batch + 1,) int64 on the CPU; None for one."""
        ends = torch.arange(self.batch + 1) * self.S
        return None if self.batch == 1 else ends

    def __str__(self):
        tokens = f"{self.batch}x" if self.batch > 1 else ""
        heads = f"{self.H}" if self.H == self.HK else f"{self.H}/{self.HK}"
        words = (
            *(self.workload, tokens + in_units(self.S), f"H={heads}", f"D={self.D}"),
            *(f"B={self.block_size}", f"k={self.topk}", self.dtype, self.direction),
            "" if self.routing == "random" else self.routing,
        )
        return " ".join(filter(None, words))


def point_of(columns):
    """Return the point that `Point.columns` come from; other columns are ignored.

    Example:
        >>> point = Point(8, 1, 1, 4, 2, 1, "float32", backward=True)
        >>> point_of(point.columns) == point
        True
    """
    fields = {x: columns[x] for x in Point.__dataclass_fields__ if x in columns}
    return Point(**fields, backward="backward" in columns["direction"])


def in_units(count):
    """Write a number of tokens with K or M where it divides.

    Example:
        >>> in_units(32_768), in_units(2**20), in_units(1000)
        ('32K', '1M', '1000')
    """
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def inputs(point, device):
    """Draw q, k, v and the gradient of the output, with a fixed seed.

    Returns:
        leaves: q (T, H, D), k and v (T, HK, D) for T = batch * S tokens, which need a
            gradient where the point asks for one.
        dout: (T, H, D).

    Raises:
        ValueError: if the point's routing is neither "random" nor "clustered".

    Example:
        >>> leaves, dout = inputs(Point(8, 4, 2, 16, 2, 1, "float32", batch=3), "cpu")
        >>> [tuple(x.shape) for x in (*leaves, dout)]
        [(24, 4, 16), (24, 2, 16), (24, 2, 16), (24, 4, 16)]
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype, tokens = getattr(torch, point.dtype), point.batch * point.S
    options = {"dtype": dtype, "device": device, "generator": generator}
    q, k, v, dout = (
        torch.randn(tokens, heads, point.D, **options)
        for heads in (point.H, point.HK, point.HK, point.H)
    )
    if point.routing == "clustered":
        clustered(q, k, point, generator)
    elif point.routing != "random":
        raise ValueError(
            f"expected routing 'random' or 'clustered', got {point.routing!r}"
        )
    return [x.requires_grad_(point.backward) for x in (q, k, v)], dout


def clustered(q, k, point, generator):
    """Change random queries and keys so that the gate's choices have structure.

    Runs of block_size / 4 queries share a direction, so that they score blocks almost
    alike. The first axis belongs to an attention sink: the keys of every sequence's
    first block have sqrt(D) there, other keys nothing and queries sqrt(D), which adds D
    to the score of the first block, where the others spread by sqrt(D / block_size).

    Args:
        q: (T, H, D) standard normal queries, is changed.
        k: (T, HK, D) standard normal keys, is changed.
        point: Point.
        generator: torch.Generator on their device.
    """
    length = max(1, point.block_size // 4)
    of_query = torch.arange(point.S, device=q.device) // length
    shape = point.batch, int(of_query[-1]) + 1, point.H, point.D
    shared = torch.randn(shape, dtype=q.dtype, device=q.device, generator=generator)
    q.mul_(SPREAD_OF_RUN)
    for queries, direction in zip(q.split(point.S), shared, strict=True):
        queries += direction[of_query]
    k[..., 0] = 0.0
    for keys in k.split(point.S):
        keys[: point.block_size, :, 0] = point.D**0.5
    q[..., 0] = point.D**0.5
