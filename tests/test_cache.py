"""PagedKVCache against one-shot prefill: every cut, crops, beams, foreign pages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from impls import FAST, cases, make_case

import moba_fast
import moba_ref
from moba_fast import PagedKVCache, decode, gate, last_tokens, pages
from moba_fast.gate import gate_dtype, pool_keys, top_blocks
from moba_lab.agree import agree, plain_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# How `attend` reads a chunk: as it decides itself, page by page, or from a copy.
WAYS = {
    "auto": last_tokens.copying_reads_less,
    "pages": lambda cache, count, heads, topk: torch.zeros_like(count).bool(),
    "copy": lambda cache, count, heads, topk: count > 0,
}


def tensors(case, dtype):
    return tuple(torch.tensor(x).to(dtype) for x in (case.q, case.k, case.v))


def new_cache(case, dtype, **options):
    kv_heads, head_dim = case.k.shape[1:]
    sequences = len(case.cu_seqlens) - 1
    options = {"sequences": sequences, "dtype": dtype, **options}
    return PagedKVCache(case.block_size, kv_heads, head_dim, **options)


def rows_of(case, start, count):
    """List the tokens of a pack that stand at start to start + count per sequence."""
    ranges = zip(case.cu_seqlens[:-1], start, count, strict=True)
    rows = [np.arange(first + a, first + a + n) for first, a, n in ranges]
    return torch.as_tensor(np.concatenate(rows))


@st.composite
def cuts(draw, case):
    """Draw rounds of tokens per sequence, zeros included, that add up to the case."""
    lengths = np.diff(case.cu_seqlens)
    if draw(st.booleans()):
        rounds = [(lengths > i).astype(int) for i in range(lengths.max(initial=0))]
        return rounds or [0 * lengths]
    rounds, left = [], lengths.copy()
    for _ in range(draw(st.integers(0, 4))):
        count = np.array([draw(st.integers(0, n)) for n in left.tolist()])
        rounds.append(count)
        left = left - count
    return [*rounds, left]


def feed(cache, case, dtype, rounds, topk, way="auto", after_round=None):
    """Append and attend round by round; return out, lse and selected of all tokens.

    selected counts the blocks of every sequence from 0.
    """
    q, k, v = tensors(case, dtype)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=gate_dtype(q))
    selected = torch.zeros(*q.shape[:2], topk or 0, dtype=torch.int32)
    start = np.zeros(len(case.cu_seqlens) - 1, dtype=int)
    for count in rounds:
        rows, cu = rows_of(case, start, count), np.cumsum([0, *count]).tolist()
        cache.append(k[rows], v[rows], cu)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(last_tokens, "copying_reads_less", WAYS[way])
            patch.setattr(pages, "ELEMENTS_PER_COPY", 64)
            result = cache.attend(q[rows], topk=topk, cu_seqlens=cu, return_aux=True)
        out[rows], lse[rows] = result[:2]
        if topk:
            selected[rows] = local(result[2], cache.blocks(cu))
        start = start + count
        if after_round:
            after_round(cache, start)
    return out, lse, selected


def local(selected, blocks):
    """Count blocks from the start of their sequence."""
    first = blocks.first_of_query[:, None, None]
    return torch.where(selected < 0, -1, selected - first).int()


def one_shot(case, dtype):
    """Return the blocks that one-shot prefill selects, ids of the pack."""
    return moba_fast.moba_attention(
        *tensors(case, dtype), **case.options, return_aux=True
    )[2]


def assert_agrees(case, dtype, selected, out, lse):
    """Compare with the reference and plain attention over given blocks of the pack."""
    q, k, v = tensors(case, dtype)
    exact = [x.double().numpy() for x in (q, k, v)]
    options = {**case.options, "topk": selected.shape[2]}
    ref_out, ref_lse, _ = moba_ref.moba_attention(
        *exact, **options, selected=selected.numpy(), return_aux=True
    )
    blocks = case.partition(FAST)
    plain_out, plain_lse = plain_attention(q, k, v, selected, blocks)
    assert out.dtype == dtype
    agree(out, ref_out, "out", plain=plain_out)
    agree(lse, ref_lse, "lse", plain=plain_lse)


@given(
    st.data(), cases(decoding=False), st.sampled_from(DTYPES), st.sampled_from([*WAYS])
)
@settings(max_examples=150)
def test_every_cut_gives_one_shot_prefill(data, case, dtype, way):
    rounds = data.draw(cuts(case))
    cache = new_cache(case, dtype)
    out, lse, selected = feed(cache, case, dtype, rounds, case.topk, way)
    expected = one_shot(case, dtype)
    assert selected.tolist() == local(expected, case.partition(FAST)).tolist()
    assert_agrees(case, dtype, expected, out, lse)


@given(st.data(), cases(decoding=False), st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_every_cut_gives_the_means_of_one_shot_prefill(data, case, dtype):
    means = pool_keys(tensors(case, dtype)[1], case.partition(FAST))
    cu_blocks = case.partition(FAST).cu_blocks.tolist()

    def compare(cache, lengths):
        for b, n in enumerate((lengths // case.block_size).tolist()):
            found = cache.pool.k_mean[cache.table.host[b, :n]]
            assert found.dtype == gate_dtype(cache.pool.k)
            assert torch.equal(found, means[cu_blocks[b] : cu_blocks[b] + n])

    rounds = data.draw(cuts(case))
    feed(new_cache(case, dtype), case, dtype, rounds, 1, after_round=compare)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
def test_means_of_long_blocks_do_not_depend_on_the_cut(dtype, chunk):
    case = make_case([1000], block_size=100, topk=2, HK=2, D=16)
    _, k, v = tensors(case, dtype)
    cache = new_cache(case, dtype)
    for keys, values in zip(k.split(chunk), v.split(chunk), strict=True):
        cache.append(keys, values)
    expected = pool_keys(k, case.partition(FAST))
    assert torch.equal(cache.pool.k_mean[cache.table.host[0, :10]], expected)


@given(
    st.data(), cases(decoding=False), st.sampled_from(DTYPES), st.sampled_from([*WAYS])
)
@settings(max_examples=60)
def test_every_cut_of_full_attention(data, case, dtype, way):
    rounds = data.draw(cuts(case))
    out, lse, _ = feed(new_cache(case, dtype), case, dtype, rounds, None, way)
    everything = one_shot(case.replace(topk=len(case.k) + 1), dtype)
    assert_agrees(case, dtype, everything, out, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_sparse_decode_full(dtype):
    case = make_case([45, 37], block_size=8, topk=3, H=4, HK=2, D=8)
    cache, steps = new_cache(case, dtype), 5
    q, k, v = tensors(case, dtype)
    prompt = np.array([40, 32])
    rows = rows_of(case, [0, 0], prompt)
    cache.append(k[rows], v[rows], [0, 40, 72])
    cache.attend(q[rows], topk=3, cu_seqlens=[0, 40, 72])
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=gate_dtype(q))
    for i in range(steps):
        rows = rows_of(case, prompt + i, [1, 1])
        cache.append(k[rows], v[rows])
        out[rows], lse[rows], nothing = cache.attend(
            q[rows], topk=None, return_aux=True
        )
        assert nothing is None
    everything = one_shot(case.replace(topk=7), dtype)
    rows = rows_of(case, prompt, [steps, steps])
    tail = case.replace(q=case.q[rows], cu_seqlens=[0, 5, 10])
    assert_agrees(tail, dtype, everything[rows], out[rows], lse[rows])


def test_equal_keys_select_the_lower_block():
    case = make_case([24, 9], block_size=4, topk=3, H=4, HK=2, D=5)
    case = case.replace(k=np.ones_like(case.k))
    for way in WAYS:
        rounds = [[10, 9], [1, 0], [1, 0], [12, 0]]
        cache = new_cache(case, torch.float32)
        selected = feed(cache, case, torch.float32, np.array(rounds), 3, way)[2]
        assert selected[23].tolist() == [[0, 1, 5]] * 4
        assert selected[7].tolist() == [[0, -1, 1]] * 4
        assert selected[32].tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize("topk", [2, None])
@pytest.mark.parametrize("way", WAYS)
def test_softmax_scale_is_used(scale, topk, way, monkeypatch):
    monkeypatch.setattr(last_tokens, "copying_reads_less", WAYS[way])
    case = make_case([14], block_size=4, topk=topk or 9, H=4, HK=2)
    q, k, v = tensors(case, torch.float64)
    cache = new_cache(case, torch.float64)
    cache.append(k, v)
    out = cache.attend(q, topk=topk, softmax_scale=scale)
    expected = moba_fast.moba_attention(q, k, v, **case.options, softmax_scale=scale)
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_selected_replaces_the_gate(way, monkeypatch):
    monkeypatch.setattr(last_tokens, "copying_reads_less", WAYS[way])
    case = make_case([22, 1, 13], block_size=4, topk=3, H=4, HK=2)
    q, k, v = tensors(case, torch.float64)
    cache = new_cache(case, torch.float64)
    cache.append(k, v, case.cu_seqlens)
    blocks = case.partition(FAST)
    first, current = blocks.first_of_query, blocks.of_query
    oldest = torch.where(first < current, first, -1)
    selected = torch.stack([oldest, torch.full_like(first, -1), current], -1)
    selected = selected[:, None].repeat(1, 4, 1).int()
    got = cache.attend(
        q, topk=3, cu_seqlens=case.cu_seqlens, selected=selected, return_aux=True
    )
    expected = moba_fast.moba_attention(
        q, k, v, **case.options, selected=selected, return_aux=True
    )
    assert torch.equal(got[2], selected)
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert (a - b).abs().max() < 1e-12


def test_a_chunk_for_one_sequence_and_a_token_for_the_others():
    case = make_case([64, 33, 50, 7], block_size=4, topk=3, H=4, HK=2)
    rounds = np.array([[3, 32, 49, 0], [61, 1, 1, 7]])
    ways = set()
    for way in WAYS:
        cache = new_cache(case, torch.float64)
        out, lse, selected = feed(cache, case, torch.float64, rounds, 3, way)
        expected = one_shot(case, torch.float64)
        assert selected.tolist() == local(expected, case.partition(FAST)).tolist()
        assert_agrees(case, torch.float64, expected, out, lse)
        count = torch.tensor(rounds[1])
        ways.add(tuple(WAYS[way](cache, count, 4, 3).tolist()))
    assert (True, False, False, True) in ways
    assert len(ways) == 3


class Model:
    """What a cache should hold: keys and values of every sequence, in plain lists."""

    def __init__(self, sequences, kv_heads, head_dim, seed):
        self.empty = torch.zeros(0, kv_heads, head_dim, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.k, self.v = [self.empty] * sequences, [self.empty] * sequences

    def draw(self, n, heads):
        shape = (n, heads, self.empty.shape[2])
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def append(self, count):
        new = [[self.draw(n, self.empty.shape[1]) for n in count] for _ in range(2)]
        self.k = [torch.cat(pair) for pair in zip(self.k, new[0], strict=True)]
        self.v = [torch.cat(pair) for pair in zip(self.v, new[1], strict=True)]
        return torch.cat(new[0]), torch.cat(new[1])

    def reorder(self, index):
        self.k, self.v = [self.k[i] for i in index], [self.v[i] for i in index]

    def crop(self, lengths):
        self.k = [x[:n] for x, n in zip(self.k, lengths, strict=True)]
        self.v = [x[:n] for x, n in zip(self.v, lengths, strict=True)]

    @property
    def lengths(self):
        return [len(x) for x in self.k]


def change(data, cache, model):
    """Do one thing to a cache and to its model."""
    n = len(model.k)
    action = data.draw(
        st.sampled_from(["append", "append", "crop", "reorder", "batch"])
    )
    if action == "append":
        count = [data.draw(st.integers(0, 9)) for _ in range(n)]
        cache.append(*model.append(count), np.cumsum([0, *count]))
    elif action == "crop":
        lengths = [data.draw(st.integers(0, m)) for m in model.lengths]
        cache.crop(lengths)
        model.crop(lengths)
    elif action == "reorder":
        index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
        cache.reorder(index)
        model.reorder(index)
    else:
        gone = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=n)))
        cache.release(gone)
        cache.add_sequences(2)
        model.reorder([i for i in range(n) if i not in gone])
        model.k, model.v = model.k + [model.empty] * 2, model.v + [model.empty] * 2


def assert_holds(cache, model):
    """Compare tokens, means and the books of the pages with the model."""
    k, v, cu = cache.gather()
    assert torch.equal(k, torch.cat(model.k))
    assert torch.equal(v, torch.cat(model.v))
    assert cu.diff().tolist() == cache.lengths.tolist() == model.lengths
    pool, table, size = cache.pool, cache.table.host, cache.block_size
    for b, keys in enumerate(model.k):
        whole = keys[: len(keys) // size * size]
        blocks = moba_fast.partition([0, len(whole)], size)
        means = pool.k_mean[table[b, : len(blocks.start)]]
        assert torch.equal(means, pool_keys(whole, blocks))
    held = table[table >= 0]
    assert cache.table.count.tolist() == [-(-n // size) for n in model.lengths]
    assert torch.bincount(held, minlength=len(pool.k)).tolist() == pool.users.tolist()
    assert sorted(pool.free) == (pool.users == 0).nonzero()[:, 0].tolist()


def assert_attends(data, cache, model, way):
    """Compare the attention of some last tokens with moba_attention over the model."""
    count = [data.draw(st.integers(0, min(n, 6))) for n in model.lengths]
    cu_q, cu_k = (np.cumsum([0, *x]).tolist() for x in (count, model.lengths))
    q = model.draw(cu_q[-1], 2 * model.empty.shape[1])
    where = {"topk": data.draw(st.integers(1, 4)), "cu_seqlens": cu_q}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_tokens, "copying_reads_less", WAYS[way])
        got = cache.attend(q, **where, return_aux=True)
    where.update(block_size=cache.block_size, cu_seqlens_k=cu_k, return_aux=True)
    k, v = torch.cat(model.k), torch.cat(model.v)
    expected = moba_fast.moba_attention(q, k, v, **where)
    assert got[2].tolist() == expected[2].tolist()
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert (a - b).abs().max() < 1e-12 if len(q) else len(a) == 0


@given(st.data(), st.integers(1, 5), st.booleans(), st.sampled_from([*WAYS]))
@settings(max_examples=120)
def test_whatever_was_done_before_the_cache_is_as_new(data, size, fixed, way):
    model = Model(data.draw(st.integers(1, 3)), kv_heads=2, head_dim=3, seed=size)
    cache = PagedKVCache(
        size,
        kv_heads=2,
        head_dim=3,
        sequences=len(model.k),
        dtype=torch.float64,
        pages=400 if fixed else None,
    )
    for _ in range(data.draw(st.integers(1, 8))):
        change(data, cache, model)
        assert_holds(cache, model)
        assert_attends(data, cache, model, way)


def test_crop_and_append_again_equals_never_having_appended():
    case = make_case([23, 18], block_size=4, topk=3, H=4, HK=2)
    q, k, v = tensors(case, torch.float64)
    cache, straight = new_cache(case, torch.float64), new_cache(case, torch.float64)
    straight.append(k, v, case.cu_seqlens)
    rows = rows_of(case, [0, 0], [22, 15])
    cache.append(k[rows], v[rows], [0, 22, 37])
    # Block 3 of the first sequence and block 2 of the second are open again.
    cache.crop([13, 11])
    wrong = 9 * torch.ones(8, 2, 4, dtype=torch.float64)
    cache.append(wrong, wrong, [0, 5, 8])
    cache.crop([13, 11])
    rows = rows_of(case, [13, 11], [10, 7])
    cache.append(k[rows], v[rows], [0, 10, 17])
    for a, b in zip(cache.gather(), straight.gather(), strict=True):
        assert torch.equal(a, b)
    last = rows_of(case, [22, 17], [1, 1])
    for a, b in zip(
        cache.attend(q[last], topk=3, return_aux=True),
        straight.attend(q[last], topk=3, return_aux=True),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_crop_takes_one_length_for_all():
    case = make_case([9, 12], block_size=4, topk=2)
    _, k, v = tensors(case, torch.float64)
    cache = new_cache(case, torch.float64)
    cache.append(k, v, case.cu_seqlens)
    cache.crop(5)
    assert cache.lengths.tolist() == [5, 5]
    assert (cache.pool.users > 0).sum() == 4


def test_beams_share_whole_pages_and_copy_the_last_one():
    cache = PagedKVCache(4, 1, 1, sequences=2)
    x = torch.arange(20.0)[:, None, None]
    cache.append(x, x)
    cache.reorder([1, 1, 1])
    assert cache.table.host[:, :3].tolist() == [[3, 4, 5]] * 3
    y = torch.arange(100.0, 103.0)[:, None, None]
    cache.append(y, y)
    # All three write: one keeps the page, two get a copy.
    assert cache.table.host[:, :3].tolist() == [[3, 4, 5], [3, 4, 0], [3, 4, 1]]
    cache.reorder([0, 0, 2])
    cache.crop([10, 11, 10])
    # Sequence 1 does not write: sequence 0 must not change what it holds.
    cache.append(x[:1], x[:1], [0, 1, 1, 1])
    k, _, cu = cache.gather()
    beams = [x.ravel().tolist() for x in k.split(cu.diff().tolist())]
    prompt = list(range(10, 20))
    assert beams == [[*prompt, 0], [*prompt, 100], prompt]
    cache.reorder([2, 0])
    assert cache.lengths.tolist() == [10, 11]
    assert cache.gather()[0].ravel().tolist() == [*prompt, *prompt, 0]


def test_a_page_is_free_when_its_last_user_is_gone():
    cache = PagedKVCache(4, 1, 1, pages=3)
    x = torch.arange(6.0)[:, None, None]
    cache.append(x, x)
    cache.reorder([0, 0, 0])
    cache.release([1])
    cache.reorder([1])
    assert cache.pool.free == [2]
    cache.crop(4)
    assert cache.pool.free == [2, 1]
    assert cache.gather()[0].ravel().tolist() == [0, 1, 2, 3]
    cache.release([0])
    assert cache.pool.free == [2, 1, 0]


def test_a_full_pool_that_every_beam_needs_is_enough():
    cache = PagedKVCache(4, 1, 1, pages=3)
    x = torch.arange(6.0)[:, None, None]
    cache.append(x, x)
    cache.reorder([0, 0])
    # The two beams need a page for block 0 and one each for block 1.
    cache.append(x[:2], x[:2])
    assert cache.pool.free == []
    k = cache.gather()[0].ravel().tolist()
    assert k == [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5, 1]


def test_a_pool_doubles_when_it_is_full():
    cache, sizes = PagedKVCache(1, 1, 1), []
    for i in range(100):
        x = torch.full((1, 1, 1), float(i))
        cache.append(x, x)
        sizes.append(len(cache.pool.k))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert cache.gather()[0].ravel().tolist() == list(range(100))


def test_a_full_pool_says_so_and_loses_nothing():
    cache = PagedKVCache(4, 1, 1, sequences=2, pages=4)
    x = torch.arange(10.0)[:, None, None]
    cache.append(x, x)
    before = cache.gather()
    with pytest.raises(
        moba_fast.OutOfPagesError, match="expected 2 free pages, got 0 of 4"
    ):
        cache.append(x[:8], x[:8])
    for a, b in zip(cache.gather(), before, strict=True):
        assert torch.equal(a, b)
    cache.append(x[:3], x[:3], [0, 3, 3])
    assert cache.lengths.tolist() == [8, 5]
    cache.release([1])
    cache.append(x[:4], x[:4])
    assert cache.lengths.tolist() == [12]


def foreign(case, lengths, spare, seed=0):
    """Lay a pack out in scrambled pages of one tensor for keys and values, else NaN."""
    rng = np.random.default_rng(seed)
    size, (_, HK, D) = case.block_size, case.k.shape
    needed = -(-np.diff(case.cu_seqlens) // size)
    total = int(needed.sum()) + spare
    memory = torch.full((total, 2, size, HK, D), torch.nan, dtype=torch.float64)
    order = iter(rng.permutation(total).tolist())
    table = torch.full((len(needed), int(needed.max())), -1, dtype=torch.int32)
    for b, n in enumerate(needed):
        table[b, :n] = torch.tensor([next(order) for _ in range(n)])
        for i in range(lengths[b]):
            page, token = table[b, i // size], case.cu_seqlens[b] + i
            memory[page, 0, i % size] = torch.tensor(case.k[token])
            memory[page, 1, i % size] = torch.tensor(case.v[token])
    return memory, table, list(order)


@given(st.data(), cases(decoding=False), st.sampled_from([*WAYS]))
@settings(max_examples=60)
def test_foreign_pages_in_any_order_give_the_same(data, case, way):
    rounds = data.draw(cuts(case))
    memory, table, _ = foreign(case, rounds[0], spare=3, seed=len(case.k))
    k_pages, v_pages = memory[:, 0], memory[:, 1]
    cache = PagedKVCache.from_pages(k_pages, v_pages, table, rounds[0])
    assert cache.pool.k.data_ptr() == k_pages.data_ptr()
    assert cache.pool.v is v_pages
    own = new_cache(case, torch.float64)
    q, k, v = tensors(case, torch.float64)
    rows, cu = rows_of(case, 0 * rounds[0], rounds[0]), np.cumsum([0, *rounds[0]])
    own.append(k[rows], v[rows], cu)
    results = []
    for each in (cache, own):
        start, parts = rounds[0], []
        for count in rounds[1:]:
            rows, cu = rows_of(case, start, count), np.cumsum([0, *count])
            each.append(k[rows], v[rows], cu)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(last_tokens, "copying_reads_less", WAYS[way])
                where = {"cu_seqlens": cu, "return_aux": True}
                parts += each.attend(q[rows], topk=case.topk, **where)
                parts += each.attend(q[rows], topk=None, **where)[:2]
            start = start + count
        results.append(parts)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    assert torch.equal(cache.gather()[0], k)


def test_only_the_pages_of_the_table_are_written():
    case = make_case([10, 7], block_size=4, topk=2)
    memory, table, spare = foreign(case, [9, 4], spare=3)
    before = memory.clone()
    cache = PagedKVCache.from_pages(
        memory[:, 0], memory[:, 1], table, [9, 4], free_pages=spare[:1]
    )
    _, k, v = tensors(case, torch.float64)
    rows = torch.tensor([9, 14, 15, 16])
    cache.append(k[rows], v[rows], [0, 1, 4])
    expected, _, _ = foreign(case, [10, 7], spare=3)
    assert memory.isnan().sum() < before.isnan().sum()
    assert torch.equal(memory.isnan(), expected.isnan())
    assert torch.equal(memory.nan_to_num(), expected.nan_to_num())


def test_free_pages_are_taken_when_a_row_has_none_left():
    case = make_case([8, 3], block_size=4, topk=2)
    memory, table, spare = foreign(case, [8, 3], spare=2)
    cache = PagedKVCache.from_pages(
        memory[:, 0], memory[:, 1], table, [8, 3], free_pages=spare
    )
    x = torch.ones(2, 1, 4, dtype=torch.float64)
    cache.append(x, x)
    assert cache.table.host[0, 2] == spare[0]
    cache.append(x, x)
    assert cache.table.host[1, 1] == spare[1]
    cache.crop(0)
    assert sorted(cache.pool.free) == list(range(5))


def test_means_can_be_handed_over_too():
    case = make_case([10, 7], block_size=4, topk=2)
    memory, table, _ = foreign(case, [10, 7], spare=0)
    parts = memory[:, 0], memory[:, 1], table, [10, 7]
    k_mean = PagedKVCache.from_pages(*parts).pool.k_mean
    # With keys that nobody may read again, the means must be the ones handed over.
    kept = k_mean.clone()
    memory[table[0, 0], 0] += 1
    cache = PagedKVCache.from_pages(*parts, k_mean=k_mean)
    assert cache.pool.k_mean is k_mean
    assert torch.equal(k_mean[table[0, :2]], kept[table[0, :2]])


def test_rows_may_share_a_prompt():
    case = make_case([11, 11], block_size=4, topk=2)
    memory, table, spare = foreign(case, [11, 0], spare=3)
    table[1] = table[0]
    cache = PagedKVCache.from_pages(
        memory[:, 0], memory[:, 1], table, [11, 9], free_pages=spare
    )
    x = torch.ones(1, 1, 4, dtype=torch.float64)
    cache.append(x, x, [0, 0, 1])
    k, _, _ = cache.gather()
    prompt = torch.tensor(case.k[:11])
    assert torch.equal(k, torch.cat([prompt, prompt[:9], x]))
    assert cache.table.host[:, :2].tolist() == [table[0, :2].tolist()] * 2


@pytest.mark.parametrize("inside", ["make", "use", "engine"])
def test_inference_mode_may_begin_and_end_at_any_time(inside):
    x = torch.ones(9, 1, 2)
    with torch.inference_mode(inside == "make"):
        cache = PagedKVCache(4, 1, 2)
        cache.append(x, x)
    if inside == "engine":
        with torch.inference_mode():
            k, v = torch.zeros(2, 12, 4, 1, 2)
            free = list(range(3, 12))
            cache = PagedKVCache.from_pages(k, v, [[2, 0, 1]], [0], free_pages=free)
            cache.append(x, x)
    with torch.inference_mode(inside != "make"):
        y = torch.ones(9, 1, 2)
        cache.append(y, y)
        cache.reorder([0, 0])
    with torch.inference_mode(inside == "engine"):
        cache.append(x[:4], x[:4])
        cache.crop([3, 20])
        cache.add_sequences()
        cache.append(x, x)
        out = cache.attend(x[:3], topk=3)
    assert cache.lengths.tolist() == [6, 23, 3]
    assert (out - 1).abs().max() < 1e-6


def test_pages_for_later_tokens_are_not_shared_with_a_copy():
    case = make_case([7], block_size=4, topk=2)
    memory, table, spare = foreign(case, [4], spare=2)
    cache = PagedKVCache.from_pages(
        memory[:, 0], memory[:, 1], table, [4], free_pages=spare
    )
    cache.reorder([0, 0])
    assert cache.table.host[:, 1].tolist() == [-1, -1]
    assert cache.pool.free == [*spare[::-1], table[0, 1].item()]
    x = torch.arange(2.0, dtype=torch.float64)[:, None, None].expand(2, 1, 4)
    cache.append(x, x)
    k, _, _ = cache.gather()
    assert k[[4, 9], 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("topk", [3, None])
def test_nan_stays_where_it_can_be_read(way, topk, monkeypatch):
    monkeypatch.setattr(last_tokens, "copying_reads_less", WAYS[way])
    case = make_case([2, 14], block_size=4, topk=3, H=4, HK=2)
    q, k, v = tensors(case, torch.float64)
    memory, table, _ = foreign(case, [2, 14], spare=1)
    # Behind the tokens of the first sequence there is NaN, and a value of its
    # neighbour's first block is NaN, which the last query does not choose.
    k_pages, v_pages = memory[:, 0], memory[:, 1]
    v_pages[table[1, 0]] = torch.nan
    cache = PagedKVCache.from_pages(k_pages, v_pages, table, [2, 14])
    last, selected = torch.tensor([1, 15]), torch.tensor([[-1, -1, 0], [2, -1, 4]])
    selected = selected[:, None].repeat(1, 4, 1).int() if topk else None
    out = cache.attend(q[last], topk=topk, selected=selected)
    v[2:6] = torch.nan
    expected = moba_fast.moba_attention(
        q[last],
        *(k, v),
        block_size=4,
        topk=topk or 9,
        cu_seqlens=[0, 1, 2],
        cu_seqlens_k=[0, 2, 16],
        selected=selected,
    )
    assert out.isfinite().all(dim=-1)[:, 0].tolist() == [True, topk is not None]
    assert (out - expected).abs().nan_to_num().max() < 1e-12
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("way", WAYS)
def test_the_gate_sees_no_mean_that_was_not_written(way, monkeypatch):
    monkeypatch.setattr(last_tokens, "copying_reads_less", WAYS[way])
    case = make_case([6, 14], block_size=4, topk=3)
    last = torch.tensor([5, 19])
    expected = one_shot(case, torch.float64)[last]
    norms = []

    def spy(scores, count, q_norm, k_norm):
        norms.append(k_norm)
        return top_blocks(scores, count, q_norm, k_norm)

    for module in (decode, gate):
        monkeypatch.setattr(module, "top_blocks", spy)
    memory, table, spare = foreign(case, [6, 14], spare=1, seed=3)
    cache = PagedKVCache.from_pages(memory[:, 0], memory[:, 1], table, [6, 14])
    # Whatever was in the memory of a mean before its block completes.
    unwritten = torch.tensor([table[0, 1], table[1, 3], *spare])
    assert 0 in unwritten
    cache.pool.k_mean[unwritten] = torch.inf
    q = torch.tensor(case.q)[last]
    selected = cache.attend(q, topk=3, return_aux=True)[2]
    assert selected.tolist() == expected.tolist()
    assert torch.cat(norms).isfinite().all()
