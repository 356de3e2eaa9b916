"""How a label map is scored (A.4): with names by a confusion matrix, without by matching regions to classes."""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_cdt
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IGNORE = 255                            # label of pixels that belong to no class and are never scored


def classes_in(labels):
    """The classes of a label map, in order, without IGNORE: (K,) of the map's dtype."""
    return np.setdiff1d(labels, [IGNORE])


def overlaps(truth: Tensor, labels: Tensor, K: int, P: int) -> Tensor:
    """How many pixels of each class have each label: (K+1, P), counted on the device where both maps are.

    truth: classes, or IGNORE for pixels that are not scored, which the last row counts; labels: 0 to P-1, of its shape.
    """
    rows = torch.where(truth == IGNORE, K, truth.long())                     # (height, width)
    return torch.bincount((rows * P + labels).flatten(), minlength=(K + 1) * P).view(K + 1, P)


def confusion(truth: np.ndarray, pred: np.ndarray, K: int) -> np.ndarray:
    """Pixel counts (K, K), rows the truth, columns the prediction; pixels whose truth is IGNORE are left out."""
    valid = truth != IGNORE
    largest = max(truth[valid].max(initial=0), pred[valid].max(initial=0))
    if largest >= K:
        raise ValueError(f"a label map holds class {largest}, but there are {K} classes")
    return overlaps(torch.from_numpy(truth[valid]), torch.from_numpy(pred[valid]), K, K)[:K].numpy()


