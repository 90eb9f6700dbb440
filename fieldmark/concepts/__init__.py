"""Concepts as texts and vectors: names in texts, what a photo can show, which to keep, whether they say anything."""
