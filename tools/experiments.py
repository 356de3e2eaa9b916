"""Are nano's pictures better?  Arms of generation on the same captions and noise, compared caption by caption.

    python tools/experiments.py blocks                   # Fig. 5, 6, 18: each block blurred throughout, and as guidance
    python tools/experiments.py guidance                 # Eq. 7, Fig. 6: the best of these, on other captions
    python tools/experiments.py magnet                   # Tables 3, 4: with MAGNET's LoRA against without

Each picture is generated once and kept (quality.py), so a killed experiment goes on where it stopped, and torchrun
shares the pictures out.  Captions are those of scenes-dev and of the scenes after it: the choice of blocks and its
check share no scene.  Each experiment writes EXPERIMENT.json, with every picture's scores, a plot and some pictures;
by another judge than nano's they are called EXPERIMENT-JUDGE.
"""
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from tqdm import tqdm

import quality  # noqa: E402
import seg4diff  # noqa: E402
from flux import Flux  # noqa: E402
from loading import Seg4Diff  # noqa: E402
from nano.judge import CaptionJudge  # noqa: E402
from quality import Arm, named  # noqa: E402
from support.cli import Parser, add_model_options, at_least, command, show  # noqa: E402
from support.effects import LEAST, Comparison, compare, holm, listed, mean_and_error, or_none  # noqa: E402
from support.files import decoding, open_stored, read_json, write_figure, write_json, write_picture  # noqa: E402
from support.ledger import world  # noqa: E402
from support.pictures import sheet  # noqa: E402

MOST = 40                               # arms of an experiment: more would take more than a night
LORA = Path(__file__).parent.parent / "nano/magnet.safetensors"


class Experiment(NamedTuple):
    title: str
    first: int                          # of its captions, counted from the first of scenes-dev
    captions: int                       # how many
    seeds: range
    pairs: list[tuple[Arm, Arm]]        # an arm, and what it is compared with

    @property
    def unchanged(self):
        """Names of the arms that nothing is done in, neither guidance nor blur."""
        return {base.name for _, base in self.pairs if base.pag == 0 and not base.perturb}

    @property
    def arms(self):
        """Each once, a base before what is compared with it."""
        arms = {}
        for arm, base in self.pairs:
            arms.setdefault(base.name, base)
            arms.setdefault(arm.name, arm)
        return list(arms.values())


# ---------------------------------------------------------------------------- experiments


def blocks(model: Seg4Diff, judge, out: Path) -> Experiment:
    """Every block: guidance by it at cfg 1 (Fig. 6), and its blur at cfg 1 and at the preset's cfg (Fig. 5, 18).

    The expert's blur is also compared with every other block's.
    """
    depth = range(model.transformer.config.depth)
    scales = [1.0]
    if model.preset.cfg != 1 and not isinstance(model.transformer, Flux):    # a Flux has more blocks: at most 20 arms
        scales.append(model.preset.cfg)
    pairs = [(named(1.0, 1.0, [block]), named(1.0)) for block in depth]
    pairs += [(named(cfg, perturb=[block]), named(cfg)) for cfg in scales for block in depth]
    expert = model.preset.block                          # is it the one that hurts most?
    pairs += [(named(cfg, perturb=[expert]), named(cfg, perturb=[block])) for cfg in scales for block in depth
              if block != expert]
    return Experiment("Each block as guidance (s) and blurred", 0, 128, range(1), pairs)


def stem_of(experiment: str, judge) -> str:
    """What an experiment's files are called: EXPERIMENT by nano's judge, else EXPERIMENT-JUDGE."""
    return experiment if judge.name == CaptionJudge.name else f"{experiment}-{judge.name}"


