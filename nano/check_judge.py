"""How far the judge of nano's pictures can be trusted: `python nano/judge.py --check` prints what nano/judge.md tells.

Three ways.  Drawn scenes that it was not trained on: are its answers right?  Captions: does it tell a scene's own from
another's, and from one with a single change?  Generated pictures: does it agree with nano/judged.csv, which was
judged by eye before?
"""
import csv
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import seg4diff
from nano import scenes
from nano.judge import COLUMNS, THERE, Claim, Judge, Seen, claims, holding, look, truth, verdict
from nano.scenes import COLOURS, STUFF, THINGS, VAL_SEEDS, Scene
from support.cli import show
from support.files import decoding
from support.pictures import to_image

LIST = Path(__file__).with_name("judged.csv")
HELD_OUT = VAL_SEEDS[1000:2000]         # neither scenes nor scenes-dev, and never trained on


def interval(right: int, n: int) -> str:
    """A share in per cent with its 95 % interval (Wilson's), as if all answers were independent.

    Several answers about one picture are not quite, so that the true interval is somewhat wider.
    """
    z = 1.96
    centre = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return f"{100 * right / n:5.1f} % ({100 * (centre - half):.1f} to {100 * (centre + half):.1f}), n = {n}"


def kappa(a: list[bool], b: list[bool]) -> float:
    """Cohen's kappa of two judges: their agreement beyond chance, 1 if perfect; NaN where both always say the same."""
    agree = np.mean(np.equal(a, b))
    chance = np.mean(a) * np.mean(b) + (1 - np.mean(a)) * (1 - np.mean(b))
    return (agree - chance) / (1 - chance) if chance < 1 else math.nan


def facts_right(seen: Seen, true: Seen) -> dict[str, list[bool]]:
    """Which answers about a drawn scene are right, for each kind of fact."""
    right = {"stuff there": [], "stuff not there": [], "things there": [], "things not there": []}
    for kind, probabilities, facts in (("stuff", seen.stuff, true.stuff), ("things", seen.things, true.things)):
        for name, there in facts.items():
            if there:
                right[f"{kind} there"].append(probabilities[name] > THERE)
            else:
                right[f"{kind} not there"].append(probabilities[name] <= THERE)
    right["colours"] = [seen.colours[name] == colour for name, colour in true.colours.items()]
    by_place = sorted(true.x, key=true.x.get)
    right["left and right"] = [seen.x[a] < seen.x[b] for a, b in zip(by_place, by_place[1:])]
    right["all of a scene"] = [all(all(answers) for answers in right.values())]
    return right


def near_misses(claim: Claim, scene: Scene, rng: np.random.Generator) -> dict[str, Claim]:
    """The claim of a scene's own caption with one change each, so that it no longer holds."""
    missed = {}
    i = rng.integers(len(claim.things))
    name, colour = claim.things[i]
    present = {thing.name for thing in scene.things}
    absent = [other for other in THINGS if other not in present]
    things = list(claim.things)
    things[i] = (str(rng.choice(absent)), colour)
    missed["a thing replaced"] = claim._replace(things=things, relation=None)
    if colour:
        things = list(claim.things)
        things[i] = (name, str(rng.choice([other for other in COLOURS if other != colour])))
        missed["a colour changed"] = claim._replace(things=things)
    if claim.relation:
        missed["sides swapped"] = claim._replace(relation=claim.relation[::-1])
    stuff = list(claim.stuff)
    stuff[rng.integers(len(stuff))] = str(rng.choice([other for other in STUFF if other not in scene.stuff]))
    missed["stuff replaced"] = claim._replace(stuff=stuff)
    return missed


