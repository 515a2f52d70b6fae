"""The shards behind the gateway: who lives, what each holds, which chain a request gets. Knows no text."""
