"""A GPU that is not there: what a PyTorch program does wrong on one, seen on a CPU.

    with pretend("cuda") as gpu:                         # or "mps"; inside, torch says that there is one
        model = seg4diff.load("nano", "cuda")            # model.device is cuda:0, its numbers are real
    gpu.refused, gpu.crossings                           # what a GPU would not have taken; copies to and from it, waits

A tensor on the pretended device is a `Far`, a wrapper around a CPU tensor that says it is on cuda:0. PyTorch hands
every operation on it to Card.run, which raises where a GPU would raise (above all where tensors of both devices meet),
notes what crosses between the devices, and computes the operation on the CPU tensors inside. So values are right to the
end, and whatever depends on them is run, too. To the C++ side of PyTorch a Far is on "cpu:0", as a CPU build can build
gradients for no other device; a plain CPU tensor is on "cpu" without a number, so the two are told apart. `Names` turns
what the program asks for, "cuda", into cpu:0 before PyTorch sees it.

What it cannot show: kernels that do not exist, memory, time, rounding, and autocast, which changes nothing here.
"""
import contextlib
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
INSIDE = torch.device("cpu", 0)                          # what C++ sees of the pretended device
HOST = torch.device("cpu")
aten = torch.ops.aten

# Operations whose result decides on the host what comes next: the program waits until the device is done.
WAITING = {aten.item.default, aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default,
           aten.equal.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def each(f, x):
    """f of everything in nested lists and tuples."""
    return type(x)([each(f, y) for y in x]) if isinstance(x, (list, tuple)) else f(x)        # faster than list | tuple


def tensors_in(args):
    """Those of an operation's arguments, lists of tensors included."""
    found = []
    each(found.append, args)
    return [x for x in found if isinstance(x, Tensor)]


Refused = type("Refused", (RuntimeError,), {})           # what the real device would have raised
Crossing = namedtuple("Crossing", "kind functions")      # "to device", "to host" or "wait"; who ran, innermost first


def running():
    """The project's frames, innermost first."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and name != __file__:
            found.append(frame)
        frame = frame.f_back
    return found


class Card:
    """The pretended device, and what happened on it."""

    def __init__(self, kind):
        self.device = torch.device(kind, 0)
        self.refused = []                                # "file:line: what was wrong"
        self.crossings = []

    def refuse(self, text):
        at = running()[0]
        self.refused.append(f"{at.f_code.co_filename}:{at.f_lineno}: {text}")
        raise Refused(text)

    def note(self, kind):
        self.crossings.append(Crossing(kind, [frame.f_code.co_name for frame in running()]))

    def means(self, device):                             # the pretended device, as the program or as C++ calls it
        return isinstance(device, torch.device) and (device == INSIDE or device.type == self.device.type)

    def check(self, func, args, kwargs, far, near, here):
        """Refuse and note what a GPU would; here: the result is to be on the device."""
        name = func._schema.name
        if func is aten._to_copy.default:
            if far and not here:
                self.note("to host")
            if near and here:
                self.note("to device")
        elif func is aten.copy_.default:
            if far and near:
                self.note("to device" if isinstance(args[0], Far) else "to host")
        elif func in INDEXING:                           # an index may come from the host, but not the other way round
            if not isinstance(args[0], Far):
                self.refuse(f"{name}: indices on {self.device} for a tensor on the cpu")
            for index in args[1]:
                if index is not None and not isinstance(index, Far):
                    self.note("to device")
                if index is not None and index.dtype == torch.bool:
                    self.note("wait")
            if len(args) > 2 and not isinstance(args[2], Far) and args[2].ndim:
                self.refuse(f"{name}: values on the cpu for a tensor on {self.device}")
        elif far and near and (torch.Tag.pointwise not in func.tags or any(x.ndim for x in near)):
            # but a number in a tensor, (), may come along elementwise
            self.refuse(f"{name}: tensors on {self.device} and on the cpu, {[tuple(x.shape) for x in near]}")
        generator = kwargs.get("generator")
        if generator is not None and not far and not self.means(generator.device):
            self.refuse(f"{name}: a generator of the cpu for a tensor on {self.device}")
        if func in WAITING and far:
            self.note("wait")

    def run(self, func, args, kwargs):                   # one operation, as the device would take it
        tensors = tensors_in((*args, *kwargs.values()))
        far = [x for x in tensors if isinstance(x, Far)]
        near = [x for x in tensors if not isinstance(x, Far) and not x.is_meta]
        asked = kwargs.get("device")
        here = bool(far) if asked is None else self.means(asked)
        if not far and not here:
            return func(*args, **kwargs)
        self.check(func, args, kwargs, far, near, here)
        outer = {id(x.inside): x for x in far}           # an operation in place returns the tensor that it was given
        untouched = {id(x) for x in near}                # copy_ to the host returns the host's tensor

        def bare(x):
            if isinstance(x, Far):
                return x.inside
            return HOST if self.means(x) else x

        def wrap(x):
            leaves = func is aten._to_copy.default and not here
            if not isinstance(x, Tensor) or x.is_meta or id(x) in untouched or leaves:
                return x
            if id(x) in outer:
                return outer[id(x)]
            if self.device.type == "mps" and x.dtype == torch.float64:
                self.refuse(f"{func._schema.name}: mps has no float64")
            return Far(x, self)

        kwargs = {key: bare(x) for key, x in kwargs.items() if key != "pin_memory"}
        return each(wrap, func(*each(bare, tuple(args)), **kwargs))


class Far(Tensor):
    """A tensor on the pretended device: `inside` holds its numbers, `card` is the device."""

    @staticmethod
    def __new__(cls, inside, card):
        with torch.inference_mode(False):                # or no view of a parameter could be made in inference mode
            far = Tensor._make_wrapper_subclass(cls, inside.shape, strides=inside.stride(), dtype=inside.dtype,
                                                storage_offset=inside.storage_offset(), device=INSIDE)
        far.inside = inside
        far.card = card
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.card.device)
    is_cuda = property(lambda self: self.card.device.type == "cuda")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        card = next(x.card for x in tensors_in((*args, *(kwargs or {}).values())) if isinstance(x, Far))
        return card.run(func, args, kwargs or {})

    def tolist(self):
        self.card.note("to host")
        return self.inside.tolist()

    def numpy(self, *args, **kwargs):
        self.card.refuse(f".numpy() of a tensor on {self.card.device}; .cpu() first")

    __array__ = numpy


class Operations(TorchDispatchMode):
    """Sends every operation through Card.run, also those that make a tensor out of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.card.run(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls):                        # else PyTorch imports its compiler, for seconds
        return False


class Names(TorchFunctionMode):
    """Turns the program's "cuda" (or "mps") into the device that C++ sees, in every call of PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)

        def place(x):
            named = isinstance(x, str) and x.split(":")[0] == self.card.device.type
            return INSIDE if named or self.card.means(x) else x

        args = tuple(map(place, args))
        kwargs = {key: place(x) for key, x in kwargs.items()}
        given = (*args[1:], *kwargs.values())
        if func is Tensor.backward:                      # checkpoints compute again in there, and need this mode, too
            start = (args[0],), (torch.ones_like(args[0]),)
            with self:
                return torch.autograd.graph._engine_run_backward(*start, False, False, (), True, accumulate_grad=True)
        if func in (Tensor.to, Tensor.cpu):              # C++ takes a move between cpu and cpu:0 for no move at all
            places = [torch.device(x) for x in given if isinstance(x, str | torch.device)]
            if func is Tensor.cpu:
                places = [HOST]
            if places and isinstance(args[0], Far) != (places[0] == INSIDE):
                dtype = next((x for x in given if isinstance(x, torch.dtype)), None)
                return aten._to_copy(args[0], device=places[0], dtype=dtype)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INSIDE:
            return aten._to_copy(func(*args, **kwargs | {"device": None}), device=INSIDE)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretend(kind: str, capability: tuple[int, int] = (8, 0), card: Card | None = None):
    """Inside, there is one device of this kind, "cuda" or "mps"; yields its Card.

    capability: CUDA's, of its age.  card: an earlier one, with all that lies on it.
    """
    card = card or Card(kind)
    card.refused.clear()
    card.crossings.clear()
    cuda = kind == "cuda"
    save, flatten = torch.save, safetensors.torch._flatten_as_ptr

    def home(x):                                         # what is written to a file comes home first
        if isinstance(x, dict):
            return {key: home(y) for key, y in x.items()}
        if isinstance(x, list | tuple):
            return [home(y) for y in x]
        return x.detach().inside.clone() if isinstance(x, Far) else x

    patches = {
        "torch.save": lambda value, path: save(home(value), path),
        "safetensors.torch._flatten_as_ptr": lambda tensors, keep: flatten(home(tensors), keep),
        "torch.cuda.is_available": lambda: cuda, "torch.cuda.device_count": lambda: int(cuda),
        "torch.cuda.get_device_capability": lambda device: capability, "torch.cuda.is_bf16_supported": lambda: True,
        "torch.cuda.mem_get_info": lambda device: (2 ** 40, 2 ** 40),        # free, all
        "torch.cuda.synchronize": lambda device: card.note("wait"), "torch.mps.synchronize": lambda: card.note("wait"),
        "torch.__future__._overwrite_module_params_on_conversion": True,     # Module.to cannot put a Far into .data
        "torch.backends.mps.is_available": lambda: not cuda}
    for name in ("_lazy_init", "set_device", "max_memory_allocated", "memory_allocated", "reset_peak_memory_stats"):
        patches[f"torch.cuda.{name}"] = lambda *args: 0
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        for mode in (Operations(), Names()):
            mode.card = card
            stack.enter_context(mode)
        yield card
