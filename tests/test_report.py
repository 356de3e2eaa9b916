"""What the plots of an evaluation say beside their numbers: whose they are, and on which scale."""
from types import SimpleNamespace

import numpy as np
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


def test_layers_each_under_its_name(drawn, tmp_path):
    variants = [SimpleNamespace(name=f"block {block} {kind}") for kind in ("I2T", "T2I") for block in range(3)]
    rows = {v.name: {"mIoU": float(i)} for i, v in enumerate(variants)}
    model = SimpleNamespace(name="tiny", preset=SimpleNamespace(block=1),
                            transformer=SimpleNamespace(config=SimpleNamespace(depth=3)))
    report.plot("layers", variants, rows, model, tmp_path / "a.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[0].lines}
    assert lines["image-to-text"] == [0, 1, 2] and lines["text-to-image"] == [3, 4, 5]


def test_heads_each_in_its_cell(drawn, tmp_path):
    variants = [SimpleNamespace(name=f"block {b} head {h}", block=b, head=h) for b in range(3) for h in range(2)]
    rows = {v.name: {"mIoU": 10.0 * v.block + v.head} for v in variants}
    model = SimpleNamespace(name="tiny", transformer=SimpleNamespace(config=SimpleNamespace(depth=3, heads=2)))
    report.plot("heads", variants, rows, model, tmp_path / "a.png")
    (image,) = drawn[0].axes[0].images
    assert np.asarray(image.get_array()).tolist() == [[0, 10, 20], [1, 11, 21]]          # a row to a head


def test_dotted_lines_are_floors(drawn, tmp_path):
    variants = [SimpleNamespace(name=f"map {t}", threshold=t, scaling="map") for t in (0.1, 0.2)]
    rows = {v.name: {"mIoU": 50.0} for v in variants} | {f"{v.name} floor": {"mIoU": 5.0} for v in variants}
    report.plot("thresholds", variants, rows, SimpleNamespace(name="tiny"), tmp_path / "a.png")
    solid, dotted = drawn[0].axes[0].lines
    assert list(solid.get_ydata()) == [50, 50] and list(dotted.get_ydata()) == [5, 5]
