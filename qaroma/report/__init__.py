"""Figures and the HTML page of one or several runs.

A run and its figures come from :mod:`qaroma.runs`; ``panels`` and ``keyfigures`` say what there is to
show, ``drawings`` draws it with matplotlib, ``page`` puts it into one HTML file, and ``write`` is
``qaroma report``. ``run_table`` is ``qaroma runs``, ``side_by_side`` is ``qaroma compare-runs``, ``summary``
what a run prints when it is over. Only ``spectra`` imports torch, only ``drawings`` and ``style`` matplotlib.
"""
