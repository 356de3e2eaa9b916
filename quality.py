"""Generated pictures, counted (Sec. 4.3, Tables 3 and 4): each is generated once, kept, judged, and arms are compared.

    python evaluate.py --task quality                                # nano on captions of its world, by its own judge
    python evaluate.py --task quality --prompts coco --model sd3 --images 5000       # Table 3, COCO, by CLIP
    python evaluate.py --task quality --prompts pick.txt --model sd3 --images 500 --seeds 5

An arm is one way to generate.  All arms draw a prompt from the same noise, so that their difference is taken prompt by
prompt; tools/experiments.py does so for nano.

A judge is any object with `name`, `fingerprint` (which changes with its weights), the names of its `columns`, and
`score(images, prompts)` -> {column: (n,)} for n pictures and their prompts, nan where a prompt asks for nothing.  There
are three: OwnJudge below, nano.judge.CaptionJudge and judges.ClipScore.
"""
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import analysis
import seg4diff
from judges import load_judge
from loading import Preset, Seg4Diff, image_seed
from nano import scenes
from nano.judge import CaptionJudge, claims
from support.cli import progress, show
from support.data import DATASETS, first_captions, need
from support.effects import compare, listed, mean_and_error, or_none
from support.files import (
    Broken,
    check_kind,
    code_stamp,
    decoding,
    make_folder,
    open_stored,
    read_json,
    read_text,
    write_json,
    write_picture,
)
from support.ledger import wait_for_all, world
from support.pictures import sheet
from support.report import beside_table_3

# What a picture depends on. When one of these files changes, kept pictures are refused.
CODE = ("sampling.py", "loading.py", "mmdit.py", "flux.py", "vae.py", "text.py", "t5.py", "lora.py",
        "support/checkpoint.py", "support/weights.py", "support/files.py", "support/pictures.py", "support/metrics.py")

# ---------------------------------------------------------------------------- pictures, each generated once


class Arm(NamedTuple):
    """One way to generate: options of sampling.generate, and a LoRA in the model's weights."""
    name: str
    cfg: float | None = None            # the preset's if None
    pag: float = 0.0                    # scale s of Eq. 7
    blocks: tuple[int, ...] | None = None                # of Eq. 7; the expert block if None
    perturb: tuple[int, ...] = ()
    steps: int | None = None            # the preset's if None
    lora: Path | None = None

    @property
    def options(self):
        """What `generate` is told."""
        options = self._asdict()
        del options["name"], options["lora"]
        return options


def named(cfg: float, pag: float = 0.0, blocks: Sequence[int] = (), perturb: Sequence[int] = ()) -> Arm:
    """An arm whose name, which is a folder's name, too, tells its options: cfg3-s1-block5."""
    name = f"cfg{cfg:g}"
    if pag != 0:
        name += f"-s{pag:g}-block" + "+".join(map(str, blocks))
    if perturb:
        name += "-blurred" + "+".join(map(str, perturb))
    return Arm(name, cfg, pag, tuple(blocks) or None, tuple(perturb))


def identity_of(model: Seg4Diff, arm: Arm, prompts: Sequence[str]) -> dict:
    """All that the pictures of an arm depend on, beside the seeds in their names; options as `generate` resolves them.

    The model's fingerprint knows the LoRA.
    """
    preset = model.preset.changed(steps=arm.steps, cfg=arm.cfg, noise_steps=0)
    blocks = None
    if arm.pag != 0:
        blocks = list(arm.blocks or [preset.block])
    return {"model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype),
            "device": model.device.type, "steps": preset.steps, "cfg": preset.cfg, "pag": arm.pag, "blocks": blocks,
            "perturb": list(arm.perturb), "code": code_stamp(CODE), "prompts": list(prompts)}


