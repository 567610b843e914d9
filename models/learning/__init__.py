"""Lightning modules, recipes and training metrics."""
