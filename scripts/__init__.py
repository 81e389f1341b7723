"""The commands. Ctrl-C while they load ends them at once, without a traceback; from run_script on it is theirs."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
