"""What every notebook begins with: a model, prompts for it, and a way to show pictures small enough to be committed."""
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import Image as Show
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import figures                                           # noqa: E402
import pictures                                          # noqa: E402
import seg4diff                                          # noqa: E402
from nano import scenes                                  # noqa: E402

MODEL = os.environ.get("SEG4DIFF_MODEL", "nano")        # "sd3" once its weights are at hand
SEED = 0
set_matplotlib_formats("png")
model = seg4diff.load(MODEL, dtype="float32")           # fp32, so that what is redone by hand can be compared
out = Path(tempfile.mkdtemp())                          # figures are written there, then shown
toy = figures.toy(model)                                # nano, or a model that was trained like it
prompts = [scenes.caption(scenes.draw(s), np.random.default_rng(s)) for s in scenes.VAL_SEEDS[7:15]] if toy else \
    (Path(__file__).parent.parent / "prompts.txt").read_text().splitlines()[:4]


def show(picture: str | Image.Image, width: int = 900, plot: bool = False) -> Show:
    """A picture, or the file in `out` of that name, at most `width` wide; plots as PNG, the rest as JPEG."""
    return Show(pictures.small(Image.open(out / picture) if isinstance(picture, str) else picture, width, plot))


cfg = model.mmdit.config
print(f"{model.name}: {cfg.depth} blocks, {cfg.heads} heads, expert block {model.preset.block}")
