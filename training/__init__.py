"""The thin trainer: cached tensors in, predictions and numbers out. It never opens a picture or calls a model."""
