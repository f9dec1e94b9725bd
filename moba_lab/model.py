"""A small byte-level language model whose layers attend by MoBA or in full."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

import moba_fast
from moba_fast.blocks import partition
from moba_fast.gate import gate_scores, pool_keys

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib.safetensors"
KINDS = ("moba", "full")


@dataclass(frozen=True)
class Config:
    """Shape of a model.

    attention: for every layer "moba" or "full"; its length is the number of layers.
    context: bytes per sequence in training; other lengths work, only less well.
    block_size, topk: of MoBA, in bytes and in blocks; unused by full layers.
    key_conv: width of a causal convolution over the keys, meant to bring the keys of
        one word closer to each other (FlashMoBA, arXiv 2511.11571); 1 is none.
    rope_dims, rope_base: how many dimensions of a head carry the position, and the base
        of their wave lengths. The other dimensions compare content alone.
    """

    vocab_size: int = 256
    width: int = 128
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    hidden: int = 384
    context: int = 1024
    block_size: int = 32
    topk: int = 4
    attention: tuple[str, ...] = ("moba",) * 4
    key_conv: int = 3
    rope_dims: int = 64
    rope_base: float = 10_000.0

    def __post_init__(self):
        object.__setattr__(self, "attention", tuple(self.attention))
        for kind in self.attention:
            _check_kind(kind)


@dataclass(frozen=True)
class Pack:
    """Where every token of a pack stands; all layers share it.

    cu_seqlens: (B+1,) int32 offsets of the sequences, best on the CPU.
    position: (S,) place of every token in its sequence, from 0.
    rope: (cos, sin) of these positions.
    batch: number of sequences where all have the same length, else None.
    decoded: (S,) bool, tokens that attend in full in every layer; None where none do.
    """

    cu_seqlens: torch.Tensor
    position: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    batch: int | None
    decoded: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerAux:
    """What one layer read, for looking; see `Model.forward(..., return_aux=True)`.

    kind: "moba" or "full".
    q: (S, H, D); k, v: (S, HK, D), as attended, after rotary embedding.
    cu_seqlens: (B+1,) int32.
    blocks: partition of the keys, `moba_fast.blocks.Blocks`.
    scores: (S, H, N), the gate's; in a full layer what a gate would have said.
    selected: (S, H, topk) int32 block ids, -1 for none; None in a full layer.
    """

    kind: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor
    blocks: object
    scores: torch.Tensor
    selected: torch.Tensor | None

    def weights(self, query):
        """Compute the attention that one query gave to every key.

        Args:
            query: index of the query token, 0 to S-1.

        Returns:
            (H, S); each row sums to 1 and is 0 for keys that were not read.
        """
        heads, ratio = self.q.shape[1], self.q.shape[1] // self.k.shape[1]
        keys = self.k.repeat_interleave(ratio, dim=1)
        logits = (
            torch.einsum("hd,shd->hs", self.q[query], keys) * self.q.shape[-1] ** -0.5
        )
        token = torch.arange(len(self.k), device=self.k.device)
        first = self.cu_seqlens[self.cu_seqlens <= query][-1]
        read = ((token >= first) & (token <= query)).expand(heads, -1)
        if self.selected is not None:
            of_token = torch.as_tensor(self.blocks.of_token)
            chosen = self.selected[query][:, None, :] == of_token[None, :, None]
            read = read & chosen.any(-1)
        return logits.masked_fill(~read, -torch.inf).softmax(-1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, by MoBA or in full."""

    def __init__(self, config, kind):
        super().__init__()
        self.config, self.kind = config, kind
        inner = config.heads * config.head_dim
        inner_kv = config.kv_heads * config.head_dim
        self.to_q = nn.Linear(config.width, inner, bias=False)
        self.to_k = nn.Linear(config.width, inner_kv, bias=False)
        self.to_v = nn.Linear(config.width, inner_kv, bias=False)
        self.to_out = nn.Linear(inner, config.width, bias=False)
        self.key_conv = nn.Parameter(torch.zeros(config.key_conv - 1, inner_kv))
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)

    def forward(self, x, pack, return_aux=False):
        """Map (S, width) to (S, width), with `return_aux` to `(result, aux)`."""
        split = (-1, self.config.head_dim)
        keys = add_previous(self.to_k(x), self.key_conv, pack.position)
        v = self.to_v(x).unflatten(-1, split)
        # Under autocast norms and rotation stay in float32, attention does not.
        q, k = self.to_q(x).float(), keys.float()
        q = _rotate(self.q_norm(q.unflatten(-1, split)), pack.rope).to(v.dtype)
        k = _rotate(self.k_norm(k.unflatten(-1, split)), pack.rope).to(v.dtype)
        selected = None
        if self.kind == "full":
            out = full_attention(q, k, v, pack.cu_seqlens, pack.batch)
        else:
            out, _, selected = moba_fast.moba_attention(
                q,
                k,
                v,
                block_size=self.config.block_size,
                topk=self.config.topk,
                cu_seqlens=pack.cu_seqlens,
                return_aux=True,
            )
            if pack.decoded is not None:
                last = decode_in_full(q, k, v, pack.cu_seqlens, pack.decoded)
                out = out.masked_scatter(pack.decoded[:, None, None], last)
        out = self.to_out(out.flatten(1))
        if not return_aux:
            return out
        return out, self._aux(q, k, v, pack.cu_seqlens, selected)

    def _aux(self, q, k, v, cu_seqlens, selected):
        blocks = partition(cu_seqlens, self.config.block_size)
        scores = gate_scores(q, pool_keys(k, blocks), blocks)
        return LayerAux(self.kind, q, k, v, cu_seqlens, blocks, scores, selected)


