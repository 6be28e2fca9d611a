"""Command lines: training, the quickstart and the scripts behind the paper's tables."""
