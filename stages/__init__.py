"""The offline half of fieldmark: one module a DVC stage, named by a verb, over shared modules named by nouns."""
