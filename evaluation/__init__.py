"""What judges: grids of runs, their tables, explanations, and the report. It reads what stages and trainer wrote."""
