"""How a batch is computed: one forward pass, and what chooses its threads, micro-batches, route and CUDA graphs."""
