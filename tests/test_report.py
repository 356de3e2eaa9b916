"""What the plots of an evaluation say beside their numbers: whose they are, and on which scale."""
from types import SimpleNamespace

import pytest

from support import report


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    figures = []
    monkeypatch.setattr(report, "write_figure", lambda path, fig, dpi: figures.append(fig))
    return figures


def test_blocks_are_a_models_and_its_expert_is_marked(drawn, tmp_path):
    variants = [SimpleNamespace(name=f"block {block} {kind}") for kind in ("I2T", "T2I") for block in range(3)]
    rows = {v.name: {"mIoU": 10.0} for v in variants} | {"floor": {"mIoU": 5.0}, "ceiling": {"mIoU": 90.0}}
    model = SimpleNamespace(name="tiny", preset=SimpleNamespace(block=1),
                            transformer=SimpleNamespace(config=SimpleNamespace(depth=3)))
    report.plot("layers", variants, rows, model, tmp_path / "layers.png")
    (ax,) = drawn[0].axes
    assert ax.get_title().startswith("tiny: ")
    (expert,) = [line for line in ax.lines if line.get_label() == "expert block, 1"]
    assert list(expert.get_xdata()) == [1, 1]


def test_the_tables_of_a_waterfall_share_an_axis(drawn, tmp_path):
    def rows(above):
        return {name: {"mIoU": 80 + x, "above ours": [x] * 3} for name, x in (("ours", 0), ("resize", above))}
    report.plot_waterfall({"Table 1": rows(-0.02), "Table 2": rows(-11)}, "tiny, scenes", tmp_path / "waterfall.png")
    left, right = drawn[0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_xlim()[0] < -11
    assert "tiny, scenes" in drawn[0].get_suptitle()
