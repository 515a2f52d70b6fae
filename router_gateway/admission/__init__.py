"""Who may send requests, which of them may start now, and when those that are refused should come back."""
