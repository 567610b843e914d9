"""Published weight files: read safely, then matched with a network tensor by tensor."""
