"""Published weight files: read safely, matched with our networks tensor by tensor."""