def match_overlaps(overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Overlaps (K, P) of classes and proposals -> (K, 3) pixel counts TP, FP, FN of each class, and the class of each
    proposal, (P,) uint8, IGNORE where it got none.

    Classes and proposals are matched one to one so that the overlap is largest (Hungarian). Overlap with its match is a
    class's TP, its other pixels are FN, the match's other pixels FP; proposals without a class cost nothing.
    """
    K, P = overlap.shape
    counts = np.zeros((K, 3), np.int64)
    classes = np.full(P, IGNORE, np.uint8)
    counts[:, 2] = overlap.sum(1)
    ids = overlap.any(1).nonzero()[0]                    # of classes that occur,
    regions = overlap.any(0).nonzero()[0]                # and of proposals that lie on labelled pixels
    for i, j in zip(*linear_sum_assignment(overlap[ids][:, regions], maximize=True)):
        k = ids[i]
        p = regions[j]
        tp = overlap[k, p]
        if tp == 0:                                      # no match: which of such pairs is chosen means nothing
            continue
        counts[k] = tp, overlap[:, p].sum() - tp, overlap[k].sum() - tp
        classes[p] = k
    return counts, classes


def match_proposals(truth: np.ndarray, pred: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Unnamed regions against a label map, as DiffSeg scores them: (K, 3) pixel counts TP, FP, FN of each class, and
    `pred` with the classes that its regions were matched to, IGNORE where a region got none (match_overlaps).

    Pixels whose truth is IGNORE are left out of all counts.
    """
    overlap = overlaps(torch.from_numpy(truth), torch.from_numpy(pred), K, int(pred.max()) + 1)
    counts, classes = match_overlaps(overlap[:K].numpy())
    return counts, classes[pred]


def rates(tp, fp, fn):
    """mIoU and mACC (means over the classes that occur in the truth), pACC, and IoU per class; all in percent (Eq. 14).

    tp, fp, fn: (K,) pixel counts. A class that does not occur has IoU None.  ValueError: nothing was counted.
    """
    truth = (tp + fn).astype(float)
    if truth.sum() == 0:
        raise ValueError("no pixel was scored: nothing was counted")
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(truth > 0, 100 * tp / (tp + fp + fn), np.nan)                      # Eq. 14, (K,)
        acc = np.where(truth > 0, 100 * tp / truth, np.nan)                               # Eq. 14, (K,)
    return {"mIoU": float(np.nanmean(iou)), "mACC": float(np.nanmean(acc)), "pACC": float(100 * tp.sum() / truth.sum()),
            "IoU": [None if np.isnan(x) else float(x) for x in iou]}


def scores(conf: np.ndarray) -> dict:
    """`rates` of a confusion matrix (K, K)."""
    tp = np.diag(conf)
    return rates(tp, conf.sum(0) - tp, conf.sum(1) - tp)


def proposal_scores(counts):
    """`rates` of match_proposals' counts (K, 3)."""
    return rates(*counts.T)


BORDER = 0.02                           # width of a class's border, as a share of the picture's diagonal


def border(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask that are at most `width` from a pixel outside it, or from outside the picture, any way.

    Distances are those of a king on a chessboard, as `width` erosions by 3 x 3 give them.
    """
    inside = distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
    return mask & (inside <= width)


def border_counts(truth: np.ndarray, pred: np.ndarray, K: int) -> np.ndarray:
    """Boundary IoU (Cheng et al., CVPR 2021) of each class: pixels in both borders and in any, (K, 2).

    Pixels whose truth is IGNORE are left out of both.
    """
    height, width = truth.shape
    reach = max(1, round(BORDER * (height ** 2 + width ** 2) ** 0.5))
    valid = truth != IGNORE
    counts = np.zeros((K, 2), np.int64)
    for k in np.union1d(classes_in(truth), pred[valid]):
        a = border(truth == k, reach)
        b = border((pred == k) & valid, reach)
        counts[k] = (a & b).sum(), (a | b).sum()
    return counts


def border_iou(counts: np.ndarray, occurs: np.ndarray) -> float:
    """Mean over the classes that occur in the truth (K,) of border_counts (K, 2), in percent."""
    return float((100 * counts[occurs, 0] / counts[occurs, 1]).mean())


# ---------------------------------------------------------------------------- the three ways of scoring


class Scoring(NamedTuple):
    count: Callable                     # overlaps (K+1, P), class of each label (P,) -> counts of a picture
    score: Callable                     # counts, added up -> mIoU, mACC, pACC, IoU of each class
    shape: Callable                     # K -> shape of the counts
    parts: Callable                     # counts -> TP, FP, FN of each class, (K, 3)
    named: bool = True                  # labels stand for classes (Table 1), or for regions without a name (Table 2)
    borders: bool = False               # whether border_counts stand beside the counts


def count_named(overlap, classes):
    """The confusion matrix (K, K): a class that no label stands for is never predicted."""
    K = len(overlap) - 1
    conf = np.zeros((K, K), np.int64)
    conf[:, classes] = overlap[:K]
    return conf


def named_parts(counts):
    """A confusion matrix, and what may stand beside it, (K, K + ...) -> TP, FP, FN (K, 3)."""
    conf = counts[:, :len(counts)]                                           # (K, K)
    tp = conf.diagonal()                                                     # (K,)
    return np.stack([tp, conf.sum(0) - tp, conf.sum(1) - tp], axis=1)        # (K, 3)


def border_scores(counts):
    K = len(counts)
    s = scores(counts[:, :K])
    occurs = counts[:, :K].sum(1) > 0
    return s | {"boundary IoU": border_iou(counts[:, K:], occurs)}


def with_regions(counts, overlap):
    """Below the counts (K, 3) of a picture a row of its own: how many regions there are, scored or not, and 1 picture.

    -> (K+1, 3)
    """
    row = [overlap.any(0).sum(), 1, 0]
    return np.concatenate([counts, [row]])                                   # (K+1, 3)


def count_unnamed(overlap, classes):
    """match_overlaps' counts, with_regions.  What the labels stand for is not known to it."""
    counts, _ = match_overlaps(overlap[:-1])
    return with_regions(counts, overlap)


def unnamed_scores(counts):
    regions, pictures, _ = counts[-1]
    return proposal_scores(counts[:-1]) | {"regions": float(regions / pictures)}


# With names (Table 1) or without (Table 2): this is decided here, and nowhere else.
NAMED = Scoring(count_named, scores, lambda K: (K, K), named_parts)
BORDERS = Scoring(count_named, border_scores, lambda K: (K, K + 2), named_parts, borders=True)
UNNAMED = Scoring(count_unnamed, unnamed_scores, lambda K: (K + 1, 3), lambda counts: counts[:-1], named=False)


def table(rows):
    """mIoU, mACC, pACC, and what else a task measures, a row to a variant."""
    first = next(iter(rows.values()))
    columns = ["mIoU", "mACC", "pACC"] + [key for key in ("boundary IoU", "regions") if key in first]
    width = max(map(len, rows))
    lines = [f"{'':{width}s}" + "".join(f" {column:>6s}" for column in columns)]
    for name, row in rows.items():
        lines.append(f"{name:{width}s}" + "".join(f" {row[c]:{max(6, len(c))}.1f}" for c in columns))
    return "\n".join(lines)
