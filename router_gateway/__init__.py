"""The front door of a cluster: judges a query, places it on a chain of shards, streams the answer. Knows no torch."""
