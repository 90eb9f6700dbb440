"""Asking a language model: prompts, the client, the journal of answers, batches, recordings and imported texts."""
