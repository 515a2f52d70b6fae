"""One request's life, from its text to the last token. Knows no message of the client's protocol."""
