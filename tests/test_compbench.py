"""T2I-CompBench++: pictures named as its evaluators want them, and a table from result files made by hand."""
import json

import numpy as np
import pytest
from PIL import Image
from test_analysis import quick_file  # noqa: F401 - a fixture

import seg4diff
from tools import compbench

TOOL = "tools/compbench.py"


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "samples").iterdir())}


def test_export(command, quick_file, tmp_path):  # noqa: F811
    """Ten pictures a prompt, each from its own number's noise; an interrupted export ends the same, seed and all."""
    (tmp_path / "color_val.txt").write_text("a red car\tleft out\n\nsnow.\n")
    run = (TOOL, "export", "color_val.txt", "--model", quick_file, "--device", "cpu", "--out", "out/color",
           "--steps", 1)
    code, out, err = command(*run, "--seed", 3)
    assert code == 0 and "20 pictures of 2 prompts" in out, err
    first = pictures(tmp_path / "out/color")
    names = [f"a red car_{n:06d}.png" for n in range(10)] + [f"snow._{n:06d}.png" for n in range(10, 20)]
    assert sorted(first) == names and len({x.tobytes() for x in first.values()}) == 20
    model = seg4diff.load(quick_file, "cpu")
    want = np.asarray(seg4diff.generate(model, "snow.", seed=3 + 12, steps=1)[0]).astype(int)
    assert np.abs(first["snow._000012.png"] - want).max() <= 2               # another batch rounds otherwise

    kept = tmp_path / "out/color/samples/snow._000019.png"
    (tmp_path / "out/color/samples/a red car_000000.png").unlink()
    before = kept.stat().st_mtime_ns
    assert command(*run, "--seed", 3)[0] == 0
    again = pictures(tmp_path / "out/color")
    assert again.keys() == first.keys() and all((again[name] == first[name]).all() for name in names)
    assert kept.stat().st_mtime_ns == before

    for option, what in ((("--seed", 4), "seed"), (("--seed", 3, "--steps", 2), "steps"), (("--cfg", 1), "seed, cfg")):
        code, _, err = command(*run, *option)
        assert code == 2 and f"pictures of another {what};" in err and err.count("\n") == 1
    (tmp_path / "out/color/samples/notes.txt").touch()
    code, _, err = command(*run, "--seed", 3)
    assert code == 2 and "holds 1 files that are no pictures of these prompts" in err


def test_options_of_export(command, quick_file, tmp_path):  # noqa: F811
    (tmp_path / "p.txt").write_text("snow")
    made = []
    for i, option in enumerate((("--steps", 2), ("--steps", 1), ("--steps", 1, "--cfg", 1))):
        out = tmp_path / str(i)
        assert command(TOOL, "export", "p.txt", "--model", quick_file, "--out", out, "--device", "cpu", *option)[0] == 0
        made.append(pictures(out)["snow_000000.png"])
    assert (made[0] != made[1]).any() and (made[1] != made[2]).any()


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
