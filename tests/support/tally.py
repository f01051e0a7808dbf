"""Counts what a test tries within itself: cases that were drawn, faults that were made. For tests/robustness.py."""

from collections import Counter

tried: Counter[str] = Counter()
