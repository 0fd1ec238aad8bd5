"""Reward functions that need not be trusted: each call in a confined process of its own.

    outside the walls   sandbox (the trainer's end) -> keeper (judges) -> outcomes, verdict
    at the walls        zygote (forks) -> walls: namespaces, landlock, filter, through kernel
    behind the walls    calls

Foreign code is two things here: a reward function from a file of problems, and the program that a
model wrote. Neither is believed, and the second never shares a process with the answer that it is
to produce.
"""
