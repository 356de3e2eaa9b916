"""Nothing is lost and nothing is counted twice: kills, full disks, broken files, several processes."""
import errno
import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from test_data import put

import counting
import evaluate
import seg4diff
from loading import image_seed
from protocol import CODE, evaluation
from support import ledger as ledger_module
from support.data import DATASETS
from support.ledger import Ledger, digest

ROOT = Path(seg4diff.__file__).parent
PROTOCOL = {"task": "ovss", "seed": 0}
STOPPED = "stopped; the same command goes on from here"


def opened(folder: Path, identity: dict = PROTOCOL, rank: int = 0) -> Ledger:
    return Ledger(folder, identity, ["tiny", "floor"], (4, 4), truth, rank)


def truth(counts: np.ndarray) -> np.ndarray:
    """Of a confusion matrix."""
    return counts.sum(1)


def some(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, (4, 4)) * rng.integers(0, 10**11)
    return {"tiny": counts, "floor": rng.permuted(counts, axis=1)}           # other predictions, the same truth


def lines(folder: Path) -> list[dict]:
    """What the whole lines hold; of others an end is missing."""
    texts = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(text) for text in texts if text.endswith("}")]


# ---------------------------------------------------------------------------- the file


def test_sums_are_exact(tmp_path):
    """Also beyond what fp64 holds, in any order of pictures, and over the files of several processes."""
    for i in range(6):
        opened(tmp_path, rank=i % 3).add(f"p{i}", some(i), seed=i)
    ledger = opened(tmp_path)
    for names in (["p0"], ["p5", "p1", "p3"], [f"p{i}" for i in range(6)], ["p1", "absent"]):
        total = ledger.sum(names)
        assert total.keys() == {"tiny", "floor"}
        for row in total:
            want = sum(some(int(name[1]))[row] for name in names if name != "absent")
            assert total[row].dtype == np.int64 and (total[row] == want).all()
    assert ledger.sum([]) == ledger.sum(["absent"]) == {}
    assert [line["seed"] for line in lines(tmp_path) if "counts" in line] == [0, 3, 1, 4, 2, 5]
    assert all(line["hash"] == ledger.hash for line in lines(tmp_path) if "counts" in line)
    assert lines(tmp_path)[0] == {"identity": PROTOCOL}
    large = np.full((4, 4), 2**39 + 1)
    opened(tmp_path / "large").add("a", {"tiny": large, "floor": large}, seed=0)
    many = opened(tmp_path / "large").sum(["a"] * (2**14 + 1))["tiny"]
    assert many[3, 3] == (2**39 + 1) * (2**14 + 1) != int(float(many[3, 3]))


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_half_a_line_is_passed_over(tmp_path, cut):
    ledger = opened(tmp_path)
    ledger.add("a", some(0), seed=0)
    ledger.add("b", some(1), seed=0)
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data[:-cut] if cut < 10_000 else data[:30])      # 30: within the line of the identity
    again = opened(tmp_path)
    assert set(again.done) == ({"a"} if cut < 10_000 else set())
    for i, name in enumerate("ab"):
        again.add(name, some(i), seed=0)
    last = opened(tmp_path)
    assert set(last.done) == {"a", "b"} and last.path.read_bytes().startswith(data[:30])
    assert (last.sum(["a", "b"])["tiny"] == some(0)["tiny"] + some(1)["tiny"]).all()


