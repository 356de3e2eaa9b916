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
import matplotlib.pyplot as plt                          # noqa: E402

import weights                                           # noqa: E402
from nano.pretrain import block_scores                   # noqa: E402


def measure(path: Path, limit: int) -> dict:
    """Samples seen by a snapshot and the mIoU of each of its blocks (Fig. 8) on scenes-dev."""
    miou, floor = block_scores(path, limit)
    samples = json.loads(weights.header(weights.find(path))["trained"])["samples"]
    return {"samples": samples, "mIoU": miou, "floor": floor}


def main(args: argparse.Namespace) -> None:
    done_file = args.run / "curves.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    for path in sorted(args.run.glob("nano_*.safetensors")):
        if f"{path.name}/{args.limit}" not in done:
            done[f"{path.name}/{args.limit}"] = measure(path, args.limit)
            done_file.write_text(json.dumps(done))
    points = sorted((m for key, m in done.items() if key.endswith(f"/{args.limit}")), key=lambda m: m["samples"])
    for m in points:
        print(f"{m['samples']:8d} samples  mIoU by block: " + " ".join(f"{x:5.1f}" for x in m["mIoU"]))
    if not points:
        sys.exit(f"error: no snapshot nano_*.safetensors in {args.run}; pretrain.py writes them")
    log = torch.load(args.run / "mmdit.pt", weights_only=True)["log"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([n / 1000 for n, _ in log], [loss for _, loss in log], lw=0.8)
    left.set(xlabel="samples seen [thousands]", ylabel="flow-matching loss (Eq. 2)", yscale="log", title="training loss")
    for i in range(len(points[0]["mIoU"])):
        right.plot([m["samples"] / 1000 for m in points], [m["mIoU"][i] for m in points], "o-", ms=3, label=f"block {i}")
    right.axhline(points[-1]["floor"], color="black", ls=":", lw=1, label="floor")
    right.set(xlabel="samples seen [thousands]", ylabel="mIoU [%]", ylim=(0, None),
              title=f"segmentation, {args.limit} scenes of scenes-dev")
    right.legend(fontsize=8)
    fig.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent / "run")
    parser.add_argument("--limit", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    main(parser.parse_args())
