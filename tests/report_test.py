"""The picture of a run, from metrics and results as files."""

import json

import pytest
from PIL import Image

from phantom_jax.errors import InputError
from phantom_jax.report import draw, read_metrics, report, smooth


def _write_metrics(folder, rows, ending="\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + ending)


ROWS = [
    {"step": step, "phase": "first" if step < 60 else "second", "train/loss": 3 / (1 + step)} for step in range(100)
]
ROWS += [{"step": 59, "phase": "first", "validation/loss": 0.1, "validation/exact_match": 0.5}]


@pytest.fixture
def evaluation(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    examples = []
    for number in range(14):
        Image.new("L", (32 * (1 + number % 6), 32), number * 10).save(folder / f"{number:03d}.png")
        examples.append(
            {"question": "Read.", "truth": "1", "answers": {"a": "0", "b": "1"}, "image": f"{number:03d}.png"}
        )
    results = {
        "split": "test",
        "models": {name: {"all": {"all": [7, 14]}} for name in ("a", "b")},
        "examples": examples,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_written(tmp_path, evaluation, ending):
    pytest.importorskip("matplotlib")
    _write_metrics(tmp_path / "run", ROWS)
    output = tmp_path / "new" / f"report.{ending}"
    assert report(str(tmp_path / "run"), str(output), evaluation=str(evaluation)) == str(output)
    assert output.stat().st_size > 10_000
    if ending == "png":
        with Image.open(output) as image:
            assert image.width > 1000 and image.height > 1000
    else:
        text = output.read_text()
        assert "<svg" in text


def test_every_curve_and_image_is_drawn(tmp_path, evaluation):
    pytest.importorskip("matplotlib")
    _write_metrics(tmp_path, ROWS)
    results = json.loads((evaluation / "results.json").read_text())
    results["examples"][0]["answers"]["b"] = "$7$ _"
    curves, images = draw(read_metrics(tmp_path), results, folder=str(evaluation)).subfigs
    assert len(curves.axes[0].lines) == 4, "raw and smoothed, for two phases"
    assert curves.axes[1].lines[0].get_ydata().tolist() == [50.0]
    drawn = [axes for axes in images.axes if axes.images]
    assert len(drawn) == 12
    titles = [axes.title for axes in drawn]
    assert [title.get_color() for title in titles] == ["red"] + ["green"] * 11
    assert titles[1].get_text() == "Read.\nanswer 1, truth 1"


def test_curves_alone(tmp_path):
    pytest.importorskip("matplotlib")
    _write_metrics(tmp_path / "run", ROWS)
    report(str(tmp_path / "run"), str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("rows", "output", "message"),
    [
        ([], "a.png", "holds no row with a loss"),
        (ROWS, "noending", "has no ending"),
        (ROWS, "a.nothing", "cannot be written"),
    ],
)
def test_bad_input(tmp_path, rows, output, message):
    pytest.importorskip("matplotlib")
    _write_metrics(tmp_path, rows, ending="")
    with pytest.raises(InputError, match=message):
        report(str(tmp_path), str(tmp_path / output))


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="there is no .*metrics.jsonl"):
        read_metrics(tmp_path)
    _write_metrics(tmp_path, ROWS)
    with pytest.raises(InputError, match="there is no .*results.json"):
        report(str(tmp_path), str(tmp_path / "a.png"), evaluation=str(tmp_path))


def test_a_restart_repeats_steps(tmp_path):
    """Rows since the last checkpoint are written again by the restarted run; the later ones stand."""
    first = [{"step": step, "phase": "a", "train/loss": 1.0} for step in range(10)]
    again = [{"step": step, "phase": "a", "train/loss": 2.0} for step in range(6, 12)]
    _write_metrics(tmp_path, first + again)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["train/loss"] for row in rows] == [1.0] * 6 + [2.0] * 6


def test_a_cut_off_last_line_is_left_out_but_no_other(tmp_path):
    _write_metrics(tmp_path, ROWS[:3], ending='\n{"step": 3, "lo')
    assert len(read_metrics(tmp_path)) == 3
    _write_metrics(tmp_path, ROWS[:3], ending='\n{"step"\n{"step": 4}\n')
    with pytest.raises(InputError, match="line 4 of .* is not a metrics row"):
        read_metrics(tmp_path)


def test_smoothing_has_no_bias_at_the_start():
    assert smooth([2.0, 2.0, 2.0], 10) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert smooth([], 3) == []
