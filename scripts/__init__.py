"""The commands. Each reads its flags first and imports what it needs afterwards, inside `main` and what `main` calls:
so `--help` and wrong flags are answered at once, before torch loads (tests/test_imports.py).

Ctrl-C while a command loads ends it at once, without a traceback; from run_script on the command handles it.
"""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
