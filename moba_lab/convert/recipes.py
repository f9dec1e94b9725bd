"""Say which stages a recipe has, scaled to the size of a model."""

from dataclasses import dataclass

from moba_lab.settings import Stage

RECIPES = ("paper", "switch", "hybrid", "full")
# "tune" is fine-tuning on answers, with MoBA.
KINDS = ("full", "moba", "tune")
# The paper goes from 128K tokens to 1M.
LONGER = 8
# The paper says 100B tokens for MoBA and nothing of the others; these are our shares.
LENGTHS_SHARE, MOBA_SHARE, TUNE_SHARE = 0.4, 0.5, 0.1
# Section 3.1: 16 blocks of which 3 are read at 8K tokens. Section 3.3: 256, 12 at 1M.
SHORT = 8192


@dataclass(frozen=True)
class Plan:
    """What a recipe is scaled to.

    context: tokens that the model was trained on.
    longest: tokens of the last stage of recipe "paper".
    tokens: of all stages together.
    tokens_per_step: of a step, rounded to whole sequences.
    tunes: whether there is something to fine-tune on.
    """

    context: int
    longest: int
    tokens: int
    tokens_per_step: int
    tunes: bool = False


def stages_of(recipe, plan):
    """Return the stages of a recipe.

    "paper" (section 3.3): in full at the model's length and at every doubling up to
    `longest`; there with MoBA; then fine-tuning at lengths from a quarter of the
    model's on. "switch": MoBA at the model's own length. "hybrid" (section 3.2): MoBA
    for 90 % of the tokens, then full. "full": the same length without MoBA, to compare.

    Args:
        recipe: one of `RECIPES`.
        plan: `Plan`.

    Returns:
        tuple of `moba_lab.settings.Stage`.

    >>> for stage in stages_of("paper", Plan(2048, 16384, 2**20, 2**15, tunes=False)):
    ...     print(stage.attention, stage.context, stage.batch, stage.steps)
    full 2048 16 4
    full 4096 8 4
    full 8192 4 4
    full 16384 2 4
    moba 16384 2 18
    """
    own = plan.context
    if recipe == "paper":
        parts = [("full", n) for n in doublings(own, plan.longest)]
        shares = [LENGTHS_SHARE / len(parts)] * len(parts)
        parts, shares = [*parts, ("moba", plan.longest)], [*shares, MOBA_SHARE]
        if plan.tunes:
            tuned = doublings(max(1, own // 4), plan.longest)
            parts += [("tune", n) for n in tuned]
            shares += [TUNE_SHARE / len(tuned)] * len(tuned)
    elif recipe == "hybrid":
        parts, shares = [("moba", own), ("full", own)], [0.9, 0.1]
    else:
        parts, shares = [("full" if recipe == "full" else "moba", own)], [1.0]
    whole = sum(shares)
    return tuple(
        stage(kind, n, share / whole, plan)
        for (kind, n), share in zip(parts, shares, strict=True)
    )


def stage(kind, length, share, plan):
    """Return a stage that gets a share of the tokens, at least one step."""
    batch = max(1, plan.tokens_per_step // length)
    steps = max(1, round(share * plan.tokens / (batch * length)))
    return Stage(kind, length, batch, steps)


def doublings(first, last):
    """List the lengths from the first on, each twice the one before, up to the last.

    >>> doublings(100, 500), doublings(100, 80)
    ([100, 200, 400, 500], [80])
    """
    lengths = []
    while first < last:
        lengths.append(first)
        first *= 2
    return [*lengths, last]


def default_blocks(length):
    """Return the paper's block size and topk for a length, or what is like them.

    >>> default_blocks(2**20), default_blocks(8192), default_blocks(1024)
    ((4096, 12), (512, 3), (64, 3))
    """
    if length <= SHORT:
        return max(1, length // 16), 3
    return max(1, length // 256), 12


def default_full_layers(layers):
    """Return the last three layers, of small models at most half of them.

    >>> default_full_layers(32), default_full_layers(2)
    ([-3, -2, -1], [-1])
    """
    return list(range(-min(3, layers // 2), 0))


def default_rate(parameters, lora):
    """Return a peak learning rate: 2e-5 at 8B parameters, more for smaller models.

    >>> round(default_rate(8e9, False), 7), round(default_rate(5e6, False), 4)
    (2e-05, 0.0008)
    """
    rate = 2e-5 * (8e9 / parameters) ** 0.5
    return min(1e-3, rate * 10 if lora else rate)


def check_stages(stages, tunes, micro_batch):
    """Raise ValueError where a stage cannot be run.

    Args:
        stages: of `moba_lab.settings.Stage`.
        tunes: whether there is something to fine-tune on.
        micro_batch: sequences at once.
    """
    for stage in stages:
        if stage.attention not in KINDS:
            raise ValueError(
                f"expected {', '.join(KINDS)} as attention of a stage, got "
                f"{stage.attention!r}; full layers are named by --full-layers"
            )
        if not min(stage.context, stage.batch, stage.steps):
            raise ValueError(
                f"expected context, batch and steps of a stage above 0, got {stage}"
            )
        if stage.attention == "tune" and not tunes:
            raise ValueError(
                "expected answers to fine-tune on, got none; name them by --tune, or "
                "leave out the stage"
            )
        if stage.batch % min(micro_batch, stage.batch):
            raise ValueError(
                f"expected --micro-batch to divide the batches, got {micro_batch} and "
                f"a batch of {stage.batch}"
            )
