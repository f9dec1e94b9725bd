"""Keep keys and values in pages of one block each, and say whose pages they are."""

import torch
from torch.nn.functional import pad

from moba_fast.blocks import partition
from moba_fast.device import upload
from moba_fast.gate import gate_dtype, pool_keys

# Elements that are copied out of the pages at once: 64 MiB of float32.
ELEMENTS_PER_COPY = 2**24


class OutOfPagesError(RuntimeError):
    """Say that a pool of fixed size has too few free pages; nothing was changed."""


class PagePool:
    """Hold the pages of all sequences, how many use each one, and the free ones.

    A page's mean is written once, when its last key is there, by `pool_keys` over the
    keys of this page. Sums that run along with the tokens would round differently for
    every way to cut a prompt: a chunk is summed before it is added. The keys of a page
    are the same in the same order whatever the cut, and `pool_keys` sums every block by
    itself, so a mean has the bits of one-shot prefill. It costs the reading of one key
    per token, once.

    Attributes:
        k: (pages, block_size, HK, D) keys.
        v: (pages, block_size, HK, D) values.
        k_mean: (pages, HK, D) means of the keys of complete pages, at least float32.
            Those of other pages are undefined.
        users: (pages,) int64 on the host, sequences that hold a page.
        free: list of pages that nobody holds, the next one last.
        grows: whether the pool makes more pages when none is free.
    """

    def __init__(self, k, v, k_mean, free, grows):
        self.k, self.v, self.k_mean = k, v, k_mean
        self.free, self.grows = free, grows
        with torch.inference_mode(False):
            self.users = torch.zeros(len(k), dtype=torch.int64)

    @classmethod
    def allocate(cls, pages, block_size, kv_heads, head_dim, dtype, device):
        """Make a pool of free pages; pages=None makes one that grows."""
        with torch.inference_mode(False):
            shape = (pages or 0, block_size, kv_heads, head_dim)
            k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, make_means(k), list(range(len(k)))[::-1], pages is None)

    def take(self, n):
        """Hand out n free pages, with one user each.

        Returns:
            pages: (n,) int64 on the host.

        Raises:
            OutOfPagesError: if fewer than n are free and the pool does not grow.
        """
        if n > len(self.free) and not self.grows:
            raise OutOfPagesError(
                f"expected {n} free pages, got {len(self.free)} of {len(self.k)}; "
                f"release or crop sequences, or give the cache more pages"
            )
        if n > len(self.free):
            self.grow(max(2 * len(self.k), len(self.k) - len(self.free) + n))
        pages = torch.tensor([self.free.pop() for _ in range(n)], dtype=torch.int64)
        self.users[pages] = 1
        return pages

    def grow(self, n):
        """Make room for n pages in all; whoever doubles copies each page once."""
        old = len(self.k)
        with torch.inference_mode(False):
            old_tensors = (self.k, self.v, self.k_mean)
            new_tensors = [x.new_empty(n, *x.shape[1:]) for x in old_tensors]
            for new, x in zip(new_tensors, old_tensors, strict=True):
                new[:old] = x
            self.k, self.v, self.k_mean = new_tensors
            self.users = pad(self.users, (0, n - old))
        self.free[:0] = range(n - 1, old - 1, -1)

    def share(self, pages):
        """Count one more user of every listed page; a page may be listed often."""
        self.users.index_add_(0, pages, torch.ones_like(pages))

    def release(self, pages):
        """Count one user less of every listed page; without a user it is free."""
        self.users.index_add_(0, pages, -torch.ones_like(pages))
        unused = pages[self.users[pages] == 0].unique()
        self.free.extend(unused.tolist()[::-1])

    def write(self, page, offset, k, v):
        """Put (T, HK, D) keys and values at a page and an offset each."""
        at = tuple(upload(torch.stack([page, offset]), self.k.device))
        self.k[at], self.v[at] = k, v

    def copy(self, source, target):
        """Copy keys and values from pages to others."""
        source, target = upload(torch.stack([source, target]), self.k.device)
        self.k[target], self.v[target] = self.k[source], self.v[source]

    def average(self, pages):
        """Write the means of complete pages, by one pass over their keys."""
        if len(pages) == 0:
            return
        n = max(1, ELEMENTS_PER_COPY // self.k[0].numel())
        for part in upload(pages, self.k.device).split(n):
            keys = self.k[part].flatten(0, 1)
            offsets = torch.tensor([0, len(keys)], device=keys.device)
            blocks = partition(offsets, self.k.shape[1])
            self.k_mean[part] = pool_keys(keys, blocks)


class PageTable:
    """Hold the pages of every sequence in order, on the host and on the device.

    Attributes:
        pool: PagePool.
        host: (B, M) int64, -1 after the last page of a sequence.
        count: (B,) int64 on the host, pages of every sequence.
        on_device: host on the pool's device, so that a step need not send it.
    """

    def __init__(self, host, pool):
        self.pool = pool
        with torch.inference_mode(False):
            self.host = host.clone()
            self.count = (self.host >= 0).sum(1)
            self.on_device = upload(self.host, pool.k.device)

    def make_room(self, lengths, count):
        """Give every sequence the pages, its own ones, for count more tokens.

        Args:
            lengths: (B,) tokens of every sequence.
            count: (B,) tokens that it is about to write.

        Raises:
            OutOfPagesError: if there are too few; nothing was changed.
        """
        block_size = self.pool.k.shape[1]
        missing = -(-(lengths + count) // block_size) - self.count
        row, column = expand_ranges(self.count, missing.clamp(min=0))
        shared, tail = self.shared_tails(lengths, count)
        fresh = self.pool.take(len(row) + len(shared))
        if len(fresh) == 0:
            return
        old, new = self.host[shared, tail], fresh[len(row) :]
        self.pool.copy(old, new)
        self.pool.release(old)
        self.assign(torch.cat([row, shared]), torch.cat([column, tail]), fresh)

    def shared_tails(self, lengths, count):
        """List the sequences that must not write into their last page, and its column.

        Where all users of a page are about to write, one of them may keep it.
        """
        block_size = self.pool.k.shape[1]
        row = ((count > 0) & (lengths % block_size > 0)).nonzero()[:, 0]
        tail = (lengths // block_size)[row]
        page, which, writers = self.host[row, tail].unique(
            return_inverse=True, return_counts=True
        )
        place = torch.arange(len(row))
        first = torch.full_like(page, len(row)).scatter_reduce(0, which, place, "amin")
        all_write = self.pool.users[page] == writers
        copies = ~(all_write[which] & (first[which] == place))
        return row[copies], tail[copies]

    def trim(self, lengths):
        """Give back the pages after the last token of every sequence."""
        needed = -(-lengths // self.pool.k.shape[1])
        row, column = expand_ranges(needed, self.count - needed)
        self.pool.release(self.host[row, column])
        self.assign(row, column, torch.full_like(row, -1))

    def select(self, index):
        """Return the table of the listed sequences, which replaces this one."""
        table = PageTable(self.host[index], self.pool)
        self.pool.share(table.host[table.host >= 0])
        self.pool.release(self.host[self.host >= 0])
        return table

    def assign(self, row, column, page):
        """Write pages, or -1, into rows and columns: three (n,) int64 on the host."""
        if len(page) == 0:
            return
        missing = int(column.max()) + 1 - self.host.shape[1]
        if missing > 0:
            self.widen(max(missing, self.host.shape[1]))
        more = (page >= 0).long() - (self.host[row, column] >= 0).long()
        self.count.index_add_(0, row, more)
        self.host[row, column] = page
        if self.on_device is not self.host:
            row, column, page = upload(
                torch.stack([row, column, page]), self.pool.k.device
            )
            self.on_device[row, column] = page

    def widen(self, n):
        """Add n empty columns."""
        same = self.on_device is self.host
        with torch.inference_mode(False):
            self.host = pad(self.host, (0, n), value=-1)
            self.on_device = (
                self.host if same else pad(self.on_device, (0, n), value=-1)
            )


def expand_ranges(first, count, total=None):
    """List first[i], first[i] + 1, and so on, count[i] numbers for every i.

    Args:
        first: (n,) int64, or one number for all.
        count: (n,) int64.
        total: the sum of count, where the host knows it and the device need not tell.

    Returns:
        index: (T,) the i of every number.
        number: (T,).

    Example:
        >>> expand_ranges(torch.tensor([5, 0, 8]), torch.tensor([2, 0, 1]))
        (tensor([0, 0, 2]), tensor([5, 6, 8]))
    """
    index = torch.arange(len(count), device=count.device)
    index = index.repeat_interleave(count, output_size=total)
    start = first - (count.cumsum(0) - count)
    return index, start[index] + torch.arange(len(index), device=count.device)


def make_means(k_pages):
    """Make room for the mean of every page, (pages, HK, D)."""
    with torch.inference_mode(False):
        shape, dtype = (len(k_pages), *k_pages.shape[2:]), gate_dtype(k_pages)
        return torch.empty(shape, dtype=dtype, device=k_pages.device)
