"""The client's protocol: messages in, domain calls, messages out. Knows no shard."""
