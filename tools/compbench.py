"""Table 4: pictures for T2I-CompBench++'s own evaluators, and a table of what these have found.

    python tools/compbench.py export color_val.txt --model sd3 --out out/compbench/color
    python tools/compbench.py table out/compbench        # when the evaluators have been through its folders

`export` makes ten pictures of each prompt of a category's *_val.txt, as OUT/samples/PROMPT_NNNNNN.png, the names that
the evaluators read prompts and order from.  Picture N is of prompt N // 10, and begins from noise seed + N.  `table`
reads the evaluators' files vqa_result.json in the folders of the eight categories, beside Table 4's numbers.
Names of folders and files are those of the evaluators' code (github.com/Karine-Huang/T2I-CompBench, read in 2026).
"""
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
from tqdm import tqdm

import seg4diff  # noqa: E402
from quality import Arm, claim, identity_of  # noqa: E402
from support.cli import Parser, add_model_options, at_least, command, show  # noqa: E402
from support.effects import mean_and_error  # noqa: E402
from support.files import check_kind, decoding, make_folder, read_json, read_text, write_picture  # noqa: E402
from support.ledger import wait_for_all, world  # noqa: E402

EACH = 10                               # pictures of a prompt; the evaluator of "complex" counts on it
LONGEST = 220                           # bytes of a file name: systems take 255, and we write beside it first

# ---------------------------------------------------------------------------- export


