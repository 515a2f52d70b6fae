"""One question a file; `python -m benchmarks` asks all of them. Not installed with the package."""
