"""Analysis of a network: operations, receptive fields, cost, stages, and the report that collects them."""
