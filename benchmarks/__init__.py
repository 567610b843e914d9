"""Measurements beside peers, interleaved in one run; what they printed lies in README.md."""
