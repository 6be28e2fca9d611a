"""Entry points: training, the quickstart, the paper's tables and figures, analyses and tools."""
