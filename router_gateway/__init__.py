"""The front door of a cluster: routes a request, places it on a chain of shards, and streams the answer. No torch."""
