"""What the LLM stages share: prompts, recordings, the item cache, the client, and class names in texts."""
