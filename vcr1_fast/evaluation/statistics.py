"""How far a mean over examples can be trusted, and whether two runs differ: numpy only, no torch.

Questions about one video are not independent, so videos are drawn, not questions (cluster bootstrap; Cameron, Gelbach &
Miller 2008). With one question per video it is the ordinary bootstrap.

Shape letters: E examples, C clusters (videos), B resamples, M metrics.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

NUM_RESAMPLES = 10_000  # the standard error of a 95 % bound is then about 1 % of the interval
CONFIDENCE = 0.95
CHUNK_CELLS = 4_000_000  # resamples x clusters held at once: 32 MB of counts
TIE_TOLERANCE = 1e-12  # sums of the same numbers in another order differ by rounding; these count as ties


def cluster_sums(values_EM: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(sums [C, M], sizes [C]) of the examples of each cluster, in the order in which clusters first appear.

    Raises ValueError when the two differ in length or there is no example.
    """
    if values_EM.ndim != 2 or len(values_EM) != len(clusters) or len(clusters) == 0:
        raise ValueError(f"values have shape {values_EM.shape} for {len(clusters)} clusters, wanted [E, M] with E >= 1")
    number: dict[Hashable, int] = {}
    cluster_E = np.array([number.setdefault(cluster, len(number)) for cluster in clusters])
    sums_CM = np.zeros((len(number), values_EM.shape[1]))
    np.add.at(sums_CM, cluster_E, values_EM)
    return sums_CM, np.bincount(cluster_E).astype(np.float64)


def mean_intervals(
    values_EM: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> np.ndarray | None:
    """Percentile bootstrap interval of each metric's mean, [2, M]: low and high. None with fewer than 2 clusters.

    A resample draws C clusters with replacement; its mean is the sum of all their examples over their number. 10,000
    resamples of 5,000 examples take about 1 s on one core: one matrix product of draw counts with cluster sums.
    """
    sums_CM, sizes_C = cluster_sums(values_EM, clusters)
    num_clusters = len(sizes_C)
    if num_clusters < 2:
        return None
    random = np.random.default_rng(seed)
    table = np.column_stack([sums_CM, sizes_C])
    means = []
    for count in _chunks(num_resamples, num_clusters):
        drawn = random.integers(num_clusters, size=(count, num_clusters), dtype=np.int32)
        drawn += np.arange(count, dtype=np.int32)[:, None] * num_clusters
        counts_BC = np.bincount(drawn.ravel(), minlength=count * num_clusters).reshape(count, num_clusters)
        totals = counts_BC.astype(np.float64) @ table
        means.append(totals[:, :-1] / totals[:, -1:])
    tail = (1.0 - confidence) / 2.0
    return np.quantile(np.concatenate(means), [tail, 1.0 - tail], axis=0)


def sign_flip_p_values(
    differences_EM: np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0, num_flips: int = NUM_RESAMPLES
) -> np.ndarray:
    """Two-sided p of "the two runs are alike", [M], by the paired permutation test (Fisher 1935; Good 2005).

    If neither run is better, each video's difference is as likely to have the other sign. p is the share of sign
    choices whose |sum of differences| reaches the one seen: over all 2^C choices where these are no more than
    `num_flips`, else over random ones with the one seen added, (1 + reached) / (1 + num_flips), so that p is never 0.
    """
    sums_CM, _ = cluster_sums(differences_EM, clusters)
    num_clusters = len(sums_CM)
    seen_M = np.abs(sums_CM.sum(axis=0)) - TIE_TOLERANCE * np.abs(sums_CM).sum(axis=0)
    if 2**num_clusters <= num_flips:
        choices = np.arange(2**num_clusters)[:, None] >> np.arange(num_clusters) & 1
        flipped = (2.0 * choices - 1.0) @ sums_CM
        return (np.abs(flipped) >= seen_M).mean(axis=0)
    random = np.random.default_rng(seed)
    reached_M = np.zeros(sums_CM.shape[1])
    for count in _chunks(num_flips, num_clusters):
        signs_BC = 2.0 * random.integers(2, size=(count, num_clusters), dtype=np.int8) - 1.0
        reached_M += (np.abs(signs_BC @ sums_CM) >= seen_M).sum(axis=0)
    return (1.0 + reached_M) / (1.0 + num_flips)


def _chunks(total: int, num_clusters: int) -> list[int]:
    """Sizes of the parts in which resamples are drawn; the same numbers come out whatever they are used for."""
    size = max(1, CHUNK_CELLS // num_clusters)
    return [min(size, total - start) for start in range(0, total, size)]
