"""What a store says about itself, and whether this version may read or write it."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from repmatch import __version__
from repmatch.errors import StoreCorruptError, StoreVersionError, quote_list
from repmatch.store import migrations

_OBJECTS = {
    "view": "SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name <> 'main'",
    "macro": "SELECT function_name FROM duckdb_functions() WHERE NOT internal",
    "trigger": "SELECT trigger_name FROM duckdb_triggers()",
}


_ALWAYS = ("schema", "min_reader", "uuid", "created", "created_by")


def read_meta(conn: Any) -> dict[str, str]:
    """Read the store's facts about itself.

    Args:
        conn: an open connection.

    Returns:
        `schema`, `min_reader`, `uuid`, `created`, `created_by`; `schema_version`, the version of repmatch that brought
        it to its schema, where that was written down.

    Raises:
        StoreCorruptError: one of those that are always there is not.
    """
    found = dict(conn.execute("SELECT key, value FROM registry.meta").fetchall())
    missing = [key for key in _ALWAYS if not isinstance(found.get(key), str)]
    if missing:
        raise StoreCorruptError(
            f"the catalog does not say what every catalog says of itself ({quote_list(missing)} missing in "
            "registry.meta). Restore the store from a backup."
        )
    return found


def schema_of(conn: Any, path: Path) -> tuple[int, int]:
    """Return a catalog's schema and the least one that a reader must know.

    Args:
        conn: an open connection.
        path: the catalog, for the message.

    Raises:
        StoreCorruptError: the database is not a catalog of ours.
    """
    import duckdb

    try:
        meta = dict(conn.execute("SELECT key, value FROM registry.meta").fetchall())
        found, least = int(meta["schema"]), int(meta["min_reader"])
        if found < 1:
            raise ValueError(found)
        return found, least
    except (duckdb.CatalogException, duckdb.BinderException, KeyError, TypeError, ValueError) as error:
        raise StoreCorruptError(
            f"{path} is a DuckDB database but not a catalog of repmatch (registry.meta cannot be read). Name another "
            "folder with --store, or restore it from a backup."
        ) from error


def check_version(conn: Any, path: Path, write: bool) -> None:
    """Refuse a catalog whose schema this version does not know.

    Args:
        conn: an open connection.
        path: the catalog, for the message.
        write: whether it is to be written.

    Raises:
        StoreVersionError: the schema is newer, or older and not migrated yet.
        StoreCorruptError: the database is not a catalog of ours.
    """
    found, least = schema_of(conn, path)
    known = migrations.schema()
    if found > known and (write or least > known):
        by = str(read_meta(conn).get("schema_version", ""))
        named = re.fullmatch(r"\d[\w.+-]{0,30}", by)
        raise StoreVersionError(
            f"the store {path.parent} has schema {found}{f', which repmatch {by} knows' if named else ''}; repmatch "
            f"{__version__} knows schema {known}"
            + (". " if least > known else " and can read this store (mode='r'), but not write to it. ")
            + (f"Upgrade with: pip install -U 'repmatch>={by}'" if named else "Upgrade with: pip install -U repmatch")
        )
    if found < known:
        raise StoreVersionError(
            f"the store {path.parent} has schema {found}; repmatch {__version__} needs schema {known}. Bring it up to "
            f"date, which keeps a copy of its catalog, with: repmatch --store {shlex.quote(str(path.parent))} compact, "
            "or in Python repmatch.open(path, mode='w')"
        )


def check_objects(conn: Any, path: Path) -> None:
    """Refuse a catalog that would do more than hold rows: views in place of tables, macros, triggers.

    Args:
        conn: an open connection.
        path: the catalog, for the message.

    Raises:
        StoreCorruptError: there is such a thing.
    """
    import duckdb

    found = []
    for kind, query in _OBJECTS.items():
        with suppress(duckdb.CatalogException):  # a DuckDB without triggers has no list of them
            found += [f"{kind} {name}" for (name,) in conn.execute(query).fetchall()]
    if found:
        raise StoreCorruptError(
            f"the catalog {path} holds what no version of repmatch puts there ({quote_list(found)}), and nothing of it "
            "was run. Do not use this store; ask where it came from."
        )
