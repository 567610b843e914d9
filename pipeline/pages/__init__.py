"""HTML pages, charts, and the wording of numbers."""
