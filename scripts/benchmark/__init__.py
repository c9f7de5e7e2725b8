"""The parts of scripts/bench.py. What a worker imports needs nothing but the packages of its engine."""
