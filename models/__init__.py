"""Networks and what can be said of them: plain modules that know nothing of files, configs or trackers."""
