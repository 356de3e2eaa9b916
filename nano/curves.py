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
from support.cli import command  # noqa: E402


def measure(path: Path, limit: int) -> dict:
    """Samples seen by a snapshot and the mIoU of each of its blocks (Fig. 8) on scenes-dev."""
    miou, floor = block_scores(path, limit)
    samples = json.loads(weights.header(weights.find(path))["trained"])["samples"]
    return {"samples": samples, "mIoU": miou, "floor": floor}


def main(args: argparse.Namespace) -> None:
    """One run, or several that each went on from the last: samples are counted through, and blocks may have been added."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True, layout="constrained")
    before, points, edges = 0, [], []
    for run in args.run:
        if not (run / "mmdit.pt").exists():
            raise ValueError(f"{run} is not the folder of a run of pretrain.py: it holds no mmdit.pt")
        state, done_file = torch.load(run / "mmdit.pt", map_location="cpu", weights_only=True), run / "curves.json"
        done = json.loads(done_file.read_text()) if done_file.exists() else {}
        for path in sorted(run.glob("nano_*.safetensors")):
            if f"{path.name}/{args.limit}" not in done:
                done[f"{path.name}/{args.limit}"] = measure(path, args.limit)
                done_file.write_text(json.dumps(done))
        own = sorted((m for key, m in done.items() if key.endswith(f"/{args.limit}")), key=lambda m: m["samples"])
        points += [m | {"samples": m["samples"] + before} for m in own]
        left.plot([(n + before) / 1000 for n, _ in state["log"]], [loss for _, loss in state["log"]], lw=0.8, color="C0")
        before += state["samples"]
        edges.append(before)
    for m in points:
        print(f"{m['samples']:8d} samples  mIoU by block: " + " ".join(f"{x:5.1f}" for x in m["mIoU"]))
    if not points:
        raise ValueError(f"{args.run[0]} holds no snapshot nano_*.safetensors; pretrain.py writes them")
    for edge in edges[:-1]:
        depth = len(next((m for m in points if m["samples"] > edge), points[-1])["mIoU"])
        for ax in (left, right):
            ax.axvline(edge / 1000, color="grey", lw=0.8)
        left.text(edge / 1000, 0.97, f" on with\n {depth} blocks", va="top", fontsize=8)
    left.set(xlabel="samples seen [thousands]", ylabel="flow-matching loss (Eq. 2)", ylim=(0, 1), title="training loss")
    for i in range(max(len(m["mIoU"]) for m in points)):
        own = [m for m in points if i < len(m["mIoU"])]
        right.plot([m["samples"] / 1000 for m in own], [m["mIoU"][i] for m in own], "o-", ms=3, label=f"block {i}")
    right.axhline(points[-1]["floor"], color="black", ls=":", lw=1, label="floor")
    right.set(xlabel="samples seen [thousands]", ylabel="mIoU [%]", ylim=(0, None),
              title=f"segmentation, {args.limit} scenes of scenes-dev")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", default=[Path(__file__).parent / "run"],
                        help="its folder; several, in order, if a run went on from another (--init)")
    parser.add_argument("--limit", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    command(main, parser)
