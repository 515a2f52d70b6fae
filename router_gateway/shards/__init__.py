"""The shards that the gateway sends sessions to: their state, what they hold, and the chain for a request."""
