"""A ledger of finished pictures: one line each, so that a killed run goes on where it stopped and loses nothing.

    ledger = Ledger(folder, identity, rows, (K, K), truth)       # .done: what was written under this very identity
    ledger.add(name, {"nano": counts, ...}, seed)        # on the disk before the next picture is begun
    total = ledger.sum(names)                            # exact: whole numbers, whichever process counted them

Several processes (torchrun) write a file each in one folder; whoever reads a ledger reads them all.  Each record begins
a line of its own, and a line that is not whole is passed over: neither a kill nor a full disk nor a second run on the
same file can damage another line.

All rows of a picture see the same truth.  So a line is believed if each of them counts the same labelled pixels of each
class, and as many as the line says; else the picture is counted again.  Not detected: counts moved between predictions;
all counts and the pixel number multiplied alike; numbers that are no part of the truth (regions, borders, what a region
has outside its class).
"""
import atexit
import hashlib
import json
import os
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch

from support.files import decoding, make_folder

Counts = dict[str, np.ndarray]                           # row of the table -> whole numbers (K, ...)
MOST = 2 ** 40                                           # more pixels than a picture has; int64 holds sums of millions


def world():
    """This process's number and how many there are: torchrun says so in the environment.  ValueError: nonsense."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1
    rank = os.environ.get("RANK", "")
    processes = os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes)):
        raise ValueError(f"RANK {rank!r} and WORLD_SIZE {processes!r} in the environment should be a process's number, "
                         "from 0, and how many there are; torchrun sets them, and a single process needs neither")
    return int(rank), int(processes)


def wait_for_all():
    """Until every process of torchrun is here."""
    if world()[1] > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
            atexit.register(torch.distributed.destroy_process_group)         # or PyTorch complains at the end
        torch.distributed.barrier()


def digest(identity):
    """12 hex digits that change with any entry of the identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sparse(counts):
    """(rows, columns) -> [row, column, count] of what is not zero."""
    return [[int(i), int(j), int(counts[i, j])] for i, j in zip(*counts.nonzero())]


def dense(cells, shape):
    """What `sparse` was made of, int64."""
    counts = np.zeros(shape, np.int64)                                       # (rows, columns)
    for i, j, n in cells:
        counts[i, j] += n
    return counts


def possible(cells, shape):
    """Whether this is what `sparse` makes of a picture's counts of this shape."""
    if not isinstance(cells, list) or not cells:
        return False
    for cell in cells:
        if not isinstance(cell, list) or [type(x) for x in cell] != [int, int, int]:
            return False
        i, j, n = cell
        if not (0 <= i < shape[0] and 0 <= j < shape[1] and 0 < n < MOST):
            return False
    return True


class Ledger:
    """`done` {name: {row: [[i, j, count], ...]}}, `broken` {name: why it could not be read}."""

    def __init__(self, folder, identity, rows, shape, truth: Callable[[np.ndarray], np.ndarray], rank=0):
        """rows: of the table; shape: (rows, columns) of the counts of each; truth: such counts -> how many pixels of
        each class the truth has, (K,).

        ValueError: the folder cannot be made, or its ledgers not be read.
        """
        self.identity = identity
        self.hash = digest(identity)
        self.rows = set(rows)
        self.shape = shape
        self.truth = truth
        self.done = {}
        self.broken = {}
        self.path = folder / f"ledger-{self.hash}-{rank}.jsonl"
        self.read()
        if not self.path.exists():
            self.write(json.dumps({"identity": identity}, default=str))

    def read(self):
        """What every process has written so far; a picture whose line is not whole and valid will be counted again."""
        for path in sorted(self.path.parent.glob(f"ledger-{self.hash}-*.jsonl")):
            with decoding(path, "ledger"):
                data = path.read_bytes()
            for text in data.split(b"\n"):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if self.valid(line):
                    self.take(line)

    def valid(self, line):
        """Whether this can be a record of this ledger: of all rows, or of none, where no pixel has a label.

        The rows agree with each other, and with the line's number of labelled pixels.
        """
        if not isinstance(line, dict) or line.get("hash") != self.hash or not isinstance(line.get("name"), str):
            return False
        if "broken" in line:
            return isinstance(line["broken"], str)
        counts = line.get("counts")
        if not isinstance(counts, dict) or counts.keys() not in (set(), self.rows):
            return False
        if not all(possible(cells, self.shape) for cells in counts.values()):
            return False
        pixels = self.pixels({row: dense(cells, self.shape) for row, cells in counts.items()})
        return pixels is not None and line.get("pixels") == pixels

    def pixels(self, counts: Counts) -> int | None:
        """How many labelled pixels a picture has, by the counts of its rows; None: by one row other ones than by the
        next."""
        if not counts:
            return 0
        truths = np.stack([self.truth(c) for c in counts.values()])          # (rows of the table, K)
        return int(truths[0].sum()) if (truths == truths[0]).all() else None

    def take(self, line):
        if "broken" in line:
            self.broken[line["name"]] = line["broken"]
        else:
            self.done[line["name"]] = line["counts"]

    def write(self, text):
        """Text at the end of the file, in one write.  ValueError: the disk is full, say."""
        data = text.encode()
        make_folder(self.path.parent)
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                if os.write(fd, data) != len(data):
                    raise OSError("no space left")
            finally:
                os.close(fd)
        except OSError as e:
            raise ValueError(f"{self.path} cannot be written ({e}); {len(self.done)} pictures are kept, and the same "
                             "command goes on from there once it can be") from None

    def add(self, name, counts, seed):
        """A picture's counts of all rows, or of none where no pixel has a label.

        RuntimeError: the rows disagree about its truth, which is a mistake of ours.
        """
        pixels = self.pixels(counts)
        if pixels is None:
            raise RuntimeError(f"the rows of {name} were counted over different pixels")
        self.record({"name": name, "seed": seed, "pixels": pixels,
                     "counts": {row: sparse(c) for row, c in counts.items()}})

    def skip(self, name, why):
        """A picture that could not be read; it is tried again when the run is."""
        self.record({"name": name, "broken": why})

    def record(self, line):
        self.write("\n" + json.dumps(line | {"hash": self.hash}))
        self.take(line)

    def sum(self, names):
        """Counts of these pictures (those that are done) added up, int64 for each row of the table."""
        total: Counts = {}
        for name in names:
            for row, counts in self.done.get(name, {}).items():
                total.setdefault(row, np.zeros(self.shape, np.int64))
                total[row] += dense(counts, self.shape)
        return total
