"""What surrounds the training loop: building, state, guard, metrics, watchdog, signals, resume."""
