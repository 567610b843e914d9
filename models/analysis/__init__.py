"""What a network computes: operations, receptive fields, cost, stages, and the report that collects them."""