def read_prompts(path: Path) -> list[str]:
    """A category's prompts, one to a line, what follows a tab left out as the benchmark's own script does.

    ValueError: no prompt, or one that its picture cannot be named by: the evaluators read it up to the first "_".
    """
    prompts = [line.split("\t")[0].strip() for line in read_text(path).split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    for prompt in prompts:
        if any(sign in prompt for sign in ("_", "/", "\\", "\0")):
            raise ValueError(f"the prompt {prompt[:60]!r} holds '_' or '/': the evaluators read it from a file's name, "
                             "where these end it; write it in another way")
        if len(os.fsencode(picture_name(prompt, 0))) > LONGEST:
            raise ValueError(f"the prompt {prompt[:60]!r}... is too long for a file's name, from which the evaluators "
                             "read it; shorten it")
    return prompts


def picture_name(prompt: str, number: int) -> str:
    return f"{prompt}_{number:06d}.png"


def export(args):
    """Each picture is made once and alone, as quality.py does it, and torchrun shares them out."""
    prompts = read_prompts(args.prompts)
    model = seg4diff.load(args.model, args.device, args.dtype, lora=args.lora)
    arm = Arm("export", args.cfg, steps=args.steps)
    samples = args.out / "samples"
    claim(args.out, identity_of(model, arm, prompts) | {"seed": args.seed})
    make_folder(samples)
    names = [picture_name(prompts[number // EACH], number) for number in range(EACH * len(prompts))]
    rank, processes = world()
    mine = range(rank, len(names), processes)
    for number in tqdm(mine, desc="export", unit="picture", disable=True if rank > 0 else None):
        path = samples / names[number]
        if not path.exists():
            (image,) = seg4diff.generate(model, prompts[number // EACH], seed=args.seed + number, **arm.options)
            write_picture(path, image)
    wait_for_all()
    if rank > 0:
        return
    surplus = sorted(set(os.listdir(samples)) - set(names))
    if surplus:
        raise ValueError(f"{samples} holds what is no picture of these prompts, {surplus[0]!r} first; the evaluators "
                         "would count it, so take it away")
    show(f"{len(names)} pictures of {len(prompts)} prompts lie in {samples}")


# ---------------------------------------------------------------------------- table

# Column of Table 4 -> its category, as its *_val.txt is called, and the file below the category's folder that the
# evaluator which the benchmark recommends writes: BLIP-VQA; UniDet; CLIP's cosine (ViT-B/32); UniDet; 3-in-1.
COLUMNS = {
    "Color": ("color", "annotation_blip"), "Shape": ("shape", "annotation_blip"),
    "Texture": ("texture", "annotation_blip"), "2D": ("spatial", "labels/annotation_obj_detection_2d"),
    "3D": ("3d_spatial", "labels/annotation_obj_detection_3d"), "non": ("non_spatial", "annotation_clip"),
    "Num.": ("numeracy", "annotation_num"), "Comp.": ("complex", "annotation_3_in_1")}
RESULT = "vqa_result.json"
# Table 4 as the paper prints it; never ours.
PAPER = {"Baseline": (0.7864, 0.5644, 0.7200, 0.2435, 0.3318, 0.3124, 0.5566, 0.3719),
         "+ MAGNET, SA-1B": (0.7836, 0.5679, 0.7252, 0.2330, 0.3151, 0.3113, 0.5460, 0.3709),
         "+ MAGNET, COCO": (0.7919, 0.5687, 0.7260, 0.2301, 0.3234, 0.3120, 0.5584, 0.3735)}


def read_scores(path: Path) -> np.ndarray:
    """An evaluator's file, [{"question_id": 0, "answer": 0.7}, ...] in any order -> scores by number, (n,).

    An answer is a number, or (BLIP-VQA) a text that is one.  Broken: another file, numbers that are not 0 to n - 1.
    """
    found = read_json(path, list)
    with decoding(path, "list of scores"):
        scores = {}
        for row in found:
            check_kind(row, dict, "a row")
            scores[check_kind(row["question_id"], int, "question_id")] = float(row["answer"])
        if not scores or sorted(scores) != list(range(len(found))):
            raise ValueError(f"its {len(found)} rows are not numbered from 0, each number once")
        values = np.array([scores[number] for number in range(len(scores))])                 # (n,)
        if not np.isfinite(values).all():
            raise ValueError("a score is not finite")
        return values


def summary(scores: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error over prompts: the EACH pictures of one prompt are no independent draws.

    The error is nan where the pictures are not EACH of at least two prompts.
    """
    if len(scores) % EACH:
        return float(scores.mean()), math.nan
    mean, error, _ = mean_and_error(scores.reshape(-1, EACH))                # of (prompts, EACH)
    return mean, error


def table(args):
    results = {}
    for column, (category, folder) in COLUMNS.items():
        path = args.results / category / folder / RESULT
        if path.exists():
            scores = read_scores(path)
            mean, error = summary(scores)
            results[column] = {"mean": mean, "error": error, "pictures": len(scores)}
    if not results:
        category, folder = COLUMNS["Color"]
        raise ValueError(f"no results below {args.results}: {category}/{folder}/{RESULT} or that of another category "
                         f"should be there; the categories are {', '.join(name for name, _ in COLUMNS.values())}")
    rows = {f"{row}, the paper's": dict(zip(COLUMNS, values)) for row, values in PAPER.items()}
    rows[f"{args.results.resolve().name}, ours"] = {column: result["mean"] for column, result in results.items()}
    rows["  standard error"] = {column: result["error"] for column, result in results.items()}
    width = max(map(len, rows))
    show(f"{'Table 4':{width}s}" + "".join(f"{column:>9s}" for column in COLUMNS))
    for row, values in rows.items():
        cells = [f"{values[column]:.4f}" if column in values else "-" for column in COLUMNS]
        show(f"{row:{width}s}" + "".join(f"{cell:>9s}" for cell in cells))
    show("pictures: " + ", ".join(f"{column} {result['pictures']}" for column, result in results.items()))
    missing = [column for column in COLUMNS if column not in results]
    if missing:
        show(f"not evaluated: {', '.join(missing)}")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="export | table")
    exporter = commands.add_parser("export", help="pictures of a category's prompts")
    exporter.add_argument("prompts", type=Path, help="a *_val.txt of the benchmark, a prompt to a line")
    exporter.add_argument("--out", type=Path, required=True, help="the category's folder, for samples/")
    exporter.add_argument("--steps", type=at_least(1), help="Euler steps; the model's preset if not given")
    exporter.add_argument("--cfg", type=float, help="classifier-free guidance scale; the model's preset if not given")
    add_model_options(exporter, "sd3", "sd3")
    exporter.set_defaults(run=export)
    tabler = commands.add_parser("table", help="the evaluators' results beside Table 4")
    tabler.add_argument("results", type=Path, help="the folder that holds color/, shape/, ... as exported")
    tabler.set_defaults(run=table)
    command(lambda args: args.run(args), parser)
