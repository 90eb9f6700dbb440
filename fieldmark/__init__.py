"""What the stages, the trainer, the evaluation and the tools share. It imports none of them."""
