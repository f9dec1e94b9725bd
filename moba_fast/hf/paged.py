"""Keep a model's keys and values in pages of one block, for generate."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from moba_fast.cache import PagedKVCache
from moba_fast.hf.masks import REAL
from moba_fast.hf.settings import settings_of


def pages_of(key):
    """Return the `PagedLayer` that keys come from, or None."""
    return getattr(key, "moba_pages", None)


class MobaCache(Cache):
    """Hold the pages of every layer: `past_key_values` for models that run MoBA.

    A step of decode="moba" reads one mean per block and topk pages instead of all keys;
    padding is not kept. Layers with a sliding window have the library's own cache. It
    keeps no gradients.

    Args:
        config: configuration of the model.

    Example: `model.generate(ids, past_key_values=MobaCache(model.config))`
    """

    def __init__(self, config):
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
        if not layers:
            raise ValueError(f"expected a model with layers, got {type(config)}")
        block_size = settings_of(text)["block_size"]
        super().__init__(
            layers=[
                x if getattr(x, "is_sliding", False) else PagedLayer(block_size)
                for x in layers
            ]
        )


class PagedLayer(CacheLayerMixin):
    """Hold the pages of one layer, and which slots of its rows have a real token.

    `update` is called before anybody knows what is padding, so new keys wait until the
    attention function comes with the mask.

    Attributes:
        pages: PagedKVCache, a sequence for every row, made with the first keys.
        real: (B, S) bool on the host, False for padding.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, block_size):
        super().__init__()
        self.block_size = block_size
        self.reset()

    def reset(self):
        """Forget everything."""
        self.keys = self.values = self.pages = self.waiting = None
        self.real = torch.zeros(0, 0, dtype=torch.bool)
        self.is_initialized = False

    def lazy_initialization(self, key_states, value_states=None):
        """Make room for as many rows as the first keys have."""
        rows, heads, _, size = key_states.shape
        if value_states is not None and value_states.shape != key_states.shape:
            raise ValueError("MobaCache needs keys and values of one head dimension")
        self.pages = PagedKVCache(
            self.block_size,
            heads,
            size,
            sequences=rows,
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.real = torch.zeros(rows, 0, dtype=torch.bool)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Take new keys and values, (B, HK, Sq, D); return them, with a way to here.

        Raises:
            RuntimeError: if those of the call before were never attended to, because
                the model runs another attention than "moba".
        """
        if self.waiting is not None:
            raise RuntimeError(
                'MobaCache works with attention "moba" only; call moba_fast.hf.enable, '
                "or use another cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.waiting = key_states, value_states
        keys = key_states.view_as(key_states)
        keys.moba_pages = self
        return keys, value_states

    def check_block_size(self, block_size):
        """Raise ValueError unless the pages are blocks of the model's settings."""
        if block_size != self.block_size:
            raise ValueError(
                f"this MobaCache has blocks of {self.block_size} tokens, but the "
                f"model's settings say {block_size} now; make a new cache"
            )

    def append(self, roles):
        """Put the waiting keys into the pages, but for padding.

        Args:
            roles: what `moba_mask` returned.
        """
        if self.waiting is None:
            return
        (key, value), self.waiting = self.waiting, None
        real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
        if roles is not None:
            real = (roles[:, 0, 0, -key.shape[2] :] & REAL).bool().cpu()
        self.real = torch.cat([self.real, real], dim=1)
        self.pages.append(*(pack(x, real) for x in (key, value)), offsets(real))

    def attend(self, query, topk, softmax_scale, with_blocks):
        """Attend from the last tokens of every row.

        Args:
            query: (B, H, Sq, D).
            topk: blocks per query; None: all.
            softmax_scale: factor on the scores.
            with_blocks: whether to return the selected blocks.

        Returns:
            out: (B, Sq, H, D); zero for padding.
            lse: (B, Sq, H); zero for padding.
            selected: (B, H, Sq, topk) int32, or None.
        """
        real = self.real[:, -query.shape[2] :]
        cu = offsets(real)
        out, lse, selected = self.pages.attend(
            pack(query, real),
            topk=topk,
            cu_seqlens=cu,
            softmax_scale=softmax_scale,
            return_aux=True,
        )
        if with_blocks and selected is not None:
            first = self.pages.blocks(cu).first_of_query[:, None, None]
            selected = torch.where(selected < 0, -1, selected - first).int()
            selected = unpack(selected, real, -1).transpose(1, 2)
        return unpack(out, real, 0), unpack(lse, real, 0), selected

    def get_seq_length(self, *args):
        """Return the slots of a row, padding and waiting keys included."""
        return self.real.shape[1]

    def get_mask_sizes(self, query_length):
        """Return how many slots the mask must cover, and the first one."""
        if isinstance(query_length, torch.Tensor):
            # Older versions of the library give the positions of the queries.
            query_length = len(query_length)
        return self.get_seq_length() + query_length, 0

    def get_max_length(self):
        """Return -1: there is no longest length."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens):
        """Forget the last -tokens slots, or those from a number of slots on."""
        kept = tokens if tokens > 0 else self.real.shape[1] + tokens
        if self.is_initialized and kept < self.real.shape[1]:
            self.real = self.real[:, :kept]
            self.pages.crop(self.real.sum(1))

    def reorder_cache(self, beam_idx):
        """Continue some rows, in any order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        """Continue every row several times."""
        self.batch_select_indices(
            torch.arange(len(self.real)).repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices):
        """Keep some rows."""
        if self.is_initialized:
            indices = torch.as_tensor(indices).cpu()
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.pages.reorder(indices)
            self.real = self.real[indices]


def offsets(real):
    """Return the offsets of the rows' real tokens, (B+1,)."""
    return torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0))


def pack(x, real):
    """Take the real tokens of x (B, H, Sq, D): (S, H, D)."""
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if real.all() else x[real.to(x.device)]


def unpack(x, real, fill):
    """Put results (S, ...) to their rows, (B, Sq, ...), and fill padding."""
    if real.all():
        return x.unflatten(0, real.shape)
    whole = x.new_full((*real.shape, *x.shape[1:]), fill)
    whole[real.to(x.device)] = x
    return whole
