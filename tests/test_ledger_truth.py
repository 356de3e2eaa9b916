"""Lines of a ledger whose rows count different pixels, or more than there are, are counted again."""
import json

import numpy as np
import pytest
from test_ledger import opened


def test_rows_that_disagree_about_the_truth_are_counted_again(tmp_path):
    """All rows of a picture see the same pixels of each class, as many as the line says."""
    ledger = opened(tmp_path)
    line = {"seed": 0, "pixels": 7, "hash": ledger.hash}
    rows = {"name": {"tiny": [[0, 0, 3], [1, 0, 4]], "floor": [[0, 3, 1], [0, 2, 2], [1, 1, 4]]},
            "all of one row twice": {"tiny": [[0, 0, 6], [1, 0, 8]], "floor": [[0, 3, 3], [1, 1, 4]]},
            "all of both twice": {"tiny": [[0, 0, 6], [1, 0, 8]], "floor": [[0, 3, 6], [1, 1, 8]]},
            "as many, of other classes": {"tiny": [[0, 0, 3], [1, 0, 4]], "floor": [[0, 3, 4], [1, 1, 3]]},
            "nothing": {}}
    for name, counts in rows.items():
        ledger.write("\n" + json.dumps(line | {"name": name, "counts": counts}))
    assert set(opened(tmp_path).done) == {"name"}
    with pytest.raises(RuntimeError, match="rows of b were counted over different pixels"):
        ledger.add("b", {"tiny": np.eye(4, dtype=int), "floor": 2 * np.eye(4, dtype=int)}, seed=0)


@pytest.mark.parametrize("task", ["ovss", "unsup", "readings"])
def test_a_ledger_whose_counts_are_multiplied(command, tiny_file, tmp_path, task):
    """In one row or in all, alike: counted again, whatever is counted; scores are those from before."""
    def rows():
        code, _, err = command("evaluate.py", "--task", task, "--limit", 2, "--model", tiny_file, "--out", "out")
        assert code == 0, err
        return json.loads((tmp_path / "out/results.json").read_text())["rows"]

    whole = rows()
    (path,) = (tmp_path / "out").glob("*.jsonl")
    first, *texts = path.read_text().splitlines()
    for chosen in (1, len(whole)):
        found = [json.loads(text) for text in texts]
        for line in found:
            for cells in list(line["counts"].values())[:chosen]:
                for cell in cells:
                    cell[2] *= 3
        path.write_text("\n".join([first, *map(json.dumps, found)]))
        assert rows() == whole and path.read_text().splitlines()[3:] == texts
