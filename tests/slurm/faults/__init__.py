"""Twelve faults against real runs on the real one-machine SLURM, each compared with the run that nothing happened to.

    python -m tests.slurm.faults [--only 1,5] [--program gpt|tokenizer] [--at-once 3]

programs   the two small runs, and a checkout in which their steps take long enough to be interrupted
trial      one run in one folder: launched, watched, waited for
injections the faults
checks     what is wrong with a run afterwards, as sentences
"""
