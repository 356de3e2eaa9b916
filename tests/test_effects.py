"""Effects and how sure they are, worked out by hand."""
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from support import effects
from support.effects import by_prompt, compare, holm, mean_and_error


def test_means_by_hand():
    """Seeds of a prompt count as one; a prompt without scores does not count."""
    scores = np.array([[1.0, 3.0], [math.nan, 6.0], [math.nan, math.nan], [4.0, 4.0]])
    assert by_prompt(scores).tolist() == [2, 6, 4]
    mean, error, n = mean_and_error(scores)
    assert (mean, n) == (4, 3) and error == pytest.approx(2 / math.sqrt(3))              # deviations -2, 2, 0
    assert mean_and_error(np.repeat(scores, 3, axis=1)) == pytest.approx((mean, error, n))
    assert mean_and_error(scores[:1])[::2] == (2, 1) and math.isnan(mean_and_error(scores[:1])[1])
    assert mean_and_error(scores[2:3])[2] == 0 and math.isnan(mean_and_error(scores[2:3])[0])
    assert effects.listed(scores[:2]) == [[1, 3], [None, 6]]


def test_pairing_by_hand(monkeypatch):
    """Prompts that differ widely hide nothing if each changes by about the same."""
    monkeypatch.setattr(effects, "LEAST", 2)
    base = np.array([[0.0], [100.0], [1000.0], [5000.0]])
    found = compare(base + [[1.0], [2.0], [1.0], [2.0]], base)
    assert (found.n, found.difference) == (4, 1.5) and found.error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert 1 <= found.low < 1.5 < found.high <= 2 and found.verdict == "better"
    assert found.interval == f"{found.low:+.3f} to {found.high:+.3f}"
    assert found.p == pytest.approx(ttest_1samp([1, 2, 1, 2], 0).pvalue)
    assert found.seen == pytest.approx(2.8 * found.error)
    assert compare(base, base + [[1.0], [2.0], [1.0], [2.0]]).verdict == "worse"
    unclear = compare(base + [[1.0], [-1.0], [2.0], [-2.0]], base)
    assert unclear.verdict == f"cannot be told (an effect of {unclear.seen:.3f} could have been seen)"
    same = compare(base, base)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert same.verdict == "cannot be told (no prompt's score changed)" and math.isnan(same.seen)
    assert compare(base + 1, base).p == 0 and compare(base + 1, base)[2:4] == (1, 1)
    monkeypatch.undo()
    few = compare(base + 1, base)                        # four prompts, however alike, make nothing sure
    assert few.verdict == "cannot be told (fewer than 20 prompts have this score)" and few.difference == 1
    assert np.isnan([few.low, few.high, few.p]).all()


def test_pairing_leaves_out_what_one_arm_lacks():
    arm = np.array([[1.0, math.nan], [2.0, 2.0], [math.nan, math.nan], [3.0, 3.0]])
    base = np.array([[0.0, 0.0], [math.nan, 0.0], [1.0, 1.0], [1.0, 0.0]])
    found = compare(arm, base)
    assert found.n == 3 and found.difference == pytest.approx((1 + 2 + 2.5) / 3)


def test_the_bootstrap_is_clustered_and_repeatable():
    """About 1.96 standard errors on each side; seeds that repeat a prompt's answer make nothing surer."""
    base = np.random.default_rng(0).normal(size=(200, 1))
    arm = base + np.random.default_rng(1).normal(0.1, 1, (200, 1))
    found = compare(arm, base)
    assert found.low == pytest.approx(found.difference - 1.96 * found.error, abs=0.2 * found.error)
    assert found.high == pytest.approx(found.difference + 1.96 * found.error, abs=0.2 * found.error)
    assert compare(arm, base) == found
    assert compare(np.repeat(arm, 5, axis=1), np.repeat(base, 5, axis=1)) == pytest.approx(found)


def test_holm_by_hand():
    """0.01 passes 0.05 / 3, 0.03 fails 0.05 / 2, and 0.04 is not asked any more."""
    assert holm([0.04, 0.01, math.nan, 0.03]) == [False, True, False, False]
    assert holm([0.02, 0.04, 0.01]) == [True, True, True]
    assert holm([0.03, 0.03]) == [False, False] and holm([]) == [] and holm([math.nan]) == [False]
