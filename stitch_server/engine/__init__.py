"""What a shard computes next: requests, sessions, batches and replies, without a tensor of their own."""
