"""How a batch is computed: one forward pass, and what decides how it is spread over the device."""
