"""
Token pruning, the paper's future work and SparseVILA's: keep some image tokens, read back some.

    python -m tools.experiments pruning

`keep` prunes by salience in the tower, before the language model reads: for good. `retrieve` lets
the reasoning read back the share of the image tokens that its prompt attends to most; the cache
keeps all. A row without training is the first row's model, told to prune.
"""
from tools.experiments import vision
from tools.experiments.vision import Way, compare_ways, encoder_table

ABOUT = "SparseVILA's: image tokens kept, and read back"
NEEDS = "not timed yet"
WAYS = [
    Way("all tokens"),
    *(Way(f"keep {keep}", switches={"keep": keep}) for keep in (0.75, 0.5, 0.25, 0.1)),
    *(Way(f"keep {keep}, trained with it", f"--keep {keep}") for keep in (0.5, 0.25)),
    *(Way(f"retrieve {share}", switches={"retrieve": share}) for share in (0.5, 0.25, 0.1)),
    Way("keep 0.5, retrieve 0.5", switches={"keep": 0.5, "retrieve": 0.5}),
]
add_flags = vision.add_training_flags


def measure(args):
    """{row: numbers}, see vision.py; what is missing is trained first."""
    return compare_ways(WAYS, args)


def text(rows, settings):
    """The table."""
    return f"{encoder_table(rows)}\n\n{vision.note_of(settings)}"
