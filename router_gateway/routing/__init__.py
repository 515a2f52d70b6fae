"""Which route a request takes, and why: routers, objectives, conversations, predictions of time and cost."""
