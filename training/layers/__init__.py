"""What methods are built of: layers, losses, graph layers, and logistic regression."""
