"""Files that survive a crash: atomic writes, stage metadata, safe .npy I/O."""
