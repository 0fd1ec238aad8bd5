"""Problems with verifiable answers; a task of your own is one class.

    base                               what a task is: problem, reward, and what has a default
    digits, arithmetic, expressions    sort, reverse, parity; addition, modular, countdown
    fill_in                            a line missing from program text, multiple choice
    jsonl                              problems of a file, with rewards in any of five kinds
    registry                           by name, by file, or by the place of your class

A few lines verify an answer of the small tasks, and a small model learns them in minutes on a CPU.
They differ in what makes them hard: countdown has many right answers, parity rewards scratch work
by its result alone, fill_in can be guessed.
"""
