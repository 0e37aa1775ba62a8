"""Starts runs of the trainer as processes of their own, forked from one that has imported everything already.

Orders come on standard input as lines of JSON: `arguments` of the command line, `log` for all that is printed, and
`memory`, bytes that it may have more than now; the answer is the process's id. `wait` for an id is answered by its
status, negative for a signal.
"""

import json
import os
import resource
import sys
from pathlib import Path

from examples.workbench.__main__ import main


def become_a_run(order):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # A group of its own, so that a signal can be sent to all its processes.
    os.setpgid(0, 0)
    if order.get("memory"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + order["memory"],) * 2)
    sys.exit(main(order["arguments"]))


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                become_a_run(order)
        print(answer, flush=True)
