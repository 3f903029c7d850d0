"""What tools/bench.py measures, one module per suite. See `megacid.benchmarks.suite` for what a suite is."""
