"""Turn the rows of a batch into packed sequences of real tokens, and back."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moba_fast.hf.masks import QUERY, REAL


@dataclass(frozen=True)
class Pack:
    """Hold which tokens of a batch stand where in a pack.

    Attributes:
        cu_q: (n+1,) offsets of the queries; None: one sequence that is its own keys.
        cu_k: (n+1,) offsets of the keys; None: as the queries.
        rows_q: (Q,) which of the B * Sq tokens each query is; None: all in order.
        rows_k: (K,) which of the B * S slots each key is; None: all in order.
        real: (Q,) bool, False for padding that the pack had to take along; None: none.
    """

    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    rows_q: torch.Tensor | None = None
    rows_k: torch.Tensor | None = None
    real: torch.Tensor | None = None

    def queries(self, x):
        """Pack (B, H, Sq, D) queries to (Q, H, D)."""
        return take(x, self.rows_q)

    def keys(self, x):
        """Pack (B, HK, S, D) keys or values to (K, HK, D)."""
        return take(x, self.rows_k)

    def unpack(self, x, batch, fill=0):
        """Return (Q, ...) results as (B, Sq, ...), padding filled.

        Args:
            x: (Q, ...) results, one for every query of the pack.
            batch: (B, Sq).
            fill: what padded queries get.
        """
        if self.real is not None:
            real = self.real.view(-1, *[1] * (x.ndim - 1))
            x = x.masked_fill(~real, fill)
        if self.rows_q is not None:
            whole = x.new_full((batch[0] * batch[1], *x.shape[1:]), fill)
            x = whole.index_copy(0, self.rows_q, x)
        return x.unflatten(0, batch)


def take(x, rows):
    """Put tokens first, (B * S, H, D), and take some rows."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if rows is None else x[rows]


def make_pack(batch, n_keys, roles, position_ids, cu_seq_lens_q, cu_seq_lens_k):
    """Find the sequences of a batch.

    A sequence begins with every row. Where all its tokens are queries of this call, it
    also begins where position_ids do not go on by one (in a row with padding: where
    they go back), as in a batch flattened for training.

    Args:
        batch: (B, Sq), rows and queries in each.
        n_keys: S, key slots of every row.
        roles: what `moba_mask` returned.
        position_ids: (B or 1, Sq) positions of the queries, or None.
        cu_seq_lens_q: offsets of the sequences in the flattened batch, or None.
        cu_seq_lens_k: offsets of their keys; None: the same.

    Returns:
        Pack.

    Raises:
        ValueError: if sequences begin within queries that have a cache, or offsets come
            with padding.
    """
    if cu_seq_lens_q is not None:
        if roles is not None:
            raise ValueError(
                "cu_seq_lens_q says where sequences are, and so does an attention_mask "
                "with padding or a static cache; give one of them"
            )
        return Pack(cu_seq_lens_q, cu_seq_lens_k)
    positions = positions_of(position_ids, batch)
    if roles is not None:
        slots = roles[:, 0, 0]
        whole = n_keys == batch[1]
        return (pack_fixed if torch.compiler.is_compiling() else pack_real)(
            slots, batch, positions, whole
        )
    if n_keys == batch[1]:
        return pack_rows(batch, positions)
    check_continued(positions)
    rows = torch.arange(batch[0] + 1)
    return Pack(rows * batch[1], rows * n_keys)


def positions_of(position_ids, batch):
    """Return (B, Sq) positions; None where none say anything about these queries."""
    if position_ids is None or position_ids.ndim != 2 or batch[1] == 1:
        return None
    if position_ids.shape[1] != batch[1]:
        return None
    return position_ids.expand(batch)


def pack_rows(batch, positions):
    """Pack rows without padding, whose queries are all their keys."""
    B, S = batch
    if positions is None:
        return Pack() if B == 1 else Pack(torch.arange(0, B * S + 1, S))
    begins = pad(positions.diff(dim=1) != 1, (1, 0), value=True).flatten()
    if torch.compiler.is_compiling():
        return Pack(offsets_of_fixed_length(begins))
    if B == 1 and int(begins.sum()) == 1:
        return Pack()
    return Pack(pad(begins.nonzero()[:, 0], (0, 1), value=B * S))


