"""Strategies that choose a coreset from a kernel: pure functions on arrays."""

from repmatch.selectors import builtin as _builtin  # noqa: F401 -- registers the strategies
from repmatch.selectors.baselines import random, represent, top
from repmatch.selectors.constraints import Constraints, share
from repmatch.selectors.estimators import Selector
from repmatch.selectors.facility import facility_location
from repmatch.selectors.features import FeatureCoverage, Features
from repmatch.selectors.greedy import Objective
from repmatch.selectors.joined import JoinedKernel
from repmatch.selectors.kernels import DenseKernel, FactorKernel, Kernel, as_kernel
from repmatch.selectors.large import partitioned
from repmatch.selectors.medoids import k_medoids
from repmatch.selectors.objectives import (
    Coverage,
    GraphCut,
    LogDeterminant,
    MeanMatch,
    Mixture,
    SaturatedCoverage,
    ScoreSum,
    SetFunction,
)
from repmatch.selectors.registry import Entry, Problem, register, select, strategies, strategy
from repmatch.selectors.selection import Selection
from repmatch.selectors.signed import SignedKernel
from repmatch.selectors.sparse import SparseKernel
from repmatch.selectors.strategies import (
    dpp,
    feature_coverage,
    graph_cut,
    herding,
    k_center,
    maximize,
    saturated_coverage,
    thin,
)
from repmatch.selectors.streaming import sieve_streaming

__all__ = [
    "Constraints",
    "Coverage",
    "DenseKernel",
    "Entry",
    "FactorKernel",
    "FeatureCoverage",
    "Features",
    "GraphCut",
    "JoinedKernel",
    "Kernel",
    "LogDeterminant",
    "MeanMatch",
    "Mixture",
    "Objective",
    "Problem",
    "SaturatedCoverage",
    "ScoreSum",
    "Selection",
    "Selector",
    "SetFunction",
    "SignedKernel",
    "SparseKernel",
    "as_kernel",
    "dpp",
    "facility_location",
    "feature_coverage",
    "graph_cut",
    "herding",
    "k_center",
    "k_medoids",
    "maximize",
    "partitioned",
    "random",
    "register",
    "represent",
    "saturated_coverage",
    "select",
    "share",
    "sieve_streaming",
    "strategies",
    "strategy",
    "thin",
    "top",
]
