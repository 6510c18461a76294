"""Results as tables: polars, Arrow, pandas, and HTML for notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from repmatch.errors import RepMatchError

if TYPE_CHECKING:
    import polars as pl

_SHOWN = 12


class Tabular:
    """A result that is a table: whatever reads Arrow's C stream (pandas, DuckDB, pyarrow) takes it as it is."""

    def to_polars(self) -> pl.DataFrame:
        """Return the result as a polars frame."""
        raise NotImplementedError

    def to_arrow(self) -> Any:
        """Return the result as a `pyarrow.Table`."""
        return self.to_polars().to_arrow()

    def to_pandas(self) -> Any:
        """Return the result as a pandas frame.

        Raises:
            RepMatchError: pandas is not installed.
        """
        try:
            import pandas  # noqa: F401 -- polars imports it, with a longer message
        except ImportError as error:
            raise RepMatchError("a pandas frame needs pandas. Install it with: pip install pandas") from error
        return self.to_polars().to_pandas()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Export through Arrow's C stream interface."""
        return self.to_polars().__arrow_c_stream__(requested_schema)

    @property
    def headline(self) -> str:
        """What a notebook shows above the table."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.headline}\n{self.to_polars()}"  # every number, as a dataclass prints itself, helps nobody

    def _repr_html_(self) -> str:
        frame = self.to_polars()
        more = f"; the first {_SHOWN} of {frame.height} rows" if frame.height > _SHOWN else ""
        return f"<p><b>{html.escape(self.headline)}</b>{more}</p>{html_table(frame.head(_SHOWN))}"


def html_table(frame: pl.DataFrame) -> str:
    """Return a frame as an HTML table, texts escaped.

    Args:
        frame: few rows.

    Returns:
        The element.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in frame.columns)
    rows = ["".join(f"<td>{_cell(value)}</td>" for value in row) for row in frame.iter_rows()]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value[:12]) + (", …" if len(value) > 12 else "")
    text = str(value)
    return html.escape(text if len(text) <= 160 else text[:159] + "…")
