"""One request from arrival to its last token: limits, pipeline, token stream, failover, and what is recorded of it."""
