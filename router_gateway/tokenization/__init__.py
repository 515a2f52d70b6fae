"""Text to tokens and back. Knows no network and no request."""