def test_two_runs_on_one_file(tmp_path, monkeypatch):
    """The disk is full in the middle of one's line, then of the other's: nobody cuts off what the other has written."""
    one, two = opened(tmp_path), opened(tmp_path)
    write = os.write
    for ledger, other, names in ((one, two, "abc"), (two, one, "def")):
        ledger.add(names[0], some(0), seed=0)
        with monkeypatch.context() as m:
            m.setattr(os, "write", lambda fd, data: write(fd, data[:len(data) // 2]))
            with pytest.raises(ValueError, match="ledger-.*cannot be written .no space left.; .* pictures are kept"):
                ledger.add(names[1], some(1), seed=0)
        other.add(names[2], some(2), seed=0)
    assert set(opened(tmp_path).done) == set("acdf")
    assert (opened(tmp_path).sum("af")["floor"] == some(0)["floor"] + some(2)["floor"]).all()


def test_half_a_line_of_another_process_is_left_to_it(tmp_path):
    """Rank 1 may be writing just now: rank 0 passes over what is not whole yet, and does not cut it off."""
    other = opened(tmp_path, rank=1)
    other.add("a", some(0), seed=0)
    with open(other.path, "ab") as f:
        f.write(b'\n{"name": "b", "coun')
    before = other.path.read_bytes()
    assert set(opened(tmp_path, rank=0).done) == {"a"} and other.path.read_bytes() == before


def test_another_protocol_is_another_file(tmp_path):
    opened(tmp_path).add("a", some(0), seed=0)
    for other in (PROTOCOL | {"seed": 1}, PROTOCOL | {"more": None}, {"task": "ovss"}):
        assert not opened(tmp_path, other).done and digest(other) != digest(PROTOCOL)
    assert opened(tmp_path, dict(reversed(PROTOCOL.items()))).done           # order is no difference
    assert len(list(tmp_path.iterdir())) == 4


CELLS = ([0, 0, -1], [0, 0, 0], [0, 0, 1.5], [0, 0, 1.0], [0, 0, True], [0, 0, "1"], [0, 0, 2**63], [0, 0, None],
         [-1, 0, 1], [0, -1, 1], [4, 0, 1], [0, 4, 1], [0.0, 0, 1], [0, 0], [0, 0, 1, 1], [[0], 0, 1], 5, None, "001")


def test_an_impossible_line_is_counted_again(tmp_path):
    """Damaged, another run's, or counts that no picture has: none of it is summed, and none hides its neighbours."""
    ledger = opened(tmp_path)
    ledger.add("first", some(0), seed=0)
    good = {"name": "bad", "seed": 0, "pixels": 7, "hash": ledger.hash,
            "counts": {"tiny": [[0, 0, 7]], "floor": [[0, 1, 7]]}}
    counts = [{"tiny": [[0, 0, 7], cell], "floor": [[0, 1, 7], cell]} for cell in CELLS]
    counts += [good["counts"] | {"tiny": cells} for cells in ([], {}, None, 5, "[]", [[]])]
    counts += [{"tiny": [[0, 0, 7]]}, good["counts"] | {"more": [[0, 0, 7]]}, [], None, 5, [["tiny", []]]]
    bad = [good | {"counts": c} for c in counts]
    bad += [good | {"hash": "0" * 12}, good | {"name": 5}, good | {"name": ["bad"]}, good | {"broken": {}}, [], 3, None]
    bad += [{key: value for key, value in good.items() if key != left_out} for left_out in good if left_out != "seed"]
    texts = [json.dumps(line).encode() for line in bad]
    texts += [b"not json", b"\x00\x00", b"\xff\xfe{}", b"[" * 100_000, texts[0][1:], b'{"a": NaN', b"9" * 5000]
    with open(ledger.path, "ab") as f:
        f.writelines(b"\n" + text for text in texts)
    ledger.add("last", some(1), seed=0)
    again = opened(tmp_path)
    assert set(again.done) == {"first", "last"} and not again.broken
    again.record({key: value for key, value in good.items() if key != "hash"})
    assert opened(tmp_path).done["bad"] == good["counts"]                    # this one is possible
    again.add("nothing labelled", {}, seed=0)
    again.skip("unreadable", "why")
    again = opened(tmp_path)
    assert again.done["nothing labelled"] == {} and again.broken == {"unreadable": "why"}


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/deeper"):
        with pytest.raises(ValueError, match=f"{folder} cannot be a folder for results"):
            opened(tmp_path / folder)
    opened(tmp_path).path.unlink()
    opened(tmp_path, {}).path.rename(tmp_path / "away")
    (tmp_path / f"ledger-{digest(PROTOCOL)}-1.jsonl").mkdir()
    with pytest.raises(ValueError, match="-1.jsonl' cannot be read as a ledger"):
        opened(tmp_path)


@pytest.mark.parametrize("rank, processes", [("5", None), (None, "2"), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", "x"),
                                             ("0.5", "2"), ("", ""), ("0", "0")])
def test_nonsense_of_torchrun(monkeypatch, rank, processes):
    for key, value in (("RANK", rank), ("WORLD_SIZE", processes)):
        if value is not None:
            monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"^RANK '{rank or ''}' and WORLD_SIZE '{processes or ''}' .*torchrun"):
        ledger_module.world()


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def run(command, tiny_file, tmp_path):
    """run("folder", ...) evaluates the first four scenes, one at a time -> (code, stdout, stderr, results)."""
    def one(out: str, *options) -> tuple[int, str, str, dict]:
        usual = ("--limit", 4, "--batch-size", 1, "--model", tiny_file, "--device", "cpu", "--out", tmp_path / out)
        code, printed, err = command("evaluate.py", *usual, *options)        # of an option given twice the last holds
        path = tmp_path / out / "results.json"
        return code, printed, err, json.loads(path.read_text()) if path.exists() else {}
    return one


def stop_after(monkeypatch, n: int, error: BaseException) -> list:
    """The n-th picture after this one raises `error`; the list holds the pictures' noise seeds so far."""
    seeds = []
    attend = seg4diff.attend

    def counting(*args, **kwargs):
        if len(seeds) == n:
            raise error
        seeds.extend(kwargs["seeds"])
        return attend(*args, **kwargs)
    monkeypatch.setattr(seg4diff, "attend", counting)
    return seeds


@pytest.mark.parametrize("task", ["ovss", "unsup"])
def test_a_killed_run_goes_on_where_it_stopped(run, monkeypatch, tmp_path, task):
    """To the last count, as a run that was never interrupted; no picture is computed twice."""
    code, _, err, whole = run("whole", "--task", task)
    assert code == 0, err
    with monkeypatch.context() as m:
        stop_after(m, 3, KeyboardInterrupt())
        code, out, err, _ = run("killed", "--task", task)
    assert code == 130 and out == "" and err.splitlines()[-1].startswith(STOPPED) and "Traceback" not in err
    done = [line["name"] for line in lines(tmp_path / "killed") if "counts" in line]
    assert len(done) == 3 and not (tmp_path / "killed/results.json").exists()
    (ledger,) = (tmp_path / "killed").iterdir()
    ledger.write_bytes(ledger.read_bytes()[:-7])               # and the kill fell into the writing of the third
    with monkeypatch.context() as m:
        seeds = stop_after(m, 99, KeyboardInterrupt())
        code, _, err, resumed = run("killed", "--task", task)
    names = [line["name"] for line in lines(tmp_path / "whole") if "counts" in line]
    assert code == 0, err
    assert seeds[:2] == [image_seed(name, 0) for name in names[2:]] and len(seeds) == 2 + 4      # 4 examples are drawn
    assert resumed["rows"] == whole["rows"] and resumed["n"] == 4
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_more_pictures_later(run, tmp_path):
    """A larger --limit keeps what was counted; a smaller one reports the smaller set again."""
    whole = run("whole", "--limit", 5)[3]
    small = run("grown", "--limit", 2)[3]
    assert run("grown", "--limit", 5)[3]["rows"] == whole["rows"] != small["rows"]
    assert len([line for line in lines(tmp_path / "grown") if "counts" in line]) == 5
    again = run("grown", "--limit", 2)[3]
    assert again["rows"] == small["rows"] and again["n"] == 2
    assert len(lines(tmp_path / "grown")) == 6                  # nothing was counted anew


def test_what_touches_a_number_begins_anew(run, tmp_path):
    """Each of these options is another run with a ledger of its own."""
    options = [(), ("--seed", 1), ("--draws", 2), ("--prompt", "all"), ("--resize", "crop"),
               ("--dataset", "scenes-dev"), ("--task", "unsup"), ("--dtype", "bfloat16")]
    for number, option in enumerate(options, 1):
        code, _, err, result = run("out", "--limit", 1, *option)
        assert code == 0, err
        ledgers = {path.name for path in (tmp_path / "out").glob("*.jsonl")}
        assert len(ledgers) == number and f"ledger-{result['hash']}-0.jsonl" in ledgers


def test_where_the_batch_size_may_touch_a_number_it_begins_anew(run, tmp_path):
    """In bf16 sums are rounded, and their order may depend on the batch."""
    one, two = (run("out", "--limit", 2, "--dtype", "bfloat16", "--batch-size", n)[3] for n in (1, 2))
    assert one["hash"] != two["hash"] and "bfloat16" in one["facts"]["model"]


def test_a_changed_program_begins_anew(tiny, tmp_path, monkeypatch):
    """Any line of the files that counts depend on (all of protocol.CODE), but not of what only stands beside them."""
    copy = tmp_path / "code"
    for file in (*CODE, "README.md", "evaluate.py", "support/report.py", "tools/bench.py"):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes((ROOT / file).read_bytes())
    monkeypatch.setattr("support.files.__file__", str(copy / "support/files.py"))
    ev = evaluation(tiny, DATASETS["scenes"](), "ovss")
    before = counting.identity_of(ev)
    for file in ("README.md", "evaluate.py", "support/report.py", "tools/bench.py"):
        with open(copy / file, "a") as f:
            f.write("# changed\n")
    assert counting.identity_of(ev) == before
    identities = [before]
    for file in CODE:
        with open(copy / file, "a") as f:
            f.write("# changed\n")
        identities.append(counting.identity_of(ev))
    assert len({digest(identity) for identity in identities}) == 1 + len(CODE)


def test_changed_weights_begin_anew(run, tiny_file, tmp_path):
    """The same name, other numbers in it."""
    other = tmp_path / "tiny.safetensors"
    data = bytearray(tiny_file.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    first = run("out", "--limit", 1)[3]
    second = run("out", "--limit", 1, "--model", other)[3]
    assert first["identity"]["model"][0] == second["identity"]["model"][0] and first["hash"] != second["hash"]


@pytest.mark.parametrize("short", [True, False])
def test_disk_full(run, monkeypatch, tmp_path, short):
    """The third picture's line finds no room, or for a part only: one sentence, the others are kept, and it goes on."""
    whole = run("whole")[3]
    write = os.write
    written = []

    def full(fd, data):
        if b'"counts"' in data:
            if len(written) == 2 and short:
                return write(fd, data[:30])
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(data)
        return write(fd, data)

    with monkeypatch.context() as m:
        m.setattr(os, "write", full)
        code, _, err, result = run("out")
    sentence = err.splitlines()[-1]
    assert code == 2 and sentence.startswith("error: ") and "2 pictures are kept" in sentence and not result
    assert "space left" in sentence and "ledger-" in sentence and "Traceback" not in err
    (path,) = (tmp_path / "out").iterdir()
    assert b"".join(written) in path.read_bytes()
    assert run("out")[3]["rows"] == whole["rows"]


def test_disk_full_at_once(run, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "write", lambda fd, data: 0)
        code, _, err, _ = run("out")
    assert code == 2 and err.startswith("error: ") and "0 pictures are kept" in err and err.count("\n") == 1
    assert run("out")[0] == 0


# ---------------------------------------------------------------------------- broken files


@pytest.fixture
def voc(tmp_path):
    """Eight pictures of cars and cats on a VOC tree, four of them broken, each in its own way."""
    base = tmp_path / "data/VOCdevkit/VOC2012"
    rng = np.random.default_rng(0)
    labels = np.full((40, 60), 7, np.uint8)
    labels[:, 20:] = 8
    for i in range(8):
        put(base / f"JPEGImages/p{i}.jpg", rng.integers(0, 255, (40, 60, 3)))
        put(base / f"SegmentationClass/p{i}.png", labels, palette=True)
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("".join(f"p{i}\n" for i in range(8)))
    photo = base / "JPEGImages/p1.jpg"
    photo.write_bytes(photo.read_bytes()[:-600])
    mask = base / "SegmentationClass/p2.png"
    mask.write_bytes(mask.read_bytes()[:60])
    (base / "SegmentationClass/p4.png").unlink()
    put(base / "SegmentationClass/p6.png", labels[:, :50])
    return base


BROKEN = {"p1", "p2", "p4", "p6"}


def test_broken_files_are_named_counted_and_skipped(run, voc, tmp_path):
    options = ("--dataset", "voc", "--data-root", tmp_path / "data", "--limit", 8, "--batch-size", 3)
    code, out, err, result = run("out", *options)
    assert code == 0, err
    assert result["broken"].keys() == BROKEN and result["n"] == 4
    assert result["facts"]["data"] == "voc, 4 pictures, 20 classes"
    (sentence,) = [line for line in out.splitlines() if "4 of 8 pictures could not be read" in line]
    assert all(f"{name} (" in sentence for name in BROKEN) and "(50, 40)" in sentence and "p4.png" in sentence
    ledger = Ledger(tmp_path / "out", result["identity"], result["rows"], (20, 20), truth)
    assert ledger.sum([f"p{i}" for i in range(8)])["tiny"].sum() == 4 * 40 * 60

    put(voc / "SegmentationClass/p4.png", np.full((40, 60), 8), palette=True)          # mended: it is tried again
    code, out, _, mended = run("out", *options)
    assert code == 0 and mended["broken"].keys() == BROKEN - {"p4"} and mended["n"] == 5 and "3 of 8" in out
    assert mended["hash"] != result["hash"]                                  # the files have changed


def test_other_labels_under_the_same_name_begin_anew(run, voc, tmp_path):
    """Numbers are of the files that are there, not of those that were (faults A.3)."""
    options = ("--dataset", "voc", "--data-root", tmp_path / "data", "--limit", 8, "--batch-size", 8)
    before = run("out", *options)[3]
    labels = np.full((40, 60), 7, np.uint8)
    labels[20:] = 9
    put(voc / "SegmentationClass/p0.png", labels, palette=True)
    after = run("out", *options)[3]
    assert after["hash"] != before["hash"] and after["rows"] == run("fresh", *options)[3]["rows"] != before["rows"]


def test_a_ledger_that_is_removed_meanwhile(run, tmp_path, monkeypatch):
    """Of a single process nothing is lost; what another has counted is missed, and said to be (faults C.15)."""
    whole = run("whole")[3]
    add = Ledger.add

    def removing(self, name, counts, seed):
        add(self, name, counts, seed)
        self.path.unlink()
    monkeypatch.setattr(Ledger, "add", removing)
    code, _, err, result = run("out")
    assert code == 0 and result["rows"] == whole["rows"] and result["n"] == 4, err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(counting, "world", lambda: (0, 2))                   # the other one has written nothing
    monkeypatch.setattr(counting, "wait_for_all", lambda: None)
    args = Namespace(task="ovss", seed=0, prompt="present", resize="squash", draws=1, batch_size=1, limit=4,
                     regions=None, reading=None, control="none", protocol="ours")
    with pytest.raises(ValueError, match="2 pictures that other processes counted are no longer in lost"):
        evaluate.run(args, seg4diff.load(Path(whole["arguments"]["model"])), DATASETS["scenes"](), Path("lost"))


def test_all_broken_is_an_error(run, voc, tmp_path):
    for name in ("p0", "p3", "p5", "p7"):
        (voc / f"JPEGImages/{name}.jpg").write_text("not a picture")
    code, _, err, result = run("out", "--dataset", "voc", "--data-root", tmp_path / "data", "--limit", 8)
    assert code == 2 and not result and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: none of the 8 pictures of voc could be read; the first: ")


# ---------------------------------------------------------------------------- several processes


def test_two_processes_count_as_one(run, tiny_file, tmp_path):
    """As torchrun starts them, from another folder; each does half, rank 0 alone reports."""
    options = ["--limit", "5", "--batch-size", "1", "--model", str(tiny_file), "--device", "cpu"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    two = [subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *options, "--out", str(tmp_path / "two")],
                            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, cwd=tmp_path) for r in range(2)]
    one = run("one", "--limit", 5)[3]
    printed = [p.communicate(timeout=100) for p in two]
    assert [p.returncode for p in two] == [0, 0], printed
    result = json.loads((tmp_path / "two/results.json").read_text())
    assert result["rows"] == one["rows"] and result["n"] == 5 and result["hash"] == one["hash"]
    names = [line["name"] for line in lines(tmp_path / "one") if "counts" in line]
    for rank in range(2):
        path = tmp_path / "two" / f"ledger-{result['hash']}-{rank}.jsonl"
        written = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        assert [line["name"] for line in written] == names[rank::2]
    assert all(fact in printed[0][0] for fact in result["facts"].values()) and printed[1][0] == ""

    three = run("two", "--limit", 6)[3]         # and a single process goes on from there
    assert three["n"] == 6 and len(list((tmp_path / "two").glob("*.jsonl"))) == 2
