"""Parts of scripts/benchmark.py: timing, our loops, and the rivals that they are compared with."""
