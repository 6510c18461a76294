"""The adapter store: a DuckDB catalog with factor values in append-only segment files."""

from repmatch.store.compaction import Compacted
from repmatch.store.datasets import Subset
from repmatch.store.health import Finding
from repmatch.store.members import Members
from repmatch.store.removal import Deleted
from repmatch.store.repair import Repaired
from repmatch.store.runs import Run
from repmatch.store.search import Hits, Search
from repmatch.store.staging import Stage, StageSummary
from repmatch.store.store import DEFAULT_PATH, Store, open  # noqa: A004

__all__ = [
    "DEFAULT_PATH",
    "Compacted",
    "Deleted",
    "Finding",
    "Hits",
    "Members",
    "Repaired",
    "Run",
    "Search",
    "Stage",
    "StageSummary",
    "Store",
    "Subset",
    "open",
]
