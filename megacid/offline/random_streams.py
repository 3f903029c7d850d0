"""Names the random streams of the offline stages."""

from enum import IntEnum


class RandomStream(IntEnum):
    """Second word of a `numpy.random.default_rng` seed: separates the streams of one stage's seed.

    The values decide centroids, labels and keep flags: never change one. They are distinct within a stage.
    """

    TRAINING_SAMPLE = 0  # k-means: the rows it trains on
    INITIAL_CENTROIDS = 1
    EMPTY_CLUSTERS = 2  # k-means: directions in which an empty cluster splits the worst one
    CELL = 3  # hierarchical k-means: the seed of a cell
    SEEDING_SAMPLE = 5  # k-means++: the rows distances are measured on
    KEEP_ORDER = 3  # balance: the order of --keep random
    SAMPLED_CLUSTERS = 4  # balance: the clusters of the threshold search
