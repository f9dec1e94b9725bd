"""Count the floating point operations of a training step of `moba_lab.model.Model`.

A multiplication with an addition counts as two. The backward pass counts as twice the
forward pass, also in attention: what a kernel computes again is not counted, so that
the shares of a peak are those of model FLOPs (Chowdhery et al., arXiv 2204.02311).
"""


def pairs(context, block_size, topk):
    """Count the (query, key) pairs of one head of causal MoBA over a whole sequence.

    Args:
        context: tokens of the sequence.
        block_size: tokens per block.
        topk: blocks per query, its own included.

    Returns:
        read: pairs that are attended.
        scored: (query, past block) pairs that the gate scores.

    >>> pairs(8, block_size=2, topk=2)  # 12 in own blocks, 2 keys each for 6 queries
    (24, 12)
    >>> pairs(8, block_size=8, topk=1)  # full attention
    (36, 0)
    """
    read = scored = 0
    for block, first in enumerate(range(0, context, block_size)):
        queries = min(block_size, context - first)
        read += queries * (queries + 1) // 2
        read += queries * min(topk - 1, block) * block_size
        scored += queries * block if topk > 1 else 0
    return read, scored


def work_ratio(context, block_size, topk):
    """Return the share of full causal attention's pairs that MoBA reads.

    >>> round(work_ratio(8192, 1024, 2), 3), round(work_ratio(8192, 64, 32), 3)
    (0.344, 0.432)
    """
    return pairs(context, block_size, topk)[0] / pairs(context, context, 1)[0]


def matrix_parameters(config):
    """Count the parameters that multiply every token: all matrices, the tied one once.

    Norms and the keys' convolution are left out, less than a thousandth.
    """
    width, layers = config.width, len(config.attention)
    inner = config.head_dim * (config.heads + config.kv_heads)
    per_layer = 2 * width * inner + 3 * width * config.hidden
    return layers * per_layer + config.vocab_size * width


def training_flops(config, attention, context):
    """Count the FLOPs of training on one token, forward and backward.

    Args:
        config: `moba_lab.model.Config`.
        attention: "moba" or "full", or one of them for every layer.
        context: tokens of a sequence.

    Returns:
        matrices: 6 N, with N from `matrix_parameters`.
        attention: 12 D for every (query, key) pair of a head, 4 forward and 8 backward,
            and 2 D for every score of the gate, which has no backward pass.

    >>> from moba_lab.model import Config
    >>> training_flops(Config(), "full", 1024)
    (4915200, 3148800.0)
    """
    layers = len(config.attention)
    kinds = (attention,) * layers if isinstance(attention, str) else attention
    total = 0
    for kind in kinds:
        sizes = (context, 1) if kind == "full" else (config.block_size, config.topk)
        read, scored = pairs(context, *sizes)
        total += config.heads * config.head_dim * (12 * read + 2 * scored)
    return 6 * matrix_parameters(config), total / context