def best_blocks(path: Path, model: Seg4Diff, judge) -> tuple[list[int], int]:
    """The two blocks whose guidance raised the judge's last column most, and the expert; from how many captions.

    ValueError: that experiment is not there, or another model's or judge's, or of few captions.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}, which the blocks are chosen from; run the experiment blocks first")
    found = read_json(path)
    if found.get("model") != [model.name, model.fingerprint]:
        raise ValueError(f"{path} is of another model: {found.get('model')}")
    if found.get("judge") != [judge.name, judge.fingerprint]:
        raise ValueError(f"{path} is by another judge: {found.get('judge')}")
    with decoding(path, "result of the experiment blocks"):
        last = found["columns"][-1]
        guidance = [row for row in found["comparisons"] if row["column"] == last and found["arms"][row["arm"]]["pag"]]
        guidance.sort(key=lambda row: row["difference"], reverse=True)
        best = [found["arms"][row["arm"]]["blocks"][0] for row in guidance[:2]]
        chosen = list(dict.fromkeys([*best, model.preset.block]))            # once, if the expert is among the best
        captions = len(found["prompts"])
    if captions < LEAST:
        raise ValueError(f"too few captions to choose blocks by in {path}: {captions}; run the experiment blocks with "
                         f"{LEAST} or more")
    return chosen, captions


def guidance(model: Seg4Diff, judge, out: Path) -> Experiment:
    """Eq. 7 by the best blocks of `blocks` and by the expert, s 1 and 3, over scales of cfg; other captions.

    Guidance by the expert is also compared with that by the others.
    """
    chosen, n = best_blocks(out / f"{stem_of('blocks', judge)}.json", model, judge)
    scales = (1.0, 2.0) if isinstance(model.transformer, Flux) else (1.0, 1.5, 2.0, 3.0)
    pairs = []
    for cfg in scales:
        for block in chosen:
            pairs += [(named(cfg, pag, [block]), named(cfg)) for pag in (1.0, 3.0)]
    expert = model.preset.block                          # is it the one that helps most?
    for cfg in scales:
        for block in chosen:
            if block != expert:
                pairs += [(named(cfg, pag, [expert]), named(cfg, pag, [block])) for pag in (1.0, 3.0)]
    title = f"Guidance by a blurred branch (Eq. 7), blocks chosen on {n} other captions"
    return Experiment(title, 128, 256, range(1), pairs)


def magnet(model: Seg4Diff, judge, out: Path) -> Experiment:
    """MAGNET's LoRA against none, at cfg 1 and at the preset's, three seeds."""
    bases = [named(cfg) for cfg in dict.fromkeys([1.0, model.preset.cfg])]
    pairs = [(base._replace(name=f"{base.name}-MAGNET", lora=LORA), base) for base in bases]
    return Experiment("With MAGNET's LoRA", 128, 256, range(3), pairs)


EXPERIMENTS = {"blocks": blocks, "guidance": guidance, "magnet": magnet}

# ---------------------------------------------------------------------------- results


class Row(NamedTuple):
    """A line of the table: an arm against its base, in one column of the judge; their mean scores."""
    arm: str
    base: str
    column: str
    with_it: float
    without: float
    found: Comparison
    survives: bool = False              # Holm's correction over all lines


def rows_of(experiment: Experiment, scores: dict, columns: Sequence[str]) -> list[Row]:
    """All comparisons.  scores: arm's name -> column -> (prompts, seeds)."""
    rows = []
    for column in columns:
        for arm, base in experiment.pairs:
            x = scores[arm.name][column]
            y = scores[base.name][column]
            rows.append(Row(arm.name, base.name, column, mean_and_error(x)[0], mean_and_error(y)[0], compare(x, y)))
    survive = holm([row.found.p for row in rows])
    return [row._replace(survives=holds) for row, holds in zip(rows, survive)]


def entry(row: Row) -> dict:
    """A line for the JSON file."""
    numbers = {"with": row.with_it, "without": row.without, **row.found._asdict(), "could be seen": row.found.seen}
    return {"arm": row.arm, "base": row.base, "column": row.column, "verdict": row.found.verdict,
            "survives Holm": row.survives, **{key: or_none(x) for key, x in numbers.items()}}


def table(rows: list[Row]) -> str:
    """The lines, a column of the judge after the other."""
    width = max(len(name) for row in rows for name in (row.arm, row.base)) + 2
    title = f"{'arm':{width}s}{'against':{width}s}{'score':14s}{'n':>4s}{'without':>9s}{'with':>9s}{'difference':>12s}"
    lines = [f"{title}  95 % interval      verdict"]
    for row in rows:
        x = row.found
        lines.append(f"{row.arm:{width}s}{row.base:{width}s}{row.column:14s}{x.n:4d}{row.without:9.3f}{row.with_it:9.3f}"
                     f"{x.difference:+12.3f}  {x.interval:18s} {x.verdict}{' *' * row.survives}")
    return "\n".join(lines)


def readable(arm: str) -> str:
    """cfg1-s1-block5 -> cfg 1, s 1, guided by block 5"""
    words = {"cfg": "cfg ", "-s": ", s ", "-block": ", guided by block ", "-blurred": ", blurred block ", "-M": ", M"}
    for short, long in words.items():
        arm = arm.replace(short, long)
    return arm


COLOURS = {"better": "C2", "worse": "C3"}                # of what has a verdict