class SwiGLU(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x):
        """Map (S, width) to (S, width)."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention, then feed-forward, each on normalised input and added to it."""

    def __init__(self, config, kind):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config, kind)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = SwiGLU(config)

    def forward(self, x, pack, return_aux=False):
        """Map (S, width) to (S, width), with `return_aux` to `(result, aux)`."""
        attended = self.attention(self.attention_norm(x), pack, return_aux)
        attended, aux = attended if return_aux else (attended, None)
        x = x + attended
        x = x + self.mlp(self.mlp_norm(x))
        return (x, aux) if return_aux else x


class Model(nn.Module):
    """Decoder-only transformer over bytes: RMSNorm, rotary positions, tied embedding.

    Several texts travel as one pack: a flat row of tokens and the offsets `cu_seqlens`.

    >>> model = Model(Config(width=16, hidden=16, heads=2, kv_heads=1, head_dim=8))
    >>> tokens = torch.arange(100)
    >>> model(tokens).shape
    torch.Size([100, 256])
    >>> logits, aux = model(tokens, return_aux=True)
    >>> aux[0].selected[99].tolist()  # three earlier blocks of 32 bytes, then its own
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.attention)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.apply(_initialise)
        for layer in self.layers:
            for linear in (layer.attention.to_out, layer.mlp.down):
                linear.weight.data *= (2 * len(self.layers)) ** -0.5

    @property
    def attention(self):
        """The kind of every layer's attention, "moba" or "full"."""
        return tuple(layer.attention.kind for layer in self.layers)

    def set_attention(self, kind, layers=None):
        """Switch layers to "moba" or "full"; both use the same parameters.

        Args:
            kind: "moba" or "full", or one of them for every layer named.
            layers: indices of the layers to switch; None means all.

        Raises:
            ValueError: a kind is neither "moba" nor "full", or their number is not
                that of the layers.
        """
        layers = range(len(self.layers)) if layers is None else layers
        kinds = [kind] * len(layers) if isinstance(kind, str) else list(kind)
        if len(kinds) != len(layers):
            raise ValueError(
                f"expected one kind for each of {len(layers)} layers, got "
                f"{len(kinds)}; pass one string to switch them all alike"
            )
        for index, each in zip(layers, kinds, strict=True):
            _check_kind(each)
            self.layers[index].attention.kind = each

    def forward(self, tokens, cu_seqlens=None, return_aux=False, prompt_lengths=None):
        """Predict the next byte at every position.

        Args:
            tokens: (S,) int64, byte values of all sequences in a row, or (B, length) of
                sequences of equal length.
            cu_seqlens: (B+1,) int32 offsets of the sequences; None means that every row
                is one.
            return_aux: also return what the layers read.
            prompt_lengths: (B,) tokens of every sequence that layers read as their kind
                says; those after them attend in full in every layer, as the paper
                generates (section 3.3). None: all of them.

        Returns:
            logits (..., vocab_size), one row for every token; with `return_aux`,
            `(logits, [LayerAux, ...])`.

        Raises:
            ValueError: both `return_aux` and `prompt_lengths` are given.
        """
        if return_aux and prompt_lengths is not None:
            raise ValueError(
                "expected return_aux or prompt_lengths, got both; what a query chose "
                "is not what it reads where it attends in full"
            )
        pack = self._pack(tokens, cu_seqlens)
        if prompt_lengths is not None:
            size = pack.cu_seqlens.diff().to(prompt_lengths.device)
            prompts = prompt_lengths.repeat_interleave(size)
            pack = replace(pack, decoded=pack.position >= prompts)
        x, read = self.embedding(tokens.flatten()), []
        for layer in self.layers:
            x = layer(x, pack, return_aux)
            if return_aux:
                x, aux = x
                read.append(aux)
        logits = functional.linear(self.norm(x), self.embedding.weight)
        logits = logits.unflatten(0, tokens.shape)
        return (logits, read) if return_aux else logits

    def losses(self, tokens, targets, cu_seqlens=None):
        """Return the cross-entropy of every position in nats, in the shape of tokens.

        It is 0 where the target is -100.
        """
        logits = self(tokens, cu_seqlens).float().flatten(0, -2)
        losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
        return losses.view(targets.shape)

    def _pack(self, tokens, cu_seqlens):
        device = tokens.device
        batch = len(tokens) if tokens.ndim == 2 else None
        rows, length = (1, len(tokens)) if batch is None else tokens.shape
        if cu_seqlens is None:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * length
            cu_seqlens = cu_seqlens if batch else cu_seqlens.to(device)
        position = torch.arange(tokens.numel(), device=device)
        if batch is None:
            lengths, size = cu_seqlens.diff(), len(tokens)
            starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=size)
            position = position - starts.to(device)
        else:
            position = position % length
        return Pack(cu_seqlens, position, _rope(position, self.config), batch)


