"""Commands that are no stage of the pipeline, one module each; `python -m tools.NAME --help` says what it does."""
