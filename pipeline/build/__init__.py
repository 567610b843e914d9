"""From a config to objects. Below this room nobody reads a config."""