def claim(folder: Path, identity: dict) -> None:
    """Write into a folder what its pictures are made of, or see that they are made of the same.

    More prompts, or fewer of the same ones, are no change.  ValueError: another arm's pictures are there.
    """
    path = folder / "identity.json"
    make_folder(folder)
    if not any(folder.rglob("*_*.png")):                 # nothing can be mixed up, whatever was begun here
        write_json(path, identity)
        return
    if not path.exists():
        raise ValueError(f"{folder} holds pictures without the identity.json that says how they were made; name "
                         "another --out, or remove it")
    saved = read_json(path)
    with decoding(path, "list of what pictures were made of"):
        kept = check_kind(saved["prompts"], list, "its prompts")
    changed = [f"{key} {saved.get(key)} instead of {value}" for key, value in identity.items()
               if key != "prompts" and saved.get(key) != value]
    given = identity["prompts"]
    shared = min(len(kept), len(given))
    if kept[:shared] != given[:shared]:
        changed.append("other prompts")
    if changed:
        raise ValueError(f"{folder} holds pictures with {'; '.join(changed)}; name another --out, or remove it")
    if len(given) > len(kept):
        write_json(path, identity)


def draw(model: Seg4Diff, arm: Arm, prompt: str, i: int, seed: int) -> Image.Image:
    """Prompt i's picture of a seed: from the same noise in every arm, for any number of prompts or processes.

    It is drawn alone: beside others in a batch, sums are rounded differently, and some pixels differ by a grey level.
    """
    (image,) = seg4diff.generate(model, prompt, seed=image_seed(str(i), seed), **arm.options)
    return image


def path_of(folder: Path, i: int, seed: int) -> Path:
    return folder / f"{i:05d}_{seed}.png"


