"""Exit codes beside 0 (done), 2 (an error meant for the user) and 130 (interrupted before anything was to be saved)."""

PREEMPTED = 75  # a signal came; the state is saved; start the same command again (EX_TEMPFAIL)
