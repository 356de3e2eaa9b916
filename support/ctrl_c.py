"""Ctrl-C while a command still imports PyTorch, which takes seconds: one sentence and exit code 130, as later.

    if __name__ == "__main__":                           # above all slow imports, in the file of every command
        from support import ctrl_c
        ctrl_c.answer_early()

support.cli.command takes over as soon as it runs.  Who imports such a file as a library never comes here.  While
Python itself starts, Ctrl-C is still Python's traceback: no line of ours has run by then.
"""
import os
import signal

STOPPED = "stopped; the same command goes on from here, or begins anew where nothing was written"
CODE = 130                              # 128 + SIGINT, as shells have it


def stop(*_) -> None:
    """The sentence, and the end at once: an exception could be taken for a package that cannot be imported."""
    try:
        os.write(2, f"{STOPPED}\n".encode())
    finally:
        os._exit(CODE)


def answer_early() -> None:
    """From now on Ctrl-C is answered by `stop`; where it is to be ignored (`nohup`, `&`), it still is."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def answer_by_exception() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt again: it lets the program close files and end its processes."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
