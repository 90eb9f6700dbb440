"""reef: the bundled demo of fieldmark, 24 invented reef-fish species drawn from a seed.

species   the vocabulary of field marks and the table of species (data/demo/species.yaml)
drawing   one picture of a fish with given field marks, with the boxes of its parts

tools/train_reef_encoder.py makes the small open_clip encoder in data/demo/encoder, tools/train_reef_towers.py two small
encoders of images alone, which the demo does without.
"""
