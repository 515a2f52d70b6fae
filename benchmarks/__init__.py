"""One benchmark per file; `python -m benchmarks` runs all of them. Not installed with the package."""

from stitch.environment import share_cores

# Baselines in this process then wait as the shards' threads do; this must precede the import of torch.
share_cores()
