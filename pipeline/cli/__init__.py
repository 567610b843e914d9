"""The command line: compose a config, check it, explain what is wrong, end as asked."""
