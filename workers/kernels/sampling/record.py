"""The record of sampling settings that a resident row has on the device: its layout. Imports nothing.

    word   0      1  2      3, 4    5, 6   7, 8       9          10          11         12        13 ..
    what   flags  T  top_k  stream  top_p  log min_p  stop_from  repetition  frequency  presence  free

T and the penalties are float32, top_p and log min_p float64 in two words, the noise stream uint64 in two words, low first.
`workers.sampling.settings` fills it, `sample` reads it by these numbers.
"""

WORDS = 16
FLAGS, TEMPERATURE, TOP_K, STREAM, TOP_P, LOG_MIN_P, STOP_FROM, REPETITION, FREQUENCY, PRESENCE = (
    0, 1, 2, 3, 5, 7, 9, 10, 11, 12,
)  # fmt: skip

SAMPLED = 1
"""Flags. Not greedy: the noise counts."""
HAS_TOP_K = 2
HAS_TOP_P = 4
HAS_MIN_P = 8
BIASED = 16
STOPS_BARRED = 32
PENALISED = 64
CONSTRAINED = 128
