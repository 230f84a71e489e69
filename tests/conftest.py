"""Where a shell starts the tests in the background, Ctrl-C is ignored by all that they start: not
here, for some send it."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
