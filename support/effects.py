"""How large an effect is, and how sure: scores of pictures, several of one prompt, compared prompt by prompt.

    effects.mean_and_error(scores)                       # scores: (prompts, seeds), nan where there is none
    effects.compare(scores, scores_of_the_base)
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

DRAWS = 2000                            # of the bootstrap
SEEN = 2.8                              # standard errors: 1.96 of a 5 % test and 0.84 of 80 % power
LEAST = 20                              # prompts: of fewer, neither bootstrap nor standard error can be trusted


def by_prompt(scores: np.ndarray) -> np.ndarray:
    """(prompts, seeds) -> the mean over the seeds of each prompt that has a score.

    Pictures of one prompt are not independent; prompts are.
    """
    there = ~np.isnan(scores)                                                # (prompts, seeds)
    count = there.sum(1)                                                     # (prompts,)
    total = np.where(there, scores, 0).sum(1)                                # (prompts,)
    return total[count > 0] / count[count > 0]


def mean_and_error(scores: np.ndarray) -> tuple[float, float, int]:
    """Mean of (prompts, seeds), its standard error over prompts, how many have a score.  nan: none, or a single one."""
    x = by_prompt(scores)
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan, len(x)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))), len(x)


class Comparison(NamedTuple):
    """How much higher an arm scores than its base on the same prompts and noise."""
    n: int                              # prompts with a score in both
    difference: float
    low: float                          # of the 95 % interval
    high: float
    error: float                        # standard error of the difference
    p: float                            # two-sided, of a difference of 0, by Student's t

    @property
    def seen(self):
        """The smallest true difference that this experiment finds in four of five repetitions (80 % power).

        nan where all prompts differ by the same: how much others would differ is not known.
        """
        return SEEN * self.error if self.error > 0 else math.nan

    @property
    def interval(self):
        """The 95 % interval as a text."""
        return "none" if self.n < LEAST else f"{self.low:+.3f} to {self.high:+.3f}"

    @property
    def verdict(self):
        if self.n < LEAST:
            return f"cannot be told (fewer than {LEAST} prompts have this score)"
        if self.difference == 0 == self.error:
            return "cannot be told (no prompt's score changed)"
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return f"cannot be told (an effect of {self.seen:.3f} could have been seen)"


def compare(arm: np.ndarray, base: np.ndarray) -> Comparison:
    """Scores (prompts, seeds) of two arms, paired picture by picture.

    The interval is the bootstrap's: prompts are drawn again with replacement, each with all of its seeds.  Below LEAST
    prompts low, high and p are nan.
    """
    difference, error, n = mean_and_error(arm - base)
    if n < LEAST:
        return Comparison(n, difference, math.nan, math.nan, error, math.nan)
    x = by_prompt(arm - base)                                                # (n,)
    again = np.random.default_rng(0).integers(n, size=(DRAWS, n))            # which prompts, (DRAWS, n)
    low, high = np.percentile(x[again].mean(1), [2.5, 97.5])
    p = float(difference == 0)                           # where all differ by the same there is no chance
    if error > 0:
        p = float(2 * t.sf(abs(difference) / error, n - 1))
    return Comparison(n, difference, float(low), float(high), error, p)


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several comparisons still hold if a single false one among them is to be as rare as `level`.

    The smallest p must pass level / n, the next level / (n-1), and so on; after the first that fails none holds.  nan:
    no comparison.
    """
    counted = [i for i, x in enumerate(p) if not math.isnan(x)]
    holds = [False] * len(p)
    for done, i in enumerate(sorted(counted, key=lambda i: p[i])):
        if p[i] > level / (len(counted) - done):
            break
        holds[i] = True
    return holds


def or_none(x: float) -> float | None:
    """A number for a JSON file, which has no nan: None in its place."""
    return None if math.isnan(x) else x


def listed(scores: np.ndarray) -> list[list[float | None]]:
    """(prompts, seeds) for a JSON file."""
    return [[or_none(x) for x in row] for row in scores.tolist()]
