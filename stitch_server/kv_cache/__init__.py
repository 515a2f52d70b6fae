"""Where a shard keeps the past of its sessions. Knows no scheduler and no network."""
