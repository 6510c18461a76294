"""RepMatch and its relatives on arrays: how alike are two LoRA factors.

U holds the left singular vectors of ΔW = B·A in torch's (out, in) layout as columns. Sources: Hu et al. 2021, LoRA,
section 7.2 (the subspace similarity φ); Modarres et al. 2024, RepMatch (its maximum over i, j and mean over matrices).
"""

from repmatch.similarity.pairs import Blocks, chance, Floats, grassmann, matrix_scores, orthonormal, repmatch_score
from repmatch.similarity.sets import against, directions_of, kernel_block, mean_projectors, mean_scores, mean_similarity, score_against, score_instance, signed_against, similarity_to

__all__ = [
    "Blocks",
    "Floats",
    "against",
    "chance",
    "directions_of",
    "grassmann",
    "kernel_block",
    "matrix_scores",
    "mean_projectors",
    "mean_scores",
    "mean_similarity",
    "orthonormal",
    "repmatch_score",
    "score_against",
    "score_instance",
    "signed_against",
    "similarity_to",
]
