"""Checks of the path of the images on a GPU."""
