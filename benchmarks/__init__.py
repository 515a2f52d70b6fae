"""One question a file; `python -m benchmarks` asks all of them. Not installed with the package."""

from stitch.environment import share_cores

# Baselines in this process compute under the same conditions as the shards; it must come before torch is imported.
share_cores()
