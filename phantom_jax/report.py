"""A picture of a run: loss curves by phase, and test images with question, answer and truth."""

import json
from pathlib import Path
from typing import Any

from phantom_jax.errors import InputError

# The first is shown raw in pale, smoothed in full; a run of any length gets about this many smoothing spans.
_SPANS = 40
_COLUMNS = 4
_ROWS = 3


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, by step.

    Where a restart repeated steps, the later row of a step stands. A last line cut off by a kill is left out.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"there is no {path}. Set --workdir to the folder of a run.")
    lines = path.read_text().splitlines()
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["step"], _is_validation(row)] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise InputError(f"line {number} of {path} is not a metrics row: {line[:60]!r}.") from error
    return [rows[key] for key in sorted(rows)]


def report(workdir: str, output: str, *, evaluation: str | None = None) -> str:
    """Draws the picture.

    Args:
      workdir: folder of a run, with its metrics.jsonl.
      output: the picture's file; its ending chooses the format.
      evaluation: the folder that `evaluate` wrote its results and images to; without it there are curves alone.

    Returns:
      `output`.
    """
    rows = read_metrics(workdir)
    results = None
    if evaluation is not None:
        path = Path(evaluation) / "results.json"
        if not path.is_file():
            raise InputError(f"there is no {path}. Run evaluate with --output={evaluation} first.")
        results = json.loads(path.read_text())
    figure = draw(rows, results, folder=evaluation)
    if not Path(output).suffix:
        raise InputError(f"the picture's name {output!r} has no ending. Set --output to a .png, .svg or .pdf file.")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=130)
    except ValueError as error:
        raise InputError(f"the picture {output!r} cannot be written: {error}. Set --output to a .png file.") from error
    return output


def draw(rows: list[dict[str, Any]], results: dict[str, Any] | None, *, folder: str | None) -> Any:
    """The picture as a matplotlib Figure.

    Args:
      rows: as `read_metrics` gives them.
      results: what `evaluate` found; without it there are curves alone.
      folder: where the images are that the results name.
    """
    try:
        # Figure alone, not pyplot: no display, no state shared between calls.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs matplotlib. Install it: pip install 'phantom-jax[quickstart]'.") from error
    figure = Figure(figsize=(11, 4 if results is None else 9), layout="constrained")
    if results is None:
        _draw_curves(figure.subplots(), rows)
    else:
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.25))
        _draw_curves(upper.subplots(), rows)
        _draw_answers(lower, results, Path(folder))
    return figure


def smooth(values: list[float], span: int) -> list[float]:
    """The exponential moving average over about `span` values, unbiased at the start."""
    keep = 1 - 1 / max(span, 1)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def _is_validation(row: dict[str, Any]) -> bool:
    return any(key.startswith("validation/") for key in row)


def _draw_curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    phases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "train/loss" in row:
            phases.setdefault(row["phase"], []).append(row)
    if not phases:
        raise InputError("metrics.jsonl holds no row with a loss. Train for at least one step first.")
    for number, (name, part) in enumerate(phases.items()):
        steps = [row["step"] for row in part]
        losses = [row["train/loss"] for row in part]
        axes.plot(steps, losses, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses, len(losses) // _SPANS), color=f"C{number}", label=name)
        axes.axvspan(steps[0], steps[-1], color=f"C{number}", alpha=0.05, linewidth=0)
    axes.set(xlabel="step", ylabel="training loss")
    if all(row["train/loss"] > 0 for part in phases.values() for row in part):
        axes.set_yscale("log")
    handles, labels = axes.get_legend_handles_labels()
    points = [(row["step"], 100 * row[key]) for row in rows for key in row if key == "validation/exact_match"]
    if points:
        right = axes.twinx()
        right.plot(
            *zip(*points, strict=True), color="black", marker=".", linewidth=1, label="exact match on validation"
        )
        right.set(ylabel="exact match, %", ylim=(0, 100))
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(labels)}
    axes.legend(handles, labels, fontsize="small", frameon=False, **place)


def _draw_answers(figure: Any, results: dict[str, Any], folder: Path) -> None:
    from PIL import Image

    name = list(results["models"])[-1]
    examples = [example for example in results["examples"] if "image" in example]
    examples = examples[:: max(len(examples) // (_COLUMNS * _ROWS), 1)][: _COLUMNS * _ROWS]
    grid = figure.subplots(_ROWS, _COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, example in zip(grid, examples, strict=False):
        answer = example["answers"][name]
        right = answer == example["truth"]
        with Image.open(folder / example["image"]) as image:
            axes.imshow(image.convert("RGB"))
        text = f"{example['question']}\nanswer {answer}, truth {example['truth']}"
        axes.set_title(text, fontsize=9, color="green" if right else "red", parse_math=False)
    right, count = results["models"][name]["all"]["all"]
    text = f"{results['split']} split: {right:,} of {count:,} answers right ({100 * right / count:.1f} %)"
    figure.suptitle(text, fontsize="medium")
