"""From the Parquet cache to tensors: the parts of it that a method reads, and batches cut out of them.

Each part of the cache (nodes, boxes, moments, labels, edges, texts, descriptions) is a module of this package with one
class: what it is read from, how it is read, what a batch shows of it (`part.py` says what such a class holds).
`read_cache` reads the parts that a method's READS names, and no others; what is not declared cannot be seen.
"""

from training.data.cache import CPU, INDEX, SPLITS, Batch, Cache, Fields, check_origins, files_of, read_cache
from training.data.features import feature_blocks, feature_words, words_behind
from training.data.part import Part, Parts, kind_of, part_kinds, part_words

__all__ = [
    "CPU", "INDEX", "SPLITS", "Batch", "Cache", "Fields", "Part", "Parts",
    "check_origins", "feature_blocks", "feature_words", "files_of", "kind_of", "part_kinds", "part_words", "read_cache",
    "words_behind",
]  # fmt: skip
