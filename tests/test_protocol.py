"""What an evaluation is made of: draws, prompts, the ceiling, limits, and pictures that could not be read at first."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

import analysis
import counting
import protocol
import seg4diff
from protocol import TASKS, Protocol, evaluation
from support import metrics
from support.data import DATASETS, Item
from support.ledger import Ledger


@pytest.mark.parametrize("task", TASKS)
def test_every_task_averages_over_draws(tiny, monkeypatch, task):
    seen = []
    attend = seg4diff.attend
    monkeypatch.setattr(seg4diff, "attend", lambda *args, **options: seen.append(options.get("draws", 1)) or attend(
        *args, **options))
    data = DATASETS["scenes"]()
    evaluation(tiny, data, task, Protocol(draws=2)).predict([data.read(data.names[0])])
    assert set(seen) == {2}


def test_the_first_prompt_of_many_names(tiny):
    classes = [f"{word} car car car car car car" for word in ("red", "blue", "green", "grey", "black")]
    item = Item(Image.new("RGB", (5, 1)), np.arange(5, dtype=np.uint8)[None], "x")
    got = protocol.names_of(tiny, item, classes)
    assert got == classes[:len(got)] and 0 < len(got) < 5


def test_thresholds_that_are_compared(tiny):
    found = {v.threshold for v in TASKS["thresholds"].variants(tiny)}
    assert found == {1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3}


def test_the_ceiling_is_the_mean_over_a_cell():
    labels = np.ones((8, 8), np.uint8)
    labels[2:6, 2:6] = 0
    assert protocol.ceiling_map(labels, np.array([0, 1]), (1, 1)).all()


def test_limits_hold_95_percent():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (30, 2, 3, 3))
    miou, _ = analysis.bootstrap(counts, score=metrics.proposal_scores)
    above = np.sort(miou[:, 1] - miou[:, 0])
    _, low, high = counting.above_first(counts)[1]
    assert [np.mean(above < low), np.mean(above > high)] == pytest.approx([0.025, 0.025], abs=0.002)


def test_a_picture_that_could_be_read_later_is_not_broken(tiny, tmp_path):
    ev = evaluation(tiny, replace(DATASETS["scenes"](), classes=["car", "sky"]), "ovss")
    ledger = Ledger(tmp_path, {}, ev.rows, (2, 2), partial(counting.truth_of, ev))
    ledger.skip("a", "the drive was away")
    ledger.add("a", dict.fromkeys(ev.rows, np.eye(2, dtype=int)), 0)
    assert counting.scored_rows(ev, ledger, ["a"])[1] == {}
