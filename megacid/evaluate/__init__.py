"""Zero-shot and linear-probe evaluation on local sets, and the export for open_clip."""
