"""The mathematics of the notes, written out."""
