"""Lightning callbacks of every training."""