def full_attention(q, k, v, cu_seqlens, batch=None):
    """Attend causally to every earlier token of the same sequence.

    Args:
        q: (S, H, D).
        k: (S, HK, D), HK divides H.
        v: (S, HK, D).
        cu_seqlens: (B+1,) offsets of the sequences.
        batch: number of sequences if all have the same length; on a GPU PyTorch's own
            dense attention then takes the call, the fastest there is for it.

    Returns:
        (S, H, D).
    """
    if batch and q.is_cuda:
        rows = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(
            *rows, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)
    # One block holds every sequence whole, so the current block is all there is.
    return moba_fast.moba_attention(
        q, k, v, block_size=max(len(q), 1), topk=1, cu_seqlens=cu_seqlens
    )


def decode_in_full(q, k, v, cu_seqlens, decoded):
    """Attend as `full_attention` does, for the last tokens of every sequence only.

    Args:
        q: (S, H, D).
        k: (S, HK, D), HK divides H.
        v: (S, HK, D).
        cu_seqlens: (B+1,) offsets of the sequences.
        decoded: (S,) bool, true for n tokens at the ends of sequences.

    Returns:
        (n, H, D).
    """
    before = functional.pad(decoded.cumsum(0, dtype=torch.int32), (1, 0))
    return moba_fast.moba_attention(
        q[decoded],
        k,
        v,
        block_size=max(len(k), 1),
        topk=1,
        cu_seqlens=before[cu_seqlens.to(before.device).long()],
        cu_seqlens_k=cu_seqlens,
    )


def add_previous(x, weight, position):
    """Add to every token its predecessors in the same sequence, weighted by channel.

    Args:
        x: (S, C).
        weight: (n, C), row i for the token i+1 places before.
        position: (S,) place of every token in its sequence, from 0.

    Returns:
        (S, C).

    >>> x = torch.tensor([[1.0], [10.0], [100.0]])
    >>> add_previous(x, torch.ones(1, 1), torch.tensor([0, 1, 0])).ravel()
    tensor([  1.,  11., 100.])
    """
    out = x
    for lag, row in enumerate(weight, start=1):
        previous = functional.pad(x, (0, 0, lag, 0))[: len(x)]
        out = out + row * previous.masked_fill((position < lag)[:, None], 0.0)
    return out


def load_checkpoint(path=None):
    """Load a model for inference.

    Args:
        path: a file written by `python -m moba_lab.train --export`; None means the
            model shipped with this package.

    Returns:
        `Model`, float32, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = CHECKPOINT if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"expected a model at {path}, found none; make one with "
            "`python -m moba_lab.train --export PATH`"
        )
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = Model(Config(**config))
    model.load_state_dict(weights)
    return model.eval()


def load_card(path=None):
    """Read the card of a model: how it was made, and what was measured on it.

    Args:
        path: the model's file; None means the model shipped with this package.

    Returns:
        dict, as `python -m moba_lab.train --export` wrote it.
    """
    path = CHECKPOINT if path is None else Path(path)
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def config_json(config):
    """Write a `Config` as JSON; `Config(**json.loads(...))` reads it."""
    return json.dumps(asdict(config))


def _rope(position, config):
    """Return (cos, sin), each (S, 1, rotated / 2), for positions in each sequence."""
    rotated = min(config.rope_dims, config.head_dim)
    exponent = torch.arange(0, rotated, 2, device=position.device)
    frequency = config.rope_base ** -(exponent / rotated)
    angle = position[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def _rotate(x, rope):
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def _initialise(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(
            f'expected "moba" or "full" for a layer\'s attention, got {kind!r}'
        )
