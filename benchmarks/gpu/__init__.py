"""`make gpu`: build, GPU tests and GPU benchmarks by priority, within a budget of seconds, into one JSON file.

    python -m benchmarks.gpu --budget 540            # on a machine with a GPU; needs nothing outside the repository
    python -m benchmarks.gpu                         # without one: says what it would do

`runner` walks through the list that `plan` makes and writes what `store` keeps; everything that touches the GPU runs in
child processes (`process`, `worker`, `suites`), so that a hang or a lost CUDA context costs one measurement. These
modules need the standard library only; torch is imported by the children.
"""
