"""How weights in four bits lie in words of 32. Loads no compiler.

A weight is the least one of its group plus 0 to 15 steps, as in the format Q4_1 of llama.cpp, so that a model which was
stored in that is kept without loss: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

# Inputs of a group, and those of a word. Steps of its first four are the lower halves of its bytes, lowest byte first,
# and those of the next four the upper halves, so that both become bytes at once.
GROUP = 32
INPUTS = 8
# Of a group for each output: its weights, and last its step, in the lower half, and its least weight, both of float16.
WORDS = GROUP // INPUTS + 1
# Of a number of steps.
BITS = 4
MOST_STEPS = 2**BITS - 1
# Where in a word those of each of its inputs begin.
PLACES = (0, 8, 16, 24, 4, 12, 20, 28)
