"""T2I-CompBench++: pictures named as its evaluators want them, and a table from result files made by hand."""
import json

import pytest
from PIL import Image

import seg4diff
from support import ledger
from tools import compbench
from tools.experiments import LORA

TOOL = "tools/compbench.py"
NAMES = [f"a red car_{n:06d}.png" for n in range(10)] + [f"snow._{n:06d}.png" for n in range(10, 20)]


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What `generate` was told, picture by picture; each has a colour of its own."""
    calls = []

    def generate(model, prompt, **options):
        calls.append({"prompt": prompt, **options})
        return [Image.new("RGB", (8, 8), (options["seed"], options["steps"] or 0, len(prompt)))]
    monkeypatch.setattr(seg4diff, "generate", generate)
    return calls


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "samples").iterdir())}


def test_export(command, tiny_file, tmp_path, asked):
    """Ten pictures a prompt, each from its own number's noise; an interrupted export ends the same, seed and all."""
    (tmp_path / "color_val.txt").write_text("a red car\tleft out\n\nsnow.\n")
    run = (TOOL, "export", "color_val.txt", "--model", tiny_file, "--device", "cpu", "--out", "out/color")
    assert command(*run, "--cfg", "nan")[0] == 2         # claims no folder
    code, out, err = command(*run, "--seed", 3, "--steps", 4, "--cfg", 2)
    assert code == 0 and "20 pictures of 2 prompts" in out, err
    first = pictures(tmp_path / "out/color")
    assert sorted(first) == NAMES and [(x["prompt"], x["seed"]) for x in asked] == [
        ("a red car", n + 3) for n in range(10)] + [("snow.", n + 3) for n in range(10, 20)]
    assert all((x["steps"], x["cfg"], x["pag"]) == (4, 2, 0) for x in asked)

    asked.clear()
    (tmp_path / "out/color/samples/a red car_000002.png").unlink()
    assert command(*run, "--seed", 3, "--steps", 4, "--cfg", 2)[0] == 0
    assert [x["seed"] for x in asked] == [5] and pictures(tmp_path / "out/color") == first

    code, _, err = command(*run)
    assert code == 2 and "cfg 2.0 instead of 3.0; seed 3 instead of 0;" in err and err.count("\n") == 1
    (tmp_path / "out/color/samples/notes.txt").touch()
    code, _, err = command(*run, "--seed", 3, "--steps", 4, "--cfg", 2)
    assert code == 2 and "no picture of these prompts, 'notes.txt' first" in err and err.count("\n") == 1
    (tmp_path / "out/color/identity.json").unlink()
    code, _, err = command(*run, "--seed", 4)
    assert code == 2 and "pictures without the identity.json" in err
    assert pictures(tmp_path / "out/color").items() >= first.items()


def test_a_lora_is_in_the_export(command, tmp_path, asked, monkeypatch):
    loaded = []
    load = seg4diff.load
    monkeypatch.setattr(seg4diff, "load", lambda *args, **options: loaded.append(options) or load(*args, **options))
    (tmp_path / "p.txt").write_text("snow.\n")
    for out, more in (("a", ()), ("b", ("--lora", LORA))):
        assert command(TOOL, "export", "p.txt", "--model", "nano", "--device", "cpu", "--out", out, *more)[0] == 0
    a, b = (json.loads((tmp_path / out / "identity.json").read_text()) for out in "ab")
    assert [options["lora"] for options in loaded] == [None, LORA] and a["fingerprint"] != b["fingerprint"]


def test_processes_share_an_export(command, tiny_file, tmp_path, asked, monkeypatch):
    (tmp_path / "p.txt").write_text("a red car\nsnow.\n")
    monkeypatch.setattr(ledger, "wait_for_all", lambda: None)
    for rank in range(2):
        monkeypatch.setattr(ledger, "world", lambda rank=rank: (rank, 2))
        command(TOOL, "export", "p.txt", "--model", tiny_file, "--device", "cpu", "--out", "out")
        assert len(asked) == 10 * (rank + 1)
    assert sorted(pictures(tmp_path / "out")) == NAMES and {x["seed"] for x in asked} == set(range(20))


