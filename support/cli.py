"""What every command line shares: the options that mean the same everywhere, and one sentence for bad input."""
import argparse
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from support import ctrl_c, weights


class Parser(argparse.ArgumentParser):
    """argparse whose complaints end like those of the rest of the program: see `command`."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise ValueError(message)


def at_least(least, kind=int, most=math.inf):
    """A `type` for add_argument: finite numbers from `least` up, to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            wanted = f"finite and at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {value}")
        return value
    parse.__name__ = kind.__name__                       # argparse names it: "invalid int value: 'x'"
    return parse


def positive(text):
    """A `type` for add_argument: finite numbers above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {value}")
    return value


def utf8(word):
    """A `type` for add_argument: names and prompts, which a terminal of another encoding can garble."""
    if word.encode(errors="replace").decode() != word:
        raise argparse.ArgumentTypeError(f"is no text in UTF-8: {word!r}")
    return word


def renamed(new, old=None):
    """A `type` for what an older version took: an option, whatever its value, or the one value `old` of an option."""
    def parse(text):
        if old is None:
            raise argparse.ArgumentTypeError(f"this option is now {new}")
        if text == old:
            raise argparse.ArgumentTypeError(f"{old!r} is now {new}")
        return text
    return parse


LAST_SEED = 2 ** 128 - 1                # state.pt, which keeps it, could not be read again with one of 256 bytes


def add_model_options(parser: Parser, default: str | None = "nano", default_help: str = "nano", lora: bool = True,
                      seed: bool = True) -> None:
    """--model, --lora, --seed, --device, --dtype, as seg4diff.load and the functions of the method take them."""
    names = ", ".join(weights.NAMES)
    parser.add_argument("--model", default=default, help=f"{names}, a .safetensors file or a folder ({default_help})")
    if lora:
        parser.add_argument("--lora", type=Path, help="a LoRA of that model, as train_magnet.py writes")
    if seed:
        parser.add_argument("--seed", type=at_least(0, most=LAST_SEED), default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto",
                        help="float32, bfloat16, float16 or auto: bfloat16 on CUDA (old cards float16), else float32")


# What an allocation that failed says, whoever made it: CPU, CUDA, cuBLAS, cuDNN, MPS. Not all are OutOfMemoryErrors.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


BAR = 2                                                  # seconds between two looks of a progress bar


def progress(desc: str, unit: str, total: int, done: int = 0, silent: bool = False) -> tqdm:
    """A progress bar that begins at `done`.  In a log file it would be a line each time, so there it is silent."""
    return tqdm(desc=desc, unit=unit, total=total, initial=done, mininterval=BAR, disable=True if silent else None)


def show(*parts: object) -> None:
    """print, for what is on the disk already: where nobody reads any more (a closed pipe), go on without it.

    OSError: another reason, a full disk say; what is shown later goes nowhere.
    """
    try:
        print(*parts, flush=True)
    except OSError as e:
        sys.stdout = io.StringIO()                       # else Python tries the rest again when it ends
        if not isinstance(e, BrokenPipeError):
            raise OSError(f"the standard output cannot be written ({e}); files that were written are there") from None


def one_line(text: str) -> str:
    """Text whose line ends and other characters that a terminal does not show stand as Python escapes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def command(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run a script: bad input and too little memory end in one sentence and exit code 2, Ctrl-C in one and 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):               # names of any script, on a terminal of any encoding
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is None:                               # closed: bars and sentences go nowhere
        sys.stderr = io.StringIO()
    code = 2
    try:
        ctrl_c.answer_by_exception()
        main(parser.parse_args())
        return
    except (ValueError, OSError) as e:
        problem = f"error: {e}"
    except KeyboardInterrupt:
        problem = ctrl_c.STOPPED
        code = ctrl_c.CODE
    except (MemoryError, RuntimeError) as e:             # torch.OutOfMemoryError is a RuntimeError
        if isinstance(e, RuntimeError) and not any(words in str(e) for words in NO_MEMORY):
            raise                                        # a mistake of ours
        problem = ("error: the device has too little memory for this; smaller batches or pictures, or --device cpu, "
                   "need less of it")
    print(one_line(problem), file=sys.stderr)            # what it repeats can hold anything: a path, a file's content
    sys.exit(code)
