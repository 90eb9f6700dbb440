"""What tools/export.py writes for other tools: one module a family of formats."""
