"""The verbs, one file or package each, and the rooms that they share."""