def pack_real(slots, batch, positions, _):
    """Pack the real tokens of rows with padding."""
    real = (slots & REAL).bool()
    first = int((slots[0] & QUERY).argmax())
    real_q = real[:, first : first + batch[1]]
    rows_q, rows_k = (x.flatten().nonzero()[:, 0] for x in (real_q, real))
    count_q, count_k = real_q.sum(1), real.sum(1)
    cu_q, cu_k = (pad(x.cumsum(0), (1, 0)) for x in (count_q, count_k))
    if positions is not None:
        kept = positions[real_q]
        row = torch.arange(batch[0], device=kept.device).repeat_interleave(count_q)
        back = pad((kept.diff() <= 0) & (row.diff() == 0), (1, 0))
        if bool((count_q == count_k).all()):
            begins = back | pad(row.diff() != 0, (1, 0), value=True)[: len(back)]
            cu_q, cu_k = pad(begins.nonzero()[:, 0], (0, 1), value=len(kept)), None
        elif bool(back.any()):
            raise_continued()
    return Pack(cu_q, cu_k, rows_q, rows_k)


def pack_fixed(slots, batch, positions, whole):
    """Pack rows with padding so that no size depends on data, for torch.compile.

    Every row is sorted into its real tokens and its padding, which is a sequence of its
    own. It costs the attention of the padding.
    """
    B, Sq = batch
    real = (slots & REAL).bool()
    first = (slots[0] & QUERY).argmax()
    at = first + torch.arange(Sq, device=slots.device)
    real_q = real.index_select(1, at)
    rows, flags = [], []
    for x in (real_q, real):
        order = (~x).int().argsort(dim=1, stable=True)
        base = torch.arange(B, device=x.device)[:, None] * x.shape[1]
        rows.append((order + base).flatten())
        flags.append(x.gather(1, order))
    counts = [torch.stack([x.sum(1), (~x).sum(1)], 1).flatten() for x in (real_q, real)]
    cu_q, cu_k = (pad(x.cumsum(0), (1, 0)) for x in counts)
    if whole and positions is not None:
        ordered = positions.flatten()[rows[0]].view(B, Sq)
        back = (ordered.diff(dim=1) <= 0) & flags[0][:, 1:]
        ends = flags[0][:, :-1] != flags[0][:, 1:]
        begins = pad(back | ends, (1, 0), value=True).flatten()
        cu_q, cu_k = offsets_of_fixed_length(begins), None
    return Pack(cu_q, cu_k, *rows, flags[0].flatten())


def sequence_of_tokens(batch, n_keys, roles, position_ids, cu_seq_lens_q):
    """Say of which packed sequence every token is, counted in its row; see `make_pack`.

    Returns:
        (B, S) integers; None where every row is one sequence.

    Raises:
        ValueError: as `make_pack`.
    """
    if cu_seq_lens_q is not None:
        token = torch.arange(batch[0] * batch[1], device=cu_seq_lens_q.device)
        return torch.searchsorted(cu_seq_lens_q, token, right=True).view(batch)
    positions = positions_of(position_ids, batch)
    if positions is None:
        return None
    if n_keys != batch[1]:
        if roles is None:
            check_continued(positions)
        return None
    if roles is None:
        begins = positions.diff(dim=1) != 1
    else:
        real = (roles[:, 0, 0] & REAL).bool()
        token = torch.arange(batch[1], device=real.device)
        last_real = token.where(real, -1).cummax(1).values
        before = positions.gather(1, last_real.clamp(min=0))[:, :-1]
        begins = real[:, 1:] & (last_real[:, :-1] >= 0) & (positions[:, 1:] <= before)
    return pad(begins.cumsum(1), (1, 0))


def offsets_of_fixed_length(begins):
    """List where sequences begin, (n,) bool, as n + 1 offsets; what is over is empty.

    Example:
        >>> offsets_of_fixed_length(torch.tensor([True, False, False, True]))
        tensor([0, 3, 4, 4, 4])
    """
    n = begins.shape[0]
    place = torch.arange(n, device=begins.device)
    return pad(place.masked_fill(~begins, n).sort().values, (0, 1), value=n)


def check_continued(positions):
    """Raise ValueError if queries that have a cache are of several sequences."""
    if torch.compiler.is_compiling() or positions is None:
        return
    if bool((positions.diff(dim=1) <= 0).any()):
        raise_continued()


def raise_continued():
    """Say that packed sequences cannot have a cache."""
    raise ValueError(
        "position_ids begin anew within queries that have keys in a cache, so nobody "
        "knows whose keys these are; call the model with use_cache=False, or with one "
        "sequence per row"
    )
