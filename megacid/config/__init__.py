"""The run file: its schema, loading, checks, and what DeepSpeed knows."""
