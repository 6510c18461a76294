"""How DuckDB is given a file: by its absolute path and as a DuckDB database, so that a name decides nothing else.

Left to itself, DuckDB reads a path as more than a path: "~" is the home folder, "md:" and "sqlite:" name extensions,
which it looks for on the network, and so does a file that begins like a database of SQLite.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from repmatch.errors import UsageError

_CUT_BY_DUCKDB = {"?": "a question mark", "\\": "a backslash"}
_NO_EXTENSIONS = {"autoload_known_extensions": "false", "autoinstall_known_extensions": "false"}


def folder_of(path: str | Path) -> Path:
    """Return the folder that a user's name for a store means.

    Args:
        path: as it was typed; a leading "~" is the home folder.

    Returns:
        The folder, which may not exist.

    Raises:
        UsageError: the name is empty or no text in UTF-8, or has a character at which DuckDB would cut it.
    """
    if not str(path):
        raise UsageError("the name of the store is empty; expected a folder, such as repmatch-store.")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the name of the store, {str(path)!r}, is not UTF-8; choose another folder.") from error
    folder = Path(path)
    with suppress(RuntimeError):  # "~nobody", where there is no such user, is a name like others
        folder = folder.expanduser()
    for character, words in _CUT_BY_DUCKDB.items():
        if character in str(folder.absolute()):
            raise UsageError(
                f"the store {str(folder.absolute())!r} has {words} in its path, where DuckDB would cut it. Rename the "
                "folder, or name another with --store."
            )
    return folder


def connect(path: Path, *, read_only: bool = False, config: dict[str, Any] | None = None) -> Any:
    """Open a database, and nothing but a database.

    Args:
        path: its file, which is made where it is not there.
        read_only: for reading only.
        config: settings of DuckDB besides.

    Returns:
        A DuckDB connection.
    """
    import duckdb

    return duckdb.connect(f"duckdb:{path.absolute()}", read_only=read_only, config=_NO_EXTENSIONS | (config or {}))


def attach(conn: Any, path: Path, name: str) -> None:
    """Attach a database for reading.

    Args:
        conn: an open connection.
        path: the database's file.
        name: what it is called in SQL.
    """
    where = str(path.absolute()).replace("'", "''")
    conn.execute(f"ATTACH '{where}' AS {name} (TYPE duckdb, READ_ONLY)")


def hide_progress(conn: Any) -> None:
    """Turn DuckDB's progress bar off, which would print to standard output.

    Args:
        conn: an open connection.
    """
    import duckdb

    with suppress(duckdb.InvalidInputException):  # a notebook without ipywidgets has no bar, and says so
        conn.execute("SET enable_progress_bar = false")


def confine(conn: Any) -> None:
    """Keep a connection from files, the network and extensions, whatever a view or macro in the database asks for.

    Args:
        conn: an open connection.
    """
    conn.execute(
        "SET autoload_known_extensions = false; SET autoinstall_known_extensions = false; "
        "SET enable_external_access = false"
    )


def first(result: Any) -> Any:
    """Return the first row of a result; the rest is fetched too, for an unfinished result blocks the connection.

    Args:
        result: what `execute` returned.

    Returns:
        The row as a tuple, or None.
    """
    rows = result.fetchall()
    return rows[0] if rows else None
