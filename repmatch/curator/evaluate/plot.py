"""Retraining curves as a picture."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmatch.curator.destination import check_destination, has_mark, whole_file
from repmatch.curator.evaluate.results import Evaluation
from repmatch.curator.evaluate.statistics import Interval
from repmatch.errors import MissingExtraError, RepMatchError, UsageError

if TYPE_CHECKING:
    from repmatch.store import Store

MARK = "repmatch evaluate"
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": MARK},
    ".svg": {"Creator": MARK, "Date": None},
    ".pdf": {"Creator": MARK},
}
FORMATS = tuple(_METADATA)


def check_plot(path: Path, store: Store | None = None, *, force: bool = False) -> None:
    """Refuse a picture that could not be drawn or written, before any work is done.

    Args:
        path: the file.
        store: the store at hand, whose sources are refused.
        force: replace a file that is no earlier picture too.

    Raises:
        UsageError: its ending is no format, its folder does not exist, it lies in a store, or there is a file of
            somebody else's.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} ends in no picture format; expected one of {', '.join(FORMATS)}.")
    check_destination(path, store, ours=partial(has_mark, mark=MARK), force=force)
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("a plot", "evaluate") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _reach(found: Interval) -> float:
    """Return half the width of an interval in percent; 0 for a single value."""
    return 0.0 if found.high is None else 100 * (found.high - found.mean)


def plot(found: Evaluation, path: Path, *, force: bool = False) -> None:
    """Draw accuracy against size, a line a candidate, with 95 % intervals; the full dataset is a dotted line.

    Args:
        found: the curves.
        path: a file ending in .png, .svg or .pdf; an earlier picture is replaced.
        force: replace a file that is no earlier picture too.

    Raises:
        UsageError: as of `check_plot`.
        MissingExtraError: matplotlib is not installed.
        RepMatchError: the file cannot be written.
    """
    check_plot(path, force=force)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(line.candidate for line in found.lines))
    for at, name in enumerate(names):
        lines = [line for line in found.lines if line.candidate == name]
        colour = "black" if name == "random" else f"C{at % 10}"
        means = [100 * line.accuracy.mean for line in lines]
        if name == "full":
            axes.axhline(means[0], color="grey", linestyle=":", label=f"full ({lines[0].size} rows)")
            continue
        reach = [_reach(line.accuracy) for line in lines]
        style = {"color": colour, "marker": "o", "capsize": 3, "linestyle": "--" if name == "random" else "-"}
        axes.errorbar([line.size for line in lines], means, yerr=reach, label=name, **style)
    sizes = sorted({line.size for line in found.lines if line.candidate != "full"})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("rows trained on")
    axes.set_ylabel(f"accuracy on {found.test_rows} held-out rows, %")
    axes.set_title(f"{found.dataset}: {found.lines[0].steps} steps each, 95 % intervals over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    ending, drawn = path.suffix.lower(), BytesIO()
    figure.savefig(drawn, format=ending[1:], dpi=150, metadata=_METADATA[ending])
    pyplot.close(figure)
    try:
        with whole_file(path) as write:
            write(drawn.getvalue())
    except OSError as error:
        raise RepMatchError(f"{path} cannot be written: {error.strerror}; choose another place.") from error
