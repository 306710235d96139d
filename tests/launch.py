"""Runs a command as a terminal would, or within limits of memory and processor time: python launch.py FLAGS COMMAND...

What subprocess leaves to `preexec_fn`, and pty to a fork, is done here in a process that has not used PyTorch.
"""

import argparse
import fcntl
import os
import resource
import signal
import sys
import termios

COMMAND = [sys.executable, "-IS", __file__]  # what stands before the command

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--terminal", action="store_true", help="make standard input the controlling terminal")
    parser.add_argument("--memory", type=int, default=resource.RLIM_INFINITY, help="bytes of address space")
    parser.add_argument("--processor", type=int, default=resource.RLIM_INFINITY, help="seconds of processor time")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    if arguments.terminal:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    resource.setrlimit(resource.RLIMIT_AS, (arguments.memory, arguments.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (arguments.processor, arguments.processor))
    os.execvp(arguments.command[0], arguments.command)
