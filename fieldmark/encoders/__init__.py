"""Encoders of images and texts: loading them, what their maps hold, and how pictures pass through them."""
