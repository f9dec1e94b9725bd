"""Measure the time and the memory that reading a prompt takes."""

import torch

from moba_fast.memory import RESET, largest_size
from moba_fast.timing import attempt, spread, take_turns
from moba_lab.evaluate.losses import takes_few_logits

ON_GPU = "largest allocation on the GPU, weights included"
ON_CPU = "largest resident size of the process, weights and libraries included"


@torch.no_grad()
def prefill(subject, ids, repeats):
    """Read a prompt into a new cache, again and again.

    Args:
        subject: `Subject`, its attention switched.
        ids: (S,) ids.
        repeats: calls after the one that warms up, fewer where one takes long.

    Returns:
        dict: prefill_median_s and the like, see `moba_fast.timing.spread`;
        tokens_per_s; peak_bytes, and peak_how, what that is.
    """
    device, model = subject.place.device, subject.model
    row = torch.as_tensor(ids, device=device)[None]
    few = {"logits_to_keep": 1} if takes_few_logits(model) else {}

    def call():
        # What it returns goes away before the next call.
        model(row, use_cache=True, **few)

    watch = begin_watching(device)
    times = take_turns({"prefill": call}, repeats, device, compiling=["prefill"])
    if isinstance(times["prefill"], Exception):
        raise times["prefill"]
    found = spread("prefill", times["prefill"])
    speed = len(ids) / found["prefill_median_s"]
    return {**found, "tokens_per_s": speed, **end_watching(device, watch)}


def begin_watching(device):
    """Begin to note the most memory that is taken; return why that is not possible."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return None
    if not RESET.exists():
        return f"not measured: needs Linux's {RESET}"
    error = attempt(lambda: RESET.write_text("5"))
    return f"not measured: {error}" if isinstance(error, Exception) else None


def end_watching(device, why_not):
    """Return the most memory that was taken since, as columns."""
    if why_not:
        return {"peak_how": why_not}
    if device == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_how": ON_GPU}
    return {"peak_bytes": largest_size(), "peak_how": ON_CPU}
