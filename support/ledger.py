"""A ledger of finished pictures: one line each, so that a killed run goes on where it stopped and loses nothing.

    ledger = Ledger(folder, identity)                    # .done: what was written under this very identity
    ledger.add(name, {"nano": counts}, seed)             # on the disk before the next picture is begun
    total = Ledger(folder, identity).sum(names, shape)   # exact: whole numbers, whichever process counted them

Several processes (torchrun) write a file each in one folder; whoever opens a ledger reads them all.
"""
import atexit
import hashlib
import json
import os
from datetime import timedelta

import numpy as np
import torch

Counts = dict[str, np.ndarray]                           # row of the table -> whole numbers (K, ...)


def world():
    """This process's number and how many there are: torchrun says so in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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


class Ledger:
    """`done` {name: {row: [[i, j, count], ...]}}, `broken` {name: why it could not be read}."""

    def __init__(self, folder, identity, rank=0):
        """ValueError: the folder cannot be made, or read.  A line that a kill left half written is dropped."""
        self.hash = digest(identity)
        self.done = {}
        self.broken = {}
        self.path = folder / f"ledger-{self.hash}-{rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"ledger-{self.hash}-*.jsonl")):
                for line in path.read_bytes().split(b"\n")[:-1]:     # what follows the last line end is half a line
                    self.take(json.loads(line))
            whole = self.path.read_bytes() if self.path.exists() else b""
            if whole and not whole.endswith(b"\n"):
                os.truncate(self.path, whole.rfind(b"\n") + 1)
        except (OSError, ValueError, TypeError) as e:                # not JSON, not one of our lines
            raise ValueError(f"the ledger {self.path} cannot be used: {e}; name another folder with --out") from None
        if b"\n" not in whole:
            self.write({"identity": identity})

    def take(self, line):
        if "counts" in line:
            self.done[line["name"]] = line["counts"]
        elif "broken" in line:
            self.broken[line["name"]] = line["broken"]

    def write(self, line):
        """One line at the end of the file in one write, or nothing.  ValueError: the disk is full."""
        size = self.path.stat().st_size if self.path.exists() else 0
        data = json.dumps(line, default=str).encode() + b"\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.write(fd, data) != len(data):
                raise OSError("no space left")
        except OSError as e:
            os.ftruncate(fd, size)
            raise ValueError(f"{self.path} cannot be written ({e}); {len(self.done)} pictures are kept, and the same "
                             "command goes on from there once there is room") from None
        finally:
            os.close(fd)

    def add(self, name, counts, seed):
        self.record({"name": name, "seed": seed, "counts": {row: sparse(c) for row, c in counts.items()}})

    def skip(self, name, why):
        """A picture that could not be read; it is tried again when the run is."""
        self.record({"name": name, "broken": why})

    def record(self, line):
        self.write(line | {"hash": self.hash})
        self.take(line)

    def sum(self, names, shape):
        """Counts of these pictures (those that are done) added up, int64 of this shape for each row of the table."""
        total: Counts = {}
        for name in names:
            for row, counts in self.done.get(name, {}).items():
                total.setdefault(row, np.zeros(shape, np.int64))
                for i, j, n in counts:
                    total[row][i, j] += n
        return total
