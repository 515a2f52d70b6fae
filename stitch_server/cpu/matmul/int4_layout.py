"""How int4 weights are packed into words of 32 bits. Loads no compiler.

A weight is the least one of its group plus 0 to 15 steps, as in the format Q4_1 of llama.cpp, so that a model which was
stored in that is kept without loss: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

# Inputs of a group, and of a word. The first four are in the lower halves of its bytes, lowest byte first, and the next
# four in the upper halves, so that a mask or a shift makes bytes of four at once.
GROUP = 32
INPUTS = 8
# Words of a group, for each output: its weights, then its step (lower half) and its least weight, both float16.
WORDS = GROUP // INPUTS + 1
# Bits of a number of steps.
BITS = 4
MOST_STEPS = 2**BITS - 1
# The shift of each input in a word.
PLACES = (0, 8, 16, 24, 4, 12, 20, 28)
