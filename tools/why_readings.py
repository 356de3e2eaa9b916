"""Why the readings beyond the paper (readings.py) are better, and where they fail, shown on pictures of scenes-dev.

    python tools/why_readings.py                         # typical.png, bleeding.png, ... in out/why-nano

typical.png: the pictures in the middle, sorted by what the step through I2I gains.
bleeding.png: a patch's mass on all text varies, and the bilinear step lets heavy patches bleed into light ones.
rows.png: where chosen patches look, the rows of I2I that the step averages the shares over.
failures.png: the pictures in which the step costs pixels, or gains least.
"""
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import readings  # noqa: E402
import seg4diff  # noqa: E402
from loading import image_seed  # noqa: E402
from mmdit import i2t_attention  # noqa: E402
from support.cli import Parser, add_model_options, at_least, command, show  # noqa: E402
from support.data import DATASETS, ROOT, measurable, subset  # noqa: E402
from support.files import make_folder, write_figure, write_json  # noqa: E402
from support.metrics import classes_in  # noqa: E402
from support.pictures import overlay, palette  # noqa: E402

SHOWN = 3                               # pictures in a figure


def draw(path, title, rows):
    """Rows of (picture or map, its title) below one title."""
    columns = max(map(len, rows))
    fig = Figure((2 * columns, 2.4 * len(rows) + 0.5), dpi=90, layout="constrained")
    fig.suptitle(title)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for (i, j), ax in np.ndenumerate(axes):
        ax.axis("off")
        if j < len(rows[i]):
            picture, caption = rows[i][j]
            ax.imshow(np.asarray(picture))
            ax.set_title(textwrap.fill(caption, 30), fontsize=9)
    write_figure(path, fig)


class Look:
    """One picture, read in all ways."""

    def __init__(self, model, data, name):
        self.item = data.read(name)
        self.ids = classes_in(self.item.labels)                              # (classes in the picture,)
        self.names = [data.classes[k] for k in self.ids]
        self.colours = palette(len(data.classes))
        seed = image_seed(name, 0)
        found = seg4diff.segment(model, self.item.image, self.names, reading=readings.READINGS, seed=seed)
        self.maps = {r: found[r].maps for r in found}                        # (K, h, w) each
        self.labels = {r: self.ids[found[r].labels] for r in found}          # (height, width) each
        self.right = {r: float((x == self.item.labels).mean()) for r, x in self.labels.items()}
        z0 = seg4diff.encode_image(model, self.item.image).float()           # (1, C, ., .)
        eps = seg4diff.noise(z0.shape[1:], [seed]).to(z0.device)             # (1, C, ., .)
        z = seg4diff.add_noise(z0, eps, model.preset.sigma)                  # (1, C, ., .)
        cond = model.text.encode([self.names])
        block = model.preset.block
        _, taps = model(z, model.preset.sigma, cond.ctx, cond.pooled, capture={block}, stop_at=block)
        qkv = taps[block]
        self.qkv = qkv._replace(q=qkv.q.cpu(), k=qkv.k.cpu(), v=qkv.v.cpu())

    def shown(self, reading):
        caption = f"{reading}: {self.right[reading]:.1%} right"
        return overlay(self.item.image, self.labels[reading], self.colours), caption

    def truth(self):
        return overlay(self.item.image, self.item.labels, self.colours), "truth"

    def patch_truth(self):
        """The truth at each patch, (N,)."""
        truth = torch.from_numpy(self.item.labels)[None, None].float()       # (1, 1, height, width)
        return torch.nn.functional.interpolate(truth, self.qkv.grid)[0, 0].flatten()         # (N,)

    def own_class(self):
        """How much of its I2I a patch gives to patches of its own class, mean over the patches; and what that would
        be if all patches got as much."""
        truth = self.patch_truth()
        same = (truth[:, None] == truth[None]).float()                       # (N, N)
        rows = readings.image_rows(self.qkv, torch.arange(self.qkv.n_img))   # (N, N)
        return float((rows * same).sum(1).mean()), float(same.mean())


def text_mass(look):
    """A patch's attention to the classes' words together, (h, w), and how much it varies: largest over smallest."""
    mass = look.maps["paper"].sum(0)                                         # (h, w)
    return mass, float(mass.max() / mass.min())


