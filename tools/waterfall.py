"""What each of the released code's choices is worth on a data set: `python evaluate.py --task protocol`.

Tables 1 and 2 our way, then with one choice at a time, then with all together; every setting has a ledger of its own.
"""
import time
from pathlib import Path

import numpy as np

import released
from counting import VERSIONS, above_first, count, parts_of, scored_rows
from protocol import Protocol, evaluation
from support.cli import show
from support.files import Broken, write_json
from support.ledger import world
from support.metrics import proposal_scores
from support.report import plot_waterfall, waterfall_table


def settings_of(task, data, model, half):
    """{"ours": nothing, name: that choice alone, "released": all together} of the choices that matter.

    half: whether float16 is among them.
    """
    names = released.applicable(task, data.name, model)
    if not half:
        names.remove("half")
    alone = {name: released.Choices(**{name: True}) for name in names}
    return {"ours": released.OURS, **alone, "released": released.Choices(**dict.fromkeys(names, True))}


def parts_of_setting(args, model, task, data, choices, out):
    """{picture: TP, FP, FN (K, 3)} of one setting, in the order of the classes of `data`."""
    ev = evaluation(model, data, task, Protocol(args.seed, draws=args.draws, choices=choices), args.batch_size)
    ev = ev._replace(variants=ev.variants[:1])           # the paper's reading
    counted = count(ev, args.limit, out)
    if counted is None:
        return {}
    scored_rows(ev, *counted)                            # Broken: nothing could be scored
    parts = {name: rows[0] for name, rows in parts_of(ev, *counted).items()}                 # (K, 3) each
    if choices.background:                               # it is class 0, which is never scored
        parts = {name: c[1:] for name, c in parts.items()}
    if choices.context:                                  # which leaves out the last
        parts = {name: np.pad(c, ((0, 1), (0, 0))) for name, c in parts.items()}
    return parts


def worth(settings):
    """setting -> picture -> (K, 3), ours the first: {setting: its mIoU, and above_first's three numbers}, and n.

    Pictures that some setting could not score are left out of all.  Broken: none is left.
    """
    common = set(settings["ours"])
    for parts in settings.values():
        common &= parts.keys()
    names = [name for name in settings["ours"] if name in common]
    if not names:
        raise Broken("no picture could be scored in every setting")
    columns = []
    for parts in settings.values():
        columns.append(np.stack([parts[name] for name in names]))            # (n, K, 3)
    counts = np.stack(columns, axis=1)                                       # (n, settings, K, 3)
    rows = {}
    for i, (name, above) in enumerate(zip(settings, above_first(counts))):
        rows[name] = {"mIoU": proposal_scores(counts[:, i].sum(0))["mIoU"], "above ours": above}
    return rows, len(names)


def waterfall(args, load, data, half):
    """Table, plot and results.json, as evaluate.py's options say, of which `check` has left the usual protocol.

    load: dtype -> the model.  half: float16 is a choice, too; those settings that have it run on a model of their own.
    """
    start = time.time()
    parts = {task: {} for task in released.TABLES}       # task -> setting -> picture -> (K, 3)
    dtypes = [args.dtype, "float16"] if half else [args.dtype]
    for dtype in dtypes:
        model = None                                     # makes room for the next one
        model = load(dtype)
        out = args.out or Path("out") / f"protocol-{data.name}-{model.name}"
        for task in parts:
            for name, choices in settings_of(task, data, model, half).items():
                if choices.half == (dtype != args.dtype):
                    parts[task][name] = parts_of_setting(args, model, task, data, choices, out / task / name)
    if world()[0] > 0:
        return
    found = {}
    numbers = {}
    for task, title in released.TABLES.items():
        found[title], numbers[title] = worth(parts[task])
    seconds = time.time() - start
    caption = f"{model.name} ({model.fingerprint})"
    write_json(out / "results.json", {"task": "protocol", "data": data.name, "model": caption, "n": numbers,
                                      "rows": found, "arguments": {k: str(v) for k, v in vars(args).items()},
                                      "versions": VERSIONS, "seconds": seconds})
    plot_waterfall(found, f"{model.name}, {data.name}", out / "protocol.png")
    show(f"{data.name}, {max(numbers.values())} pictures; {caption}; choices: released.py")
    show(waterfall_table(found))
    show(f"{seconds:.0f} s; wrote {out}/results.json and protocol.png")
