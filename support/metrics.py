"""How a label map is scored (A.4): with names by a confusion matrix, without by matching regions to classes."""
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IGNORE = 255                            # label of pixels that belong to no class and are never scored


def classes_in(labels):
    """The classes of a label map, in order, without IGNORE: (K,) of the map's dtype."""
    return np.setdiff1d(labels, [IGNORE])


def overlaps(truth: Tensor, labels: Tensor, K: int, P: int) -> Tensor:
    """How many pixels of each class (K) have each label (P): (K, P), counted on the device where both maps are.

    truth: classes, or IGNORE for a pixel that is left out; labels: 0 to P-1, of truth's shape.
    """
    pairs = torch.where(truth == IGNORE, K * P, truth.long() * P + labels)   # K*P: the bin of what is left out
    return torch.bincount(pairs.flatten(), minlength=K * P + 1)[:K * P].view(K, P)           # (K, P)


def confusion(truth: np.ndarray, pred: np.ndarray, K: int) -> np.ndarray:
    """Pixel counts (K, K), rows the truth, columns the prediction; pixels whose truth is IGNORE are left out."""
    valid = truth != IGNORE
    largest = max(truth[valid].max(initial=0), pred[valid].max(initial=0))
    if largest >= K:
        raise ValueError(f"a label map holds class {largest}, but there are {K} classes")
    return overlaps(torch.from_numpy(truth[valid]), torch.from_numpy(pred[valid]), K, K).numpy()


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
    counts, classes = match_overlaps(overlap.numpy())
    return counts, classes[pred]


def rates(tp, fp, fn):
    """mIoU and mACC (means over the classes that occur in the truth), pACC, and IoU per class; all in percent.

    tp, fp, fn: (K,) pixel counts. A class that does not occur has IoU None.  ValueError: nothing was counted.
    """
    truth = (tp + fn).astype(float)
    if truth.sum() == 0:
        raise ValueError("no pixel was scored: nothing was counted")
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(truth > 0, 100 * tp / (tp + fp + fn), np.nan)
        acc = np.where(truth > 0, 100 * tp / truth, np.nan)
    return {"mIoU": float(np.nanmean(iou)), "mACC": float(np.nanmean(acc)), "pACC": float(100 * tp.sum() / truth.sum()),
            "IoU": [None if np.isnan(x) else float(x) for x in iou]}


def scores(conf: np.ndarray) -> dict:
    """`rates` of a confusion matrix (K, K)."""
    tp = np.diag(conf)
    return rates(tp, conf.sum(0) - tp, conf.sum(1) - tp)


def proposal_scores(counts):
    """`rates` of match_proposals' counts (K, 3)."""
    return rates(*counts.T)


def table(rows):
    """mIoU, mACC, pACC, a row to a variant."""
    width = max(map(len, rows))
    lines = [f"{'':{width}s}   mIoU   mACC   pACC"]
    lines += [f"{name:{width}s} {r['mIoU']:6.1f} {r['mACC']:6.1f} {r['pACC']:6.1f}" for name, r in rows.items()]
    return "\n".join(lines)
