"""OpenAI's API over HTTP: JSON in, messages of the pipeline, JSON or server-sent events out."""
