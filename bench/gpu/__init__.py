"""The GPU run-book: `make gpu`, or `python -m bench.gpu`; docs/gpu.md says how to run and read it.

main.py      the command line: stages in order, each in a process of its own with a time limit
child.py     that process, and the workers that check a kernel or a variant before it is timed
stages.py    the list of stages, and which call each belongs to
state.py     what is done in a folder of results
record.py    the JSON files
device.py    the only place that knows whether this is a GPU or a dry run; the timer
pool.py      jobs in worker processes: a crash costs one job
checks.py    stages build, doctor, tests, sanitizer
cases.py     kernels and the passes they replace, as cases; kernels.py: the stage
nets.py      networks and their variants; stages train, inference, autotune, memory
probes.py    stages cudnn, tune
numbers.py   what the issues ask of a card, from the rows
page.py      the files as sections of docs/benchmarks.md
"""
