"""Runs before any test module is imported."""

import os
import sys

# So that `from toys import ...` works in every folder of tests.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

# The detectors here are too small to share among threads, which would only wait for each other;
# also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
