"""Keep the keys and values of growing sequences, and attend from their last tokens."""

import torch
from torch.nn.functional import pad

from moba_fast.cache_checks import (
    check_append,
    check_attend,
    check_numbers,
    check_queries,
    check_sizes,
)
from moba_fast.checks import check_integer
from moba_fast.device import upload
from moba_fast.hand_over import check_hand_over, check_pages
from moba_fast.last_tokens import attend_last, blocks_of, gather, offsets
from moba_fast.pages import PagePool, PageTable, expand_ranges, make_means


class PagedKVCache:
    """Hold keys and values in pages of one block, for decoding and chunked prefill.

    Sequences of different lengths grow by `append`, and their last tokens attend to
    all of it by `attend`. The gate scores the means of complete blocks, each written
    once, when its block completes, with the bits that one-shot prefill gives it
    (`PagePool` says why). So the choice of blocks does not depend on how a prompt was
    cut, and a step of decoding reads one mean per block and topk blocks per query head,
    never all keys.

    A cache serves one attention layer and keeps no gradients. Lengths and the page
    table are kept on the host too, so that a step waits for the device only where the
    gate asks for ties or a block completes. Offsets on the host save a wait, too.

    Attributes:
        block_size: tokens per block and page.
        pool: PagePool with k, v (pages, block_size, HK, D) and k_mean (pages, HK, D).
        table: PageTable, pages of every sequence.
        lengths: (B,) int64 on the host, tokens of every sequence.

    Example: a prompt of 4 tokens, then two steps of decoding with topk=2.
        >>> cache = PagedKVCache(block_size=2, kv_heads=1, head_dim=1)
        >>> k = torch.tensor([1.0, 0, 0, 0, 0, 9])[:, None, None]
        >>> v, q = torch.arange(6.0)[:, None, None], torch.ones(1, 1, 1)
        >>> cache.append(k[:4], v[:4])
        >>> for i in (4, 5):
        ...     cache.append(k[i : i + 1], v[i : i + 1])
        ...     out, lse, selected = cache.attend(q, topk=2, return_aux=True)
        ...     print(selected.tolist(), round(out.item(), 3))
        [[[0, 2]]] 1.06
        [[[0, 2]]] 4.998
        >>> cache.lengths.tolist(), cache.table.host.tolist()
        ([6], [[0, 1, 2, -1]])
    """

    def __init__(
        self,
        block_size,
        kv_heads,
        head_dim,
        *,
        sequences=1,
        pages=None,
        dtype=torch.float32,
        device="cpu",
    ):
        """Make a cache of empty sequences that owns its pages.

        Args:
            block_size: tokens per block, at least 1.
            kv_heads: HK, key/value heads.
            head_dim: D, head dimension.
            sequences: B, at least 1; see `add_sequences`.
            pages: pages in all. None: as many as are needed; the pool doubles when it
                is full, which copies it.
            dtype: of keys and values: float64, float32, bfloat16 or float16.
            device: where they are kept.

        Raises:
            TypeError: if a number is no int, or the dtype is not one of these.
            ValueError: if a number is less than 1.
        """
        given = (sequences, pages, block_size, kv_heads, head_dim, dtype)
        sequences, *sizes = check_sizes(*given)
        self.pool = PagePool.allocate(*sizes, dtype, device)
        self.lengths = torch.zeros(sequences, dtype=torch.int64)
        self.table = PageTable(torch.full((sequences, 1), -1), self.pool)

    @classmethod
    def from_pages(
        cls, k_pages, v_pages, page_table, lengths, *, k_mean=None, free_pages=()
    ):
        """Make a cache over tensors that somebody else owns, without copying them.

        Pages are written in place. Rows of the table may share pages, as after a common
        prompt; a shared page is copied before it is written. Pages that a row has
        beyond its length are for its next tokens, until `crop` or `reorder` makes them
        free pages of the cache.

        Args:
            k_pages: (pages, block_size, HK, D) keys, any strides.
            v_pages: (pages, block_size, HK, D) values.
            page_table: (B, M) integers, pages of every sequence in order, then -1.
            lengths: (B,) integers, tokens of every sequence that are there already.
            k_mean: (pages, HK, D) float32, or float64 with float64 keys: room for the
                means, with those of complete pages in place, as an earlier cache over
                the same pages has them. None: made here, by one pass over the keys.
            free_pages: pages that the cache may take when a row has none left.

        Raises:
            TypeError: if an argument has the wrong type or dtype.
            ValueError: if shapes or devices do not fit together, a page is named that
                there is not or that cannot be at this place, or a sequence is longer
                than its pages.

        Example: one sequence whose second page stands first in memory.
            >>> k = torch.tensor([[5.0, 0], [1, 3]])[..., None, None]
            >>> cache = PagedKVCache.from_pages(k, k, [[1, 0]], [3])
            >>> cache.append(torch.tensor([[[7.0]]]), torch.tensor([[[7.0]]]))
            >>> k[0].ravel(), cache.pool.k_mean.ravel()
            (tensor([5., 7.]), tensor([6., 2.]))
        """
        check_pages(k_pages, v_pages, k_mean)
        host, lengths, free = check_hand_over(k_pages, page_table, lengths, free_pages)
        cache = cls.__new__(cls)
        means = make_means(k_pages) if k_mean is None else k_mean
        cache.pool = PagePool(k_pages, v_pages, means, free, grows=False)
        cache.table, cache.lengths = PageTable(host, cache.pool), lengths
        cache.pool.share(host[host >= 0])
        if k_mean is None:
            complete = expand_ranges(0, lengths // cache.block_size)
            cache.pool.average(host[complete].unique())
        return cache

    @property
    def block_size(self):
        """Tokens per block and page."""
        return self.pool.k.shape[1]

    def append(self, k, v, cu_seqlens=None):
        """Add tokens at the end of the sequences, one or a chunk for each, or none.

        Args:
            k: (S, HK, D) keys, packed, in the cache's dtype.
            v: (S, HK, D) values.
            cu_seqlens: (B+1,) offsets of every sequence's tokens in the pack. None:
                every sequence gets as many.

        Raises:
            TypeError: if k or v is no tensor of the cache's dtype, or offsets are no
                integers.
            ValueError: if shapes, devices or offsets do not fit, or a gradient would
                be lost.
            OutOfPagesError: if the pool is full; nothing was added.
        """
        count = check_append(self, k, v, cu_seqlens)
        self.table.make_room(self.lengths, count)
        sequence, position = expand_ranges(self.lengths, count)
        page = self.table.host[sequence, position // self.block_size]
        self.pool.write(page, position % self.block_size, k, v)
        before = self.lengths // self.block_size
        self.lengths = self.lengths + count
        completed = self.lengths // self.block_size - before
        self.pool.average(self.table.host[expand_ranges(before, completed)])

    def attend(
        self,
        q,
        *,
        topk,
        cu_seqlens=None,
        softmax_scale=None,
        selected=None,
        return_aux=False,
    ):
        """Attend from the last tokens of the sequences to everything before them.

        The result is that of `moba_attention` with ``cu_seqlens_k`` over all keys. What
        is read is not: a single query reads the block means of its sequence and its
        topk pages. A chunk of many queries would read most pages more than once, so
        where copying the keys of its sequence out of the pages reads less, that is
        done, once, and `moba_attention` runs over the copy.

        Args:
            q: (S, H, D) queries, packed, in the cache's dtype; those of a sequence
                stand at its last tokens, which were appended before.
            topk: blocks per query, the current one included, at least 1. None: all
                blocks, which is full attention (the paper's full decoding after sparse
                prefill).
            cu_seqlens: (B+1,) offsets of every sequence's queries in the pack. None:
                every sequence has as many.
            softmax_scale: factor on the scores. None: D ** -0.5.
            selected: (S, H, topk) int32 block ids that replace the gate's choice.
            return_aux: also return lse and selected.

        Returns:
            out: (S, H, D) in q's dtype; with return_aux also lse (S, H), at least
            float32, and selected (S, H, topk) int32, ids as in `blocks`, or None with
            topk=None.

        Raises:
            TypeError: if an argument has the wrong type or dtype.
            ValueError: if shapes, devices, offsets, topk or selected do not fit, a
                sequence has more queries than tokens, or a gradient would be lost.
        """
        count, topk = check_attend(self, q, topk, cu_seqlens, selected)
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        result = attend_last(self, q, count, topk, scale, selected)
        return result if return_aux else result[0]

    def blocks(self, cu_seqlens):
        """Cut the sequences into blocks, as the ids of `selected` count them.

        Args:
            cu_seqlens: (B+1,) offsets of the queries, as in `attend`.

        Returns:
            Blocks, on the device of the pages.

        Raises:
            TypeError: if the offsets are not integers.
            ValueError: if they do not fit, or name more queries than tokens.
        """
        return blocks_of(self, check_queries(self, cu_seqlens))

    def gather(self):
        """Copy keys and values out of the pages, packed as for `moba_attention`.

        Returns:
            k: (SK, HK, D).
            v: (SK, HK, D).
            cu_seqlens_k: (B+1,) int32 offsets of the sequences.
        """
        k, v = gather(self, torch.arange(len(self.lengths)))
        return k, v, upload(offsets(self.lengths), k.device)

    def crop(self, lengths):
        """Forget the tokens beyond new lengths, as after rejected guesses.

        Pages without a token are free again. The mean of a block that is no longer
        complete is not read, and is written anew when the block completes again.

        Args:
            lengths: (B,) integers, tokens that every sequence keeps; or one for all.

        Raises:
            TypeError: if they are not integers.
            ValueError: if they are no number per sequence from 0 to its length.
        """
        lengths = torch.as_tensor(lengths)
        lengths = lengths if lengths.ndim else lengths.expand(len(self.lengths))
        self.lengths = check_numbers(
            lengths, "lengths", self.lengths, "lengths up to the sequence's own"
        )
        self.table.trim(self.lengths)

    def reorder(self, index):
        """Replace the sequences by some of them, in any order, also more than once.

        Sequences share their pages. One that is about to write into a page that another
        one holds too gets a copy of it first: of its last page, never of another.

        Args:
            index: (B',) integers, the old sequence that each new one continues.

        Raises:
            TypeError: if they are not integers.
            ValueError: if one is not from 0 to B - 1.

        Example: of two beams the second wins; then the copies differ.
            >>> cache = PagedKVCache(block_size=4, kv_heads=1, head_dim=1, sequences=2)
            >>> x = torch.tensor([1.0, 2.0])[:, None, None]
            >>> cache.append(x, x)
            >>> cache.reorder([1, 1])
            >>> cache.append(10 * x, 10 * x)
            >>> cache.gather()[0].ravel()
            tensor([ 2., 10.,  2., 20.])
        """
        index = check_numbers(index, "index", len(self.lengths) - 1, "sequences")
        self.table.trim(self.lengths)
        self.lengths, self.table = self.lengths[index], self.table.select(index)

    def add_sequences(self, n=1):
        """Add n empty sequences after the others."""
        n = check_integer(n, "n")
        self.table = PageTable(pad(self.table.host, (0, 0, 0, n), value=-1), self.pool)
        self.lengths = pad(self.lengths, (0, n))

    def release(self, sequences):
        """Remove sequences; the others close up, and unshared pages are free again.

        Args:
            sequences: list of integers, the sequences to remove.

        Raises:
            TypeError: if they are not integers.
            ValueError: if one is not from 0 to B - 1.
        """
        gone = check_numbers(sequences, "sequences", len(self.lengths) - 1, "sequences")
        index = torch.arange(len(self.lengths))
        self.reorder(index[~torch.isin(index, gone)])
