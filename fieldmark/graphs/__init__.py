"""Graphs between the nodes of one image."""