@pytest.mark.parametrize("text, says", [
    ("\n", "holds no prompt"), ("a and/or b", "holds '_' or '/'"), ("a_b", "holds '_' or '/'"),
    ("b" * 300, "too long"), ("\u00fc" * 120, "too long")])
def test_prompts_that_no_file_can_be_named_by(command, tmp_path, text, says):
    (tmp_path / "p.txt").write_text("a red car\n" + text if text.strip() else text)
    code, _, err = command(TOOL, "export", "p.txt", "--model", "nano", "--out", "out")
    assert code == 2 and says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- the table


def write_result(root, category, folder, answers):
    path = root / category / folder / "vqa_result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"question_id": number, "answer": answer} for number, answer in answers]))
    return path


def row(out, label):
    (line,) = [line for line in out.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def test_table(command, tmp_path):
    """Texts or numbers, in any order; errors over prompts: means 0.2, 0.4 and 0.6 of ten pictures each."""
    root = tmp_path / "sd3"
    answers = [(10 * i + n, f"{0.2 * (i + 1):.4f}") for i in range(3) for n in range(10)]
    write_result(root, "color", "annotation_blip", answers[::-1])
    write_result(root, "spatial", "labels/annotation_obj_detection_2d", [(0, 0), (1, 0.5)])
    write_result(root, "numeracy", "annotation_num", [(n, 0.25) for n in range(20)])
    code, out, err = command(TOOL, "table", root)
    assert code == 0, err
    assert row(out, "Table 4") == list(compbench.COLUMNS)
    assert row(out, "sd3, ours") == ["0.4000", "-", "-", "0.2500", "-", "-", "0.2500", "-"]
    assert row(out, "  standard error") == ["0.1155", "-", "-", "nan", "-", "-", "0.0000", "-"]      # 0.2 / sqrt(3)
    assert row(out, "Baseline, the paper's") == [f"{x:.4f}" for x in compbench.PAPER["Baseline"]]
    assert row(out, "+ MAGNET, COCO, the paper's")[0] == "0.7919"
    assert "pictures: Color 30, 2D 2, Num. 20" in out and "not evaluated: Shape, Texture, 3D, non, Comp." in out


def test_every_column_is_read_from_its_own_file(command, tmp_path):
    for i, (category, folder) in enumerate(compbench.COLUMNS.values()):
        write_result(tmp_path, category, folder, [(0, i / 10)])
    code, out, _ = command(TOOL, "table", tmp_path)
    assert code == 0 and row(out, f"{tmp_path.name}, ours") == [f"{i / 10:.4f}" for i in range(8)]
    assert "not evaluated" not in out


def test_the_papers_numbers():
    """Table 4: a number for each column; what its text says, MAGNET of COCO first in color, numeracy and complex."""
    rows = {name: dict(zip(compbench.COLUMNS, values, strict=True)) for name, values in compbench.PAPER.items()}
    for column in ("Color", "Num.", "Comp."):
        assert max(rows, key=lambda name: rows[name][column]) == "+ MAGNET, COCO"
    assert rows["Baseline"]["2D"] == 0.2435 and rows["+ MAGNET, SA-1B"]["Comp."] == 0.3709


@pytest.mark.parametrize("content, says", [
    ("{}", "should be a list"), ("[]", "numbered from 0"), ("[1]", "a row should be an object"),
    ('[{"question_id": 0}]', "KeyError"), ('[{"question_id": "0", "answer": 1}]', "whole number"),
    ('[{"question_id": 0, "answer": "x"}]', "could not convert"), ('[{"question_id": 0, "answer": NaN}]', "finite"),
    ('[{"question_id": 1, "answer": 1}]', "numbered from 0"),
    ('[{"question_id": 0, "answer": 1}, {"question_id": 0, "answer": 1}]', "each number once")])
def test_broken_results_are_sentences(command, tmp_path, content, says):
    path = write_result(tmp_path, "color", "annotation_blip", [])
    path.write_text(content)
    code, out, err = command(TOOL, "table", tmp_path)
    assert code == 2 and says in err and str(path) in err and err.count("\n") == 1 and not out


def test_no_results_at_all(command, tmp_path):
    code, _, err = command(TOOL, "table", tmp_path)
    assert code == 2 and "color/annotation_blip/vqa_result.json" in err and "3d_spatial" in err
