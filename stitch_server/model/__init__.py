"""How tokens are computed: weights, layers, embedding, head, stitch, sampler."""
