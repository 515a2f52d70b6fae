"""What a shard computes next, and with what. Knows no network and, but for `runner`, no tensor."""