def plot(rows: list[Row], columns: Sequence[str], title: str, path: Path) -> None:
    """A panel for each column: every arm's difference to its base, with its interval; filled: it survives Holm."""
    arms = len(rows) // len(columns)
    width = 3 + 2 * len(columns)                         # inches
    fig = Figure((width, 1.9 + 0.24 * arms), dpi=90, layout="constrained")
    fig.suptitle("\n".join(textwrap.fill(line, 9 * width) for line in title.splitlines()))
    marks = [Line2D([], [], color=colour, marker="o", markerfacecolor="white", label=f"with it {word}")
             for word, colour in COLOURS.items()]
    marks.append(Line2D([], [], color="grey", marker="o", markerfacecolor="white", label="cannot be told"))
    marks.append(Line2D([], [], color="black", marker="o", linestyle="", label="filled: survives Holm's correction"))
    fig.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    for ax, column in zip(fig.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns):
        chosen = [row for row in rows if row.column == column]
        for y, row in enumerate(chosen):
            x = row.found
            colour = COLOURS.get(x.verdict, "grey")
            ax.plot([x.low, x.high], [y, y], color=colour)
            ax.plot(x.difference, y, "o", color=colour, markerfacecolor=colour if row.survives else "white")
        ax.axvline(0, color="black", lw=0.8)
        ax.set(title=column, xlabel="difference of the score", yticks=range(arms), ylim=(arms - 0.5, -0.5))
        ax.locator_params(axis="x", nbins=3)             # labels that do not overlap
        ax.set_yticklabels([readable(row.arm) for row in chosen])
    write_figure(path, fig)


def some_pictures(experiment: Experiment, columns: int, folder: Path) -> Image.Image:
    """A row for each arm, a column for each of the first captions."""
    images = []
    titles = []
    for arm in experiment.arms:
        for i in range(columns):
            images.append(open_stored(quality.path_of(folder / arm.name, i, experiment.seeds[0])))
            titles.append(arm.name)
    return sheet(images, titles, columns, side=128)


def run(experiment: Experiment, name: str, prompts: list[str], models: dict, judge, out: Path) -> None:
    """Generate what is missing, judge, compare; EXPERIMENT.json, a plot and a sheet, then the table."""
    start = time.time()
    model = models[None]
    scores = {}
    rank, _ = world()
    arms = {}                                            # what each of them is, for the JSON file
    for arm in tqdm(experiment.arms, desc=name, unit="arm", disable=True if rank > 0 else None):
        folder = out / name / arm.name
        quality.generate_missing(models[arm.lora], arm, prompts, experiment.seeds, folder)
        if rank == 0:
            scores[arm.name] = quality.judged(judge, prompts, experiment.seeds, folder)
            arms[arm.name] = arm.options | {"lora": None if arm.lora is None else arm.lora.name}
    if rank > 0:
        return
    rows = rows_of(experiment, scores, judge.columns)
    seeds = " ".join(map(str, experiment.seeds))
    what = f"{model.name}, {len(prompts)} captions, seeds {seeds}, judged by {judge.name}"
    stem = stem_of(name, judge)
    write_json(out / f"{stem}.json", {
        "experiment": experiment.title, "model": [model.name, model.fingerprint],
        "judge": [judge.name, judge.fingerprint], "columns": list(judge.columns), "prompts": prompts,
        "seeds": list(experiment.seeds), "arms": arms,
        "comparisons": [entry(row) for row in rows],
        "scores": {arm: {c: listed(x) for c, x in columns.items()} for arm, columns in scores.items()}})
    title = f"{experiment.title}: {what}\nDifference to the same captions and noise without it, and its 95 % interval"
    plot([row for row in rows if row.base in experiment.unchanged], judge.columns, title, out / f"{stem}.png")
    write_picture(out / f"{stem}_pictures.png", some_pictures(experiment, min(6, len(prompts)), out / name))
    show(f"{experiment.title}: {what}")
    show(table(rows))
    show(f"{len(rows)} comparisons; *: survives Holm's correction for so many. Interval: bootstrap over captions, a "
         "caption's seeds together. Could have been seen: 2.8 standard errors, 80 % power.")
    show(f"{time.time() - start:.0f} s; wrote {out}/{stem}.json, {stem}.png and {stem}_pictures.png")


def main(args):
    model = seg4diff.load(args.model, args.device, args.dtype)
    if not quality.toy(model):
        raise ValueError(f"the captions are the toy world's, which {args.model} does not draw; for other models: "
                         "python evaluate.py --task quality")
    out = args.out or Path("out") / f"experiments-{model.name}"
    judge = quality.pick_judge(args.judge, model, quality.captions(0, 1))
    experiment = EXPERIMENTS[args.experiment](model, judge, out)
    if len(experiment.arms) > MOST:
        raise ValueError(f"{len(experiment.arms)} arms are more than {MOST}: {args.model} has too many blocks for this")
    prompts = quality.captions(experiment.first, min(experiment.captions, args.limit or experiment.captions))
    loras = {arm.lora for arm in experiment.arms} - {None}
    models = {lora: seg4diff.load(args.model, args.device, args.dtype, lora=lora) for lora in loras} | {None: model}
    run(experiment, args.experiment, prompts, models, judge, out)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--limit", type=at_least(1), help="only so many captions; a larger limit keeps their pictures")
    parser.add_argument("--judge", help="nano, clip, a CLIP's folder, or own: the model's flow loss (default: nano)")
    parser.add_argument("--out", type=Path, help="folder for pictures and results (default: out/experiments-MODEL)")
    add_model_options(parser, lora=False, seed=False)
    command(main, parser)
