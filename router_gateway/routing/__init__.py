"""Which route a query takes, and why. Knows no shard, no tokens and no request."""