def bleeding(looks, path):
    """Rows of pictures: the mass, the paper's labels, where they are wrong, those of shares."""
    rows = []
    for look in looks:
        mass, ratio = text_mass(look)
        wrong = look.labels["paper"] != look.item.labels                     # (height, width)
        mended = wrong & (look.labels["shares"] == look.item.labels)
        marked = np.asarray(look.item.image.convert("L").convert("RGB")).copy()              # (height, width, 3)
        marked[wrong] = (220, 30, 30)
        marked[mended] = (40, 160, 60)
        rows.append([(look.item.image, "picture"), (mass, f"mass on the names, up to x {ratio:.0f}"),
                     look.shown("paper"), (marked, "wrong: red; by shares right: green"), look.shown("shares"),
                     look.truth()])
    draw(path, "In the bilinear step heavy patches bleed into light ones; shares have equal weight", rows)


def attention_rows(look, path):
    """Where three patches look: that of the least certain share, and the surest of the largest and smallest class."""
    h, w = look.qkv.grid
    truth = look.patch_truth()                                               # (N,)
    shares = look.maps["shares"].flatten(1)                                  # (K, N)
    sizes = [int((truth == k).sum()) for k in look.ids]
    patches = {"the patch of the least certain share": int(shares.amax(0).argmin())}
    for k in (int(np.argmax(sizes)), int(np.argmin(sizes))):
        inside = (truth == look.ids[k]).float()                              # (N,)
        patches[f"the surest patch of {look.names[k]}"] = int((inside * shares[k]).argmax())
    row = []
    for what, n in patches.items():
        weights = readings.image_rows(look.qkv, torch.tensor([n]))[0]        # (N,)
        own = float(weights[truth == truth[n]].sum())
        y, x = divmod(n, w)
        spot = np.asarray(look.item.image).copy()                            # (height, width, 3)
        tall = spot.shape[0] // h
        wide = spot.shape[1] // w
        spot[y * tall:(y + 1) * tall, x * wide:(x + 1) * wide] = (255, 0, 0)
        row += [(spot, what), (weights.view(h, w).sqrt(), f"where it looks: {own:.0%} at its own class")]
    draw(path, "Rows of the expert block's I2I (square roots): patches look mostly at their own class", [row])


def main(args):
    data = DATASETS[args.dataset](args.data_root)
    names = measurable(data, subset(data.names, args.limit))
    if len(names) < SHOWN:
        raise ValueError(f"each figure shows {SHOWN} pictures; {data.name} has {len(names)} that can be measured")
    model = seg4diff.load(args.model, args.device, args.dtype, lora=args.lora)
    out = args.out or Path("out") / f"why-{model.name}"
    make_folder(out)
    with torch.inference_mode():
        looks = [Look(model, data, name) for name in tqdm(names, desc="why", unit="image")]
        looks = sorted(looks, key=lambda look: look.right["shares"] - look.right["paper"], reverse=True)
        bleeding(looks[:SHOWN], out / "bleeding.png")
        attention_rows(looks[0], out / "rows.png")
        own, chance = zip(*[look.own_class() for look in looks])
        ratios = [text_mass(look)[1] for look in looks]
        whole = [float(i2t_attention(look.qkv).sum(-1).mean()) for look in looks]
    looks = sorted(looks, key=lambda look: look.right["i2i"] - look.right["shares"])
    middle = len(looks) // 2 - SHOWN // 2
    worst = looks[:SHOWN]
    typical = looks[middle:middle + SHOWN]
    for name, title, some in (("failures", "Where the step through I2I costs most pixels, or gains least", worst),
                              ("typical", "Readings of the same pass", typical)):
        rows = [[(look.item.image, "picture"), *map(look.shown, readings.READINGS), look.truth()] for look in some]
        draw(out / f"{name}.png", title, rows)
    numbers = {"pictures": [look.item.name for look in looks], "mass on all text": whole,
               "mass on the names, largest over smallest patch": ratios,
               "share of a patch's I2I that goes to its own class": own, "the same by chance": chance,
               "i2i worse than shares": sum(look.right["i2i"] < look.right["shares"] for look in looks),
               "i2i worse than the paper": sum(look.right["i2i"] < look.right["paper"] for look in looks)}
    write_json(out / "why.json", numbers)
    show(f"{len(looks)} pictures of {data.name}; heaviest patch over lightest, median: {np.median(ratios):.1f}")
    show(f"I2I to patches of the own class: {np.mean(own):.1%}, by chance {np.mean(chance):.1%}; means over pictures")
    show(f"fewer pixels right by i2i than by shares: {numbers['i2i worse than shares']} pictures, than by the paper's "
         f"reading: {numbers['i2i worse than the paper']}")
    show(f"wrote {out}/why.json, typical.png, bleeding.png, rows.png and failures.png")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="scenes-dev")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--limit", type=at_least(SHOWN), help="only so many pictures, always the same ones")
    parser.add_argument("--out", type=Path, help="folder (default: out/why-MODEL)")
    add_model_options(parser, seed=False)
    command(main, parser)
