"""The packing of int4 weights into words of 32 bits. Imports nothing, so that reading a constant needs no Numba.

A weight is the least one of its group plus 0 to 15 steps, as in the format Q4_1 of llama.cpp, so a model that was
stored in that format is kept without loss: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

# Inputs of a group, and of a word. The first four inputs are in the lower halves of the word's bytes, lowest byte
# first, and the next four in the upper halves, so that a mask or a shift makes bytes of four at once.
INT4_GROUP = 32
INT4_WORD_INPUTS = 8
# Words of a group, for each output: its weights, then its step (lower half) and its least weight, both float16.
INT4_WORDS = INT4_GROUP // INT4_WORD_INPUTS + 1
INT4_BITS_PER_GROUP = 32 * INT4_WORDS
# Bits of a number of steps.
INT4_BITS = 4
INT4_MAX_STEPS = 2**INT4_BITS - 1
# The shift of each input in a word.
INT4_SHIFTS = (0, 8, 16, 24, 4, 12, 20, 28)
