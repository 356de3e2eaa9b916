"""How a label map is scored (A.4): with names by a confusion matrix, without by matching regions to classes."""
import numpy as np
from scipy.ndimage import distance_transform_cdt
from scipy.optimize import linear_sum_assignment

IGNORE = 255                            # label of pixels that belong to no class and are never scored


def classes_in(labels):
    """The classes of a label map, in order, without IGNORE: (K,) of the map's dtype."""
    return np.setdiff1d(labels, [IGNORE])


def confusion(truth: np.ndarray, pred: np.ndarray, K: int) -> np.ndarray:
    """Pixel counts (K, K), rows the truth, columns the prediction; pixels whose truth is IGNORE are left out."""
    valid = truth != IGNORE
    largest = max(truth[valid].max(initial=0), pred[valid].max(initial=0))
    if largest >= K:
        raise ValueError(f"a label map holds class {largest}, but there are {K} classes")
    pairs = truth[valid].astype(np.int64) * K + pred[valid]
    return np.bincount(pairs, minlength=K * K).reshape(K, K)


def match_proposals(truth: np.ndarray, pred: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Unnamed regions against a label map, as DiffSeg scores them: (K, 3) pixel counts TP, FP, FN of each class, and
    `pred` with the classes that its regions were matched to, IGNORE where a region got none.

    Classes and proposals are matched one to one so that the overlap is largest (Hungarian). Overlap with its match is a
    class's TP, its other pixels are FN, the match's other pixels FP; proposals without a class cost nothing.
    Pixels whose truth is IGNORE are left out of all counts.
    """
    valid = truth != IGNORE
    counts = np.zeros((K, 3), np.int64)
    named = np.full(truth.shape, IGNORE, np.uint8)
    ids, rows = np.unique(truth[valid], return_inverse=True)
    regions, columns = np.unique(pred[valid], return_inverse=True)
    overlap = np.zeros((len(ids), len(regions)), np.int64)
    np.add.at(overlap, (rows, columns), 1)
    counts[ids, 2] = overlap.sum(1)
    for i, j in zip(*linear_sum_assignment(overlap, maximize=True)):
        if overlap[i, j] == 0:                           # no match: which of such pairs is chosen means nothing
            continue
        counts[ids[i]] = overlap[i, j], overlap[:, j].sum() - overlap[i, j], overlap[i].sum() - overlap[i, j]
        named[pred == regions[j]] = ids[i]
    return counts, named


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


def table(rows):
    """mIoU, mACC, pACC, and what else a task measures, a row to a variant."""
    first = next(iter(rows.values()))
    columns = ["mIoU", "mACC", "pACC"] + [key for key in ("boundary IoU", "regions") if key in first]
    width = max(map(len, rows))
    lines = [f"{'':{width}s}" + "".join(f" {column:>6s}" for column in columns)]
    for name, row in rows.items():
        lines.append(f"{name:{width}s}" + "".join(f" {row[c]:{max(6, len(c))}.1f}" for c in columns))
    return "\n".join(lines)
