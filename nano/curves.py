"""Learning curves of a pretraining run: training loss, and mIoU of every block at every snapshot.

    python nano/curves.py --limit 60            # reads nano/run, writes curves.json there and nano/curves.png

The masks of scenes-dev are used to look at the run, never to train it.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from nano.pretrain import block_scores  # noqa: E402
from support import weights  # noqa: E402
from support.cli import Parser, at_least, command  # noqa: E402


def snapshots(run: Path, limit: int) -> list[dict]:
    """{"samples" seen, "mIoU" of each block (Fig. 8), "floor"} of a run's snapshots on `limit` scenes of scenes-dev.

    What was measured is kept in the run's curves.json.
    """
    path = run / "curves.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    for file in sorted(run.glob("nano_*.safetensors")):
        key = f"{file.name}/{limit}"
        if key not in measured:
            miou, floor = block_scores(file, limit)
            samples = json.loads(weights.header(weights.find(file))["trained"])["samples"]
            measured[key] = {"samples": samples, "mIoU": miou, "floor": floor}
            path.write_text(json.dumps(measured))
    points = [point for key, point in measured.items() if key.endswith(f"/{limit}")]
    return sorted(points, key=lambda point: point["samples"])


def main(args: argparse.Namespace) -> None:
    """One run, or several that each went on from the last: samples are counted through, and blocks may be added."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True, layout="constrained")
    before = 0                                           # samples of earlier runs
    points = []
    for run in args.run:
        if not (run / "mmdit.pt").exists():
            raise ValueError(f"{run} is not the folder of a run of pretrain.py: it holds no mmdit.pt")
        state = torch.load(run / "mmdit.pt", map_location="cpu", weights_only=True)
        added = snapshots(run, args.limit)
        if before:
            for ax in (left, right):
                ax.axvline(before / 1000, color="grey", lw=0.8)
        if before and added:
            left.text(before / 1000, 0.97, f" on with\n {len(added[0]['mIoU'])} blocks", va="top", fontsize=8)
        for point in added:
            points.append(point | {"samples": before + point["samples"]})
            numbers = " ".join(f"{x:5.1f}" for x in point["mIoU"])
            print(f"{points[-1]['samples']:8d} samples  mIoU by block: {numbers}")
        samples, losses = zip(*state["log"]) if state["log"] else ([], [])
        left.plot([(before + n) / 1000 for n in samples], losses, lw=0.8, color="C0")
        before += state["samples"]
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
    fig.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, nargs="+", default=[Path(__file__).parent / "run"],
                        help="its folder; several, in order, if a run went on from another (--init)")
    parser.add_argument("--limit", type=at_least(1), default=60, help="scenes to measure on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    command(main, parser)
