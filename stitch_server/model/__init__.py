"""How tokens are computed: weights, layers, embedding, head, stitch, sampler. Knows no session and no network."""
