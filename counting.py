"""An evaluation counted into its ledger, a line a picture, and how certain a difference of two rows is.

evaluate.py reports what was counted.
"""
import platform
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import analysis
import released
from loading import image_seed
from protocol import CODE, Evaluation, add_up
from support.cli import BAR, progress
from support.data import subset
from support.files import Broken, code_stamp, stamp
from support.ledger import Ledger, wait_for_all, world
from support.metrics import proposal_scores

VERSIONS = {"python": platform.python_version(), "torch": torch.__version__}     # stored beside results


def identity_of(ev: Evaluation) -> dict:
    """Everything that the counts depend on; the ledger keeps runs apart by it."""
    model = ev.model
    data = ev.data
    batch = ev.batch
    if model.device.type == "cpu" and model.dtype == torch.float32:
        batch = "any"                                    # there it moves a border pixel at most
    return {"task": ev.task, "dataset": data.name, "labels": data.source, "classes": data.classes,
            "always": data.always, "data": stamp(data.files), "variants": ev.variants,
            "protocol": ev.protocol._asdict() | {"choices": released.names_on(ev.protocol.choices)},
            "code": code_stamp(CODE), "batch": batch,
            "model": [model.name, model.fingerprint, str(model.dtype), model.device.type]}


def truth_of(ev: Evaluation, counts: np.ndarray) -> np.ndarray:
    """How many pixels of each class the truth has, (K,), by the counts of any row, which all see the same truth."""
    return ev.scoring.parts(counts)[:, [0, 2]].sum(1)                        # TP + FN


def count_into(ledger, ev, names, silent):
    """Count the pictures that the ledger lacks, a line each, under a bar that shows the best mIoU so far."""
    todo = [name for name in names if name not in ledger.done]
    total = ledger.sum(names)
    shown = time.time()
    with progress("evaluating", "image", len(names), len(names) - len(todo), silent) as bar:
        for name, counts in ev.count(todo):
            bar.update()
            if isinstance(counts, Exception):
                ledger.skip(name, str(counts))
                continue
            ledger.add(name, counts, image_seed(name, ev.protocol.seed))
            add_up(total, counts)
            if total and not bar.disable and time.time() - shown > BAR:      # a score takes longer than a picture
                shown = time.time()
                best, row = max((ev.scoring.score(total[v.name])["mIoU"], v.name) for v in ev.variants)
                bar.set_postfix({f"mIoU {row}": f"{best:.1f}"})


def count(ev: Evaluation, limit: int | None, out: Path) -> tuple[Ledger, list[str]] | None:
    """Count what the ledger of an evaluation lacks -> it, and the names of its pictures.

    limit: of pictures, None: all.  The processes of torchrun share them out; None in every process but the first.
    """
    rank, processes = world()
    names = subset(ev.data.names, limit)
    ledger = Ledger(out, identity_of(ev), ev.rows, ev.scoring.shape(len(ev.data.classes)), partial(truth_of, ev), rank)
    count_into(ledger, ev, names[rank::processes], silent=rank > 0)
    wait_for_all()
    if rank > 0:
        return None
    ledger.read()                                        # what the other processes wrote
    lost = [name for name in names if name not in ledger.done and name not in ledger.broken]
    if lost:
        raise ValueError(f"{len(lost)} pictures that other processes counted are no longer in {out}: a ledger was "
                         "removed or damaged meanwhile; the same command counts them again")
    return ledger, names


def scored_rows(ev, ledger, names):
    """The table's rows of what the ledger holds, and {picture: why it could not be read}.

    Broken: no picture could be read, or none has a labelled pixel.
    """
    broken = {name: ledger.broken[name] for name in names if name not in ledger.done}
    if len(broken) == len(names):
        reason = next(iter(broken.values()))
        raise Broken(f"none of the {len(names)} pictures of {ev.data.name} could be read; the first: {reason}")
    total = ledger.sum(names)
    if not total:
        raise Broken(f"no pixel can be scored: no picture of {ev.data.name} has a labelled pixel")
    return {row: ev.scoring.score(c) for row, c in total.items()}, broken


def parts_of(ev: Evaluation, ledger: Ledger, names: list[str]) -> dict[str, np.ndarray]:
    """TP, FP, FN of each class in each picture that could be read and has a labelled pixel: (variants, K, 3)."""
    parts = {}
    for name in names:
        rows = ledger.sum([name])
        if rows:
            parts[name] = np.stack([ev.scoring.parts(rows[v.name]) for v in ev.variants])    # (variants, K, 3)
    return parts


def above_first(counts: np.ndarray) -> list[list[float]]:
    """What each row's mIoU is above the first one's, and between what limits: [difference, low, high].

    counts: TP, FP, FN of each class in each picture, (n, rows, K, 3).  95 % of the differences when the pictures, the
    same for all rows, are drawn again with replacement.
    """
    miou, _ = analysis.bootstrap(counts, score=proposal_scores)              # (draws, rows)
    low, high = np.percentile(miou - miou[:, :1], [2.5, 97.5], axis=0)       # (rows,) each
    whole = np.array([proposal_scores(c)["mIoU"] for c in counts.sum(0)])    # (rows,)
    return np.stack([whole - whole[0], low, high], axis=1).tolist()          # (rows, 3)
