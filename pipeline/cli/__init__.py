"""The command line: compose a config, check it, explain mistakes, end with an exit code."""