def generate_missing(model: Seg4Diff, arm: Arm, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """The pictures of all prompts and seeds that a folder lacks, shared out over the processes of torchrun.

    ValueError: the folder holds another arm's pictures (claim); options out of range (generate).
    """
    claim(folder, identity_of(model, arm, prompts))
    rank, processes = world()
    places = [(i, seed) for seed in seeds for i in range(len(prompts))]
    mine = places[rank::processes]                       # before any is left out, or two processes share differently
    todo = [(i, seed) for i, seed in mine if not path_of(folder, i, seed).exists()]
    with progress(arm.name, "picture", len(mine), len(mine) - len(todo), silent=rank > 0) as bar:
        for i, seed in todo:
            write_picture(path_of(folder, i, seed), draw(model, arm, prompts[i], i, seed))
            bar.update()
    wait_for_all()


# ---------------------------------------------------------------------------- judges

JUDGED = 32                             # pictures in memory at once


class OwnJudge:
    """How much of a picture's flow loss its caption saves, by the very model (analysis.caption_losses), in percent.

    It needs no other network, so it works for every model; but it is not independent of what it judges.
    """
    name = "own"
    columns = ("loss saved",)

    def __init__(self, model: Seg4Diff):
        self.model = model
        self.fingerprint = model.fingerprint

    def score(self, images, prompts):
        candidates = [[prompt, ""] for prompt in prompts]
        seeds = [image_seed(prompt, 0) for prompt in prompts]                # the same wherever a picture stands
        losses = analysis.caption_losses(self.model, images, candidates, seeds=seeds)        # (n, 2)
        return {"loss saved": analysis.loss_saved(losses, 0, 1)}


def toy(model):
    """Whether a model makes pictures of the toy world's size: nano, or one that was trained like it."""
    return model.preset.size == scenes.SIDE


def pick_judge(name: str | None, model: Seg4Diff, prompts: Sequence[str]):
    """"own", "nano", "clip" or a folder with a CLIP; None: nano's for pictures of the toy world, else CLIP.

    ValueError: it is not there; nano's knows the toy world's pictures and captions alone.
    """
    if name is None:
        name = "nano" if toy(model) else "clip"
    if name == "own":
        return OwnJudge(model)
    if name == "nano":
        if not toy(model):
            raise ValueError(f"nano's judge looks at pictures of {scenes.SIDE} pixels, and {model.name} makes them of "
                             f"{model.preset.size}; --judge clip looks at all")
        for prompt in prompts:
            claims(prompt)                               # ValueError before the work: it is no caption of nano's
        return CaptionJudge()
    return load_judge(name, model.device)


def kept(path: Path) -> Image.Image:
    """A picture that lies there.  files.Broken: it is damaged."""
    try:
        return open_stored(path)
    except Broken as e:
        raise Broken(f"{e}; remove it, and it is drawn anew") from None


def judged(judge, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> dict[str, np.ndarray]:
    """The scores of the kept pictures: for each column of the judge (prompts, seeds).  files.Broken: one is damaged."""
    columns = {column: [] for column in judge.columns}
    places = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    for start in range(0, len(places), JUDGED):
        part = places[start:start + JUDGED]
        images = [kept(path_of(folder, i, seed)) for i, seed in part]
        scores = judge.score(images, [prompts[i] for i, _ in part])
        for column in judge.columns:
            columns[column] += list(scores[column])
    return {column: np.reshape(x, (len(prompts), len(seeds))).astype(float) for column, x in columns.items()}


# ---------------------------------------------------------------------------- prompts


def captions(first: int, count: int) -> list[str]:
    """Captions of the toy world from scene `first` of scenes-dev on and of the scenes after it, up to the last."""
    start = int(DATASETS["scenes-dev"]().names[0]) + first                   # a scene's name is its seed
    seeds = range(start, min(start + count, scenes.VAL_SEEDS.stop))
    return [scenes.caption(scenes.draw(seed), np.random.default_rng(seed)) for seed in seeds]


def coco_captions(root: Path) -> list[str]:
    """The first caption of each picture of COCO's val2017, in the file's order.  ValueError: the file is not there."""
    path = need("captions of COCO", root, "coco/annotations", "captions_val2017.json") / "captions_val2017.json"
    content = read_json(path)
    with decoding(path, "file of COCO's captions"):
        return list(first_captions(content).values())


def prompts_of(source: str, count: int, root: Path) -> list[str]:
    """`count` prompts of "scenes-dev", "coco" or a file with a prompt to a line.  ValueError: there are not so many."""
    if source == "scenes-dev":
        found = captions(0, count)
    elif source == "coco":
        found = coco_captions(root)
    else:
        found = [line.strip() for line in read_text(source).split("\n") if line.strip()]
    if len(found) < count:
        raise ValueError(f"{source} holds {len(found)} prompts, not {count}; choose fewer with --images")
    return found[:count]


# ---------------------------------------------------------------------------- evaluate.py --task quality

# Options of segmentation, which generation does not read, and evaluate.py's defaults
NOT_READ = {"dataset": "scenes", "limit": None, "prompt": "present", "resize": "squash", "draws": 1, "reading": None,
            "regions": None, "threshold": None, "scaling": None, "batch_size": None, "protocol": "ours",
            "control": "none"}


def arm_of(args, preset: Preset) -> Arm:
    """The arm that the command line asks for.  ValueError: blocks without the guidance that they are of."""
    if args.blocks and not args.pag:
        raise ValueError("--blocks are those of the perturbed guidance, whose scale is 0; give --pag")
    cfg = preset.cfg if args.cfg is None else args.cfg
    if not args.pag:
        return named(cfg, perturb=args.perturb or ())
    return named(cfg, args.pag, args.blocks or [preset.block], args.perturb or ())


def main(args) -> None:
    """The command.  ValueError: options of another task, or out of range."""
    for name, default in NOT_READ.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} belongs to segmentation; --task quality draws --prompts")
    Preset().changed(cfg=args.cfg)                       # ValueError before the model is loaded
    start = time.time()
    world()                                              # what is wrong with it is said before the work
    name = args.model
    if name is None:
        name = "nano" if args.prompts in (None, "scenes-dev") else "sd3"
    model = seg4diff.load(name, args.device, args.dtype, lora=args.lora)
    arm = arm_of(args, model.preset)
    source = args.prompts
    if source is None:
        source = "scenes-dev" if toy(model) else "coco"
    prompts = prompts_of(source, args.images or 100, args.data_root)
    judge = pick_judge(args.judge, model, prompts)       # one that is missing is named before the work
    run(args, model, arm, source, prompts, judge, start)


def run(args, model: Seg4Diff, arm: Arm, source: str, prompts: list[str], judge, start: float) -> None:
    """Pictures that are missing are generated, all are judged; results.json and sheet.png, then what is printed."""
    seeds = range(args.seed, args.seed + (args.seeds or 1))
    compared = {"prompts": prompts, "seeds": list(seeds), "judge": [judge.name, judge.fingerprint]}
    base = {} if args.against is None else scores_of(args.against, compared, judge.columns)
    folder = (args.out or Path("out") / f"quality-{Path(source).stem}-{model.name}") / arm.name
    generate_missing(model, arm, prompts, seeds, folder)
    if world()[0] > 0:
        return
    scores = judged(judge, prompts, seeds, folder)
    means = {column: mean_and_error(x) for column, x in scores.items()}
    facts = {"task": "quality", "prompts": f"{len(prompts)} of {Path(source).name}",
             "seeds": " ".join(map(str, seeds)), "model": f"{model.name} ({model.fingerprint})", "arm": arm.name,
             "judge": f"{judge.name} ({judge.fingerprint})"}
    rows = {column: {"mean": or_none(mean), "error": or_none(error), "prompts": n}
            for column, (mean, error, n) in means.items()}
    seconds = time.time() - start
    write_json(folder / "results.json", {
        "facts": facts, "arguments": {k: str(v) for k, v in vars(args).items()}, "options": arm.options,
        "rows": rows, "seconds": seconds, **compared,
        "scores": {column: listed(x) for column, x in scores.items()}})
    write_sheet(folder / "sheet.png", folder, prompts, seeds[0])
    print_table(facts, means)
    for column, x in base.items():
        found = compare(scores[column], x)
        show(f"{column}, against {args.against}: {found.difference:+.3f} (95 % interval: {found.interval}), "
             f"{found.verdict}")
    if "CLIPScore" in scores:
        show(beside_table_3(f"{model.name}, ours", Path(source).name, means["CLIPScore"][0]))
    show(f"{seconds:.0f} s; wrote {folder}/results.json and sheet.png")


def scores_of(path: Path, compared: dict, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores, (prompts, seeds) for each column, of another run's results.json.  files.Broken: not comparable."""
    found = read_json(path)
    shape = (len(compared["prompts"]), len(compared["seeds"]))
    scores = {}
    with decoding(path, "result of --task quality to compare with"):
        for key, value in compared.items():
            if found[key] != value:
                raise ValueError(f"its {key!r} is {found[key]!s:.60}, this run's is {value!s:.60}")
        for column in columns:
            x = np.array(found["scores"][column], float)                     # (prompts, seeds); None becomes nan
            if x.shape != shape or np.isinf(x).any():
                raise ValueError(f"its scores of {column!r} are not {shape[0]} x {shape[1]} finite numbers")
            scores[column] = x
    return scores


def print_table(facts: dict, means: dict[str, tuple[float, float, int]]) -> None:
    for fact, value in facts.items():
        show(f"{fact + ':':9s}{value}")
    show(f"{'':14s}{'mean':>9s}{'error':>9s}{'prompts':>9s}")
    for column, (mean, error, n) in means.items():
        show(f"{column:14s}{mean:9.4f}{error:9.4f}{n:9d}")
    show("error: standard error over the prompts; the seeds of a prompt are averaged first")


def write_sheet(path: Path, folder: Path, prompts: Sequence[str], seed: int) -> None:
    """The first twelve pictures of a folder, with their prompts."""
    prompts = list(prompts[:12])
    images = [kept(path_of(folder, i, seed)) for i in range(len(prompts))]
    write_picture(path, sheet(images, prompts, side=256))


# ---------------------------------------------------------------------------- Fig. 13, 33


def compare_lora(model: Seg4Diff, prompts: Sequence[str], out: Path, base: Seg4Diff) -> dict:
    """Fig. 13, 33: pictures from the same noise without a LoRA (base) and with it, of twelve prompts at most.

    Writes compare.png into `out`; returns the numbers of compare.json.
    """
    prompts = list(prompts[:12])
    pairs = []
    titles = []
    changes = []
    for i, prompt in enumerate(tqdm(prompts, desc="compare", unit="prompt")):
        without = draw(base, Arm("without"), prompt, i, 0)
        with_lora = draw(model, Arm("with"), prompt, i, 0)
        pairs += [without, with_lora]
        titles += [f"without: {prompt}", "with, from the same noise"]
        changes.append(np.abs(np.asarray(without, float) - np.asarray(with_lora, float)).mean())
    write_picture(out / "compare.png", sheet(pairs, titles, columns=4, side=256))
    return {"prompts": len(prompts), "change of generated pictures [grey levels of 255]": float(np.mean(changes))}
