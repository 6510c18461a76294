"""The words of repmatch as frozen dataclasses: spaces, rows, factors, adapters, coresets.

Nothing here computes anything that needs torch or the store; arrays are numpy.
"""

from repmatch.datamodels.digests import canonical_json, digest
from repmatch.datamodels.factors import FactorBatch, Factors
from repmatch.datamodels.results import Adapter, Coreset
from repmatch.datamodels.rows import BadRow, Dataset, Fields, Row
from repmatch.datamodels.spaces import ENCODINGS, Encoding, Layout, Matrix, Space

__all__ = [
    "ENCODINGS",
    "Adapter",
    "BadRow",
    "Coreset",
    "Dataset",
    "Encoding",
    "FactorBatch",
    "Factors",
    "Fields",
    "Layout",
    "Matrix",
    "Row",
    "Space",
    "canonical_json",
    "digest",
]
