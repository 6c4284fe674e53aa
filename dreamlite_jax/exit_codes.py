"""Exit codes of the commands that a launcher acts on; scripts read the number from this file.

0 done · 1 a defect or a broken machine, with its traceback · 2 bad input, one line on stderr.
"""

PREEMPTED = 75  # EX_TEMPFAIL: stopped by SIGTERM or maintenance, everything saved; the same command goes on
