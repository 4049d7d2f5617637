"""Benchmarks: speed as ratios measured in one run, accuracy as figures, both kept as rows under bench/results."""
