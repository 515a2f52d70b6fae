"""What learned routers share: labels, figures, thresholds. Knows neither text nor hidden states."""
