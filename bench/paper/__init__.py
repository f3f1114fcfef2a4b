"""The experiments of arXiv 2410.19206, re-run at small scale."""
