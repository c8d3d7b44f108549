"""The base model: where it lies, how it is held in 4 bits, which of its layers an adapter takes.

`base` loads it, `targets` names its linear layers, `builtin` finds it by name. Nothing here knows
of growth, data or the command line; nothing is imported before it is asked for, torch least of all.
"""
