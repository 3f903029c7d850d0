"""The figures of tools/figures.py, one module each: its options (`add_arguments`) and what it writes (`draw`)."""
