"""Say how sure a difference or a fit is.

Windows of one file are alike and so are runs of one seed, so a spread is taken over
files, or over seeds, never over single bytes.
"""

from dataclasses import dataclass

import numpy as np

# Two-sided 95 % quantiles of Student's t by degrees of freedom; the last one serves all
# larger samples, to which it gives a little too wide an interval.
STUDENT = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365},
    **{8: 2.306, 9: 2.262, 10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000},
}


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, and over what it was taken."""

    mean: float
    low: float
    high: float
    over: str

    @property
    def bound(self):
        """Largest size of the mean that the interval allows."""
        return max(abs(self.low), abs(self.high))

    @property
    def includes_zero(self):
        """Whether the interval holds 0, so that no difference was seen."""
        return self.low <= 0 <= self.high


def student(degrees):
    """Return the quantile of `STUDENT` for at least so many degrees of freedom."""
    return STUDENT[max(known for known in STUDENT if known <= degrees)]


def mean_interval(values, over):
    """Return the mean of independent values with its 95 % interval by Student's t.

    Args:
        values: numbers; one alone gives an interval without bounds.
        over: what they are, such as "3 seeds".

    >>> interval = mean_interval([1.0, 2.0, 3.0], "3 seeds")
    >>> round(interval.low, 2), interval.mean, round(interval.high, 2)
    (-0.48, 2.0, 4.48)
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return Interval(float(values[0]), -np.inf, np.inf, over)
    half = student(len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return Interval(mean, mean - float(half), mean + float(half), over)


def paired_difference(first, second, counts=None):
    """Compare two kinds of runs, `first` minus `second`, with the same seeds and files.

    Args:
        first: (R, F) mean loss of every seed on every file.
        second: (R, F) likewise, with the same seeds and files.
        counts: (F,) windows of every file, its weight; None means alike.

    Returns:
        `Interval`: over seeds where there are at least three; otherwise over files,
        with the seeds' mean of each, which does not say how seeds differ.

    >>> first, second = np.array([[1.0, 2.0]] * 3), np.array([[1.5, 2.0]] * 3)
    >>> paired_difference(first, second).mean
    -0.25
    """
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    seeds, files = gap.shape
    weight = np.ones(files) if counts is None else np.asarray(counts, dtype=float)
    if seeds >= 3:
        return mean_interval(gap @ weight / weight.sum(), f"{seeds} seeds")
    # A ratio of sums, so its spread is that of the weighted residuals.
    of_file = gap.mean(0)
    mean = float(of_file @ weight / weight.sum())
    which = "these 2 seeds" if seeds == 2 else "this seed"
    over = f"{files} files, for {which} only"
    if files == 1:
        return Interval(mean, -np.inf, np.inf, over)
    residual = weight * (of_file - mean) / weight.mean()
    half = student(files - 1) * residual.std(ddof=1) / files**0.5
    return Interval(mean, mean - float(half), mean + float(half), over)


def claim(interval, what, digits=3):
    """Put a difference into words that claim no more than its interval.

    >>> claim(Interval(0.001, -0.004, 0.006, "3 seeds"), "MoBA minus full")
    'MoBA minus full: no difference above 0.006 at 95 % (3 seeds)'
    >>> claim(Interval(0.02, 0.01, 0.03, "9 files"), "MoBA minus full")
    'MoBA minus full: +0.020, from +0.010 to +0.030 at 95 % (9 files)'
    >>> claim(Interval(0.02, -np.inf, np.inf, "1 seed"), "MoBA minus full")
    'MoBA minus full: +0.020, of one value, so nothing is known of its spread (1 seed)'

    An end that would be rounded to 0 gets more digits.

    >>> claim(Interval(-0.004, -0.0076, -0.0004, "9 files"), "MoBA minus full")
    'MoBA minus full: -0.0040, from -0.0076 to -0.0004 at 95 % (9 files)'
    """
    if not interval.includes_zero:
        nearest = min(abs(interval.low), abs(interval.high))
        digits = max(digits, min(int(np.ceil(-np.log10(nearest))), digits + 3))
    mean = f"{interval.mean:+.{digits}f}"
    if not np.isfinite(interval.bound):
        return (
            f"{what}: {mean}, of one value, so nothing is known of its spread "
            f"({interval.over})"
        )
    if interval.includes_zero:
        # Rounded up, or the claim would be a little too strong.
        bound = np.ceil(interval.bound * 10**digits) / 10**digits
        return (
            f"{what}: no difference above {bound:.{digits}f} at 95 % ({interval.over})"
        )
    low, high = (f"{x:+.{digits}f}" for x in (interval.low, interval.high))
    return f"{what}: {mean}, from {low} to {high} at 95 % ({interval.over})"


@dataclass(frozen=True)
class PowerLaw:
    """loss = factor * x ** exponent, with 95 % intervals of both."""

    factor: float
    exponent: float
    factor_interval: tuple[float, float]
    exponent_interval: tuple[float, float]

    def __call__(self, x):
        """Return the fitted loss at x."""
        return self.factor * np.asarray(x, dtype=float) ** self.exponent


def fit(x, y):
    """Fit y = factor * x ** exponent by least squares of the logarithms.

    >>> [round(float(value), 6) for value in fit([1, 10, 100], [2, 0.2, 0.02])]
    [2.0, -1.0]
    """
    exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
    return np.exp(constant), exponent


def fit_power_law(x, losses, counts, samples=1000, seed=0):
    """Fit a power law with intervals from a bootstrap over files and seeds.

    Every sample draws the held-out files anew, the same ones for all points, and for
    every point its seeds.

    Args:
        x: (P,) such as FLOPs, at least two different ones.
        losses: P arrays (seeds, F) of every seed's mean loss on every file.
        counts: (F,) windows of every file.
        samples: of the bootstrap.
        seed: of the bootstrap; with the same one two kinds of runs draw the same files.

    Returns:
        `PowerLaw`.
    """
    losses, counts = [np.asarray(of, float) for of in losses], np.asarray(counts, float)
    rng, found = np.random.default_rng(seed), []
    for _ in range(samples):
        weight = counts * np.bincount(
            rng.integers(len(counts), size=len(counts)), minlength=len(counts)
        )
        y = []
        for of in losses:
            seeds = rng.integers(len(of), size=len(of))
            y.append((of[seeds] @ weight).mean() / weight.sum())
        found.append(fit(x, y))
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    factor, exponent = fit(x, [(of @ counts).mean() / counts.sum() for of in losses])
    return PowerLaw(
        float(factor),
        float(exponent),
        (float(low[0]), float(high[0])),
        (float(low[1]), float(high[1])),
    )
