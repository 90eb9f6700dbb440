"""Pictures before any encoder: decoding, the views cut from them, and the health of a whole data set."""
