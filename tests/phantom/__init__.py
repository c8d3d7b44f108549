"""qaroma's GPU path on a card that is not there.

torch's CPU build carries fake tensors (shapes without values) on device ``cuda`` through forward and backward passes,
once a device guard that does nothing stands in the place of CUDA's (``guard.cpp``). On top of it :mod:`phantom.card`
watches every operation: what mixes devices, what makes the host wait, which streams race, what is freed too early,
how many kernels run. ``python -m phantom`` runs the scenarios in a process of its own, since the guard must be
loaded before torch; ``test_phantom.py`` says what is expected of each.
"""
