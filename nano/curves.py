"""Learning curves of a pretraining run: training loss, and mIoU of every block at every snapshot.

    python nano/curves.py --limit 60            # reads nano/run, writes curves.json there and nano/curves.png

The masks of scenes-dev are used to look at the run, never to train it.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import protocol  # noqa: E402
from nano.pretrain import block_scores  # noqa: E402
from support import pictures, weights  # noqa: E402
from support.cli import Parser, at_least, command, show  # noqa: E402
from support.files import (  # noqa: E402
    check_kind,
    code_stamp,
    decoding,
    read_json,
    read_tensors,
    stamp,
    write_figure,
    write_json,
)


def history(run: Path) -> tuple[int, list[tuple[int, float]]]:
    """Samples that a run has seen, and its log of (samples, loss).  ValueError: no run; its mmdit.pt is broken."""
    path = run / "mmdit.pt"
    if not path.exists():
        raise ValueError(f"{run} is not the folder of a run of pretrain.py: it holds no mmdit.pt")
    state = read_tensors(path, "state of a training")
    with decoding(path, "state of a training"):
        check_kind(state, dict, "its content")
        for samples, loss in check_kind(state["log"], list, "log"):
            check_kind(samples, int, "a number of samples")
            check_kind(loss, float, "a loss")
        return check_kind(state["samples"], int, "samples"), state["log"]


def samples_of(file: Path) -> int:
    """Samples that a snapshot has seen.  Broken: it is no snapshot of pretrain.py."""
    header = weights.header(weights.find(file))
    with decoding(file, "snapshot of pretrain.py"):
        return check_kind(check_kind(json.loads(header["trained"]), dict, "trained")["samples"], int, "samples")


def measured_before(path: Path) -> dict[str, dict]:
    """What a run's curves.json holds, nothing if there is none.  Broken: something else."""
    if not path.exists():
        return {}
    measured = read_json(path)
    with decoding(path, "list of what was measured"):
        for point in measured.values():
            check_kind(check_kind(point, dict, "a point")["samples"], int, "samples")
            for score in [point["floor"], *check_kind(point["mIoU"], list, "mIoU")]:
                check_kind(score, float, "a score")
    return measured


def snapshots(run: Path, limit: int) -> list[dict]:
    """{"samples" seen, "mIoU" of each block (Fig. 8), "floor"} of a run's snapshots on `limit` scenes of scenes-dev.

    What was measured is kept in the run's curves.json.  Broken: this, or a snapshot.
    """
    path = run / "curves.json"
    measured = measured_before(path)
    for file in sorted(run.glob("nano_*.safetensors")):
        key = f"{file.name}/{limit}"
        made_of = f"{stamp([file])} {code_stamp(protocol.CODE)}"
        if measured.get(key, {}).get("stamp") != made_of:
            samples = samples_of(file)
            miou, floor = block_scores(file, limit)
            measured[key] = {"samples": samples, "mIoU": miou, "floor": floor, "stamp": made_of}
            write_json(path, measured)
    points = [point for key, point in measured.items() if key.endswith(f"/{limit}")]
    return sorted(points, key=lambda point: point["samples"])


def main(args: argparse.Namespace) -> None:
    """One run, or several that each went on from the last: samples are counted through, and blocks may be added."""
    pictures.check_out(args.out)
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out} should end in .png")
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True, layout="constrained")
    before = 0                                           # samples of earlier runs
    points = []
    for run in args.run:
        seen, log = history(run)
        added = snapshots(run, args.limit)
        if before:
            for ax in (left, right):
                ax.axvline(before / 1000, color="grey", lw=0.8)
        if before and added:
            left.text(before / 1000, 0.97, f" on with\n {len(added[0]['mIoU'])} blocks", va="top", fontsize=8)
        for point in added:
            points.append(point | {"samples": before + point["samples"]})
            numbers = " ".join(f"{x:5.1f}" for x in point["mIoU"])
            show(f"{points[-1]['samples']:8d} samples  mIoU by block: {numbers}")
        left.plot([(before + n) / 1000 for n, _ in log], [loss for _, loss in log], lw=0.8, color="C0")
        before += seen
    if not points:
        raise ValueError(f"{args.run[0]} holds no snapshot nano_*.safetensors; pretrain.py writes them")
    left.set(xlabel="samples seen [thousands]", ylabel="flow-matching loss (Eq. 2)", ylim=(0, 1), title="training loss")
    for i in range(max(len(point["mIoU"]) for point in points)):
        deep = [point for point in points if i < len(point["mIoU"])]
        right.plot([point["samples"] / 1000 for point in deep], [point["mIoU"][i] for point in deep], "o-", ms=3,
                   label=f"block {i}")
    right.axhline(points[-1]["floor"], color="black", ls=":", lw=1, label="floor")
    right.set(xlabel="samples seen [thousands]", ylabel="mIoU [%]", ylim=(0, None),
              title=f"segmentation, {args.limit} scenes of scenes-dev")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    write_figure(args.out, fig, dpi=100)
    show(f"wrote {args.out}")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, nargs="+", default=[Path(__file__).parent / "run"],
                        help="its folder; several, in order, if a run went on from another (--init)")
    parser.add_argument("--limit", type=at_least(1), default=60, help="scenes to measure on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    command(main, parser)
