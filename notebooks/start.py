"""What every notebook begins with: where the code lies, which model, how much of it, and how pictures are shown."""
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

from IPython.display import Image as Show
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))   # the notebooks import the repository's files
warnings.filterwarnings("ignore", "IProgress not found")                # progress bars are lines of text here

MODEL = os.environ.get("SEG4DIFF_MODEL", "nano")        # "sd3" once its weights are at hand
QUICK = bool(os.environ.get("SEG4DIFF_QUICK"))            # fewer pictures and steps, as the test-suite runs them
SEED = 0
out = Path(tempfile.mkdtemp())                          # figures are written there, then shown


def show(picture: str | Image.Image, width: int = 900, plot: bool = False) -> Show:
    """A picture, or the file in `out` of that name, at most `width` wide and small enough to be committed.

    A plot is shown as PNG of 256 colours, anything else as JPEG.
    """
    if isinstance(picture, str):
        picture = Image.open(out / picture)
    picture = picture.convert("RGB")
    picture.thumbnail((width, 10 * width))
    file = io.BytesIO()
    if plot:
        picture.quantize(256).save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=82)
    return Show(file.getvalue())
