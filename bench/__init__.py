"""What is measured against peers: ``python -m bench``. See docs/how-to/benchmark.md."""
