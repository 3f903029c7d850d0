"""Zero-shot and linear-probe evaluation on local sets, and the export that open_clip loads."""