def check_drawn(judge: Judge, model: seg4diff.Seg4Diff) -> None:
    """Drawn scenes through the VAE: facts, and captions told apart."""
    drawn = [scenes.draw(seed) for seed in tqdm(HELD_OUT, desc="scenes", disable=None)]
    images = []
    for scene in tqdm(drawn, desc="VAE", disable=None):
        z = seg4diff.encode_image(model, Image.fromarray(scene.image))       # (1, C, h, w)
        with torch.inference_mode():
            images.append(to_image(model.vae.decode(z)[0]))
    found = look(judge, images)
    right = {}
    for seen, scene in zip(found, drawn):
        for kind, answers in facts_right(seen, truth(scene)).items():
            right[kind] = right.get(kind, []) + answers
    show(f"{len(drawn)} drawn scenes through the VAE, right answers (95 % interval)")
    for kind, answers in right.items():
        show(f"  {kind:24}{interval(sum(answers), len(answers))}")
    claimed = [claims(scenes.caption(scene, np.random.default_rng(seed))) for scene, seed in zip(drawn, HELD_OUT)]
    own = []
    apart = {}
    for i, seen in enumerate(found):
        own.append(bool(verdict(seen, claimed[i])["all right"]))
        others = near_misses(claimed[i], drawn[i], np.random.default_rng(HELD_OUT[i]))
        other = claimed[(i + 1) % len(claimed)]
        if not verdict(truth(drawn[i]), other)["all right"]:                 # by chance it may hold, too
            others["another scene's caption"] = other
        for kind, wrong in others.items():
            apart.setdefault(kind, []).append(own[i] and not verdict(seen, wrong)["all right"])
    show("their own captions")
    show(f"  {'all right':24}{interval(sum(own), len(own))}")
    show("told apart: the own caption all right, and not the other")
    for kind, answers in apart.items():
        show(f"  {kind:24}{interval(sum(answers), len(answers))}")


def read_judged() -> list[dict[str, str]]:
    """The pictures judged by eye: how each is made, and y or n for each claim of its caption, in its order.

    perturb: the blocks that were blurred throughout (Fig. 5).  files.Broken: the list is not there.
    """
    with decoding(LIST, "list of judged pictures"), open(LIST, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def generate_judged(model: seg4diff.Seg4Diff, rows: list[dict[str, str]]) -> list[Image.Image]:
    """The pictures of the list, in its order.  Rows of one setting follow each other, and so do their seeds."""
    images = []
    for (cfg, pag, perturb), group in itertools.groupby(rows, lambda row: (row["cfg"], row["pag"], row["perturb"])):
        part = list(group)
        blocks = [int(block) for block in perturb.split()]
        images += seg4diff.generate(model, [row["caption"] for row in part], cfg=float(cfg), pag=float(pag),
                                    perturb=blocks, seed=int(part[0]["seed"]))
    return images


def check_generated(judge: Judge, model: seg4diff.Seg4Diff) -> None:
    """Generated pictures: the judge against the eye."""
    rows = read_judged()
    pairs = {kind: ([], []) for kind in COLUMNS}         # kind: what the eye says, what the judge says
    settings = {}
    show("where eye (E) and judge (J) differ, y or n for each claim")
    for row, seen in zip(rows, look(judge, generate_judged(model, rows))):
        setting = f"cfg {row['cfg']}, pag {row['pag']}, blurred {row['perturb'] or 'none'}"
        eye = {kind: [letter == "y" for letter in row[kind]] for kind in COLUMNS[:-1]}
        own = holding(seen, claims(row["caption"]))
        for kind in COLUMNS[:-1]:
            if eye[kind] != own[kind]:
                answers = "".join("y" if holds else "n" for holds in own[kind])
                show(f"  {row['seed']}, {setting}: {row['caption']}: {kind} E {row[kind]} J {answers}")
        for answers in (eye, own):
            answers["all right"] = [all(all(items) for items in answers.values())]
        for kind in COLUMNS:
            pairs[kind][0].extend(eye[kind])
            pairs[kind][1].extend(own[kind])
        settings.setdefault(setting, []).append((eye["all right"][0], own["all right"][0]))
    show(f"{len(rows)} generated pictures, agreement of judge and eye")
    for kind, (eye, own) in pairs.items():
        show(f"  {kind:12}{interval(sum(np.equal(eye, own)), len(eye))}, kappa {kappa(eye, own):.2f}; "
             f"holds by eye {100 * np.mean(eye):.0f} %, by the judge {100 * np.mean(own):.0f} %")
    show("all right by setting: eye, judge")
    for setting, answers in settings.items():
        eye, own = 100 * np.mean(answers, axis=0)
        show(f"  {setting:32}{eye:.0f} %, {own:.0f} %, n = {len(answers)}")


def check(judge: Judge) -> None:
    """Print all of it."""
    model = seg4diff.load("nano", device="cpu", dtype="float32")
    check_drawn(judge, model)
    check_generated(judge, model)
