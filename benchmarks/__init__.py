"""Every figure of docs/performance.md comes from here: ``python -m benchmarks.<question>``; README.md lists them."""
