"""The tests mirror the tree; what several of them need lies in conftest.py and networks.py."""
