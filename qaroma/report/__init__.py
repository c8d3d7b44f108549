"""Figures and the HTML page of one or several runs.

``reading`` takes a run directory apart, ``panels``, ``maps`` and ``keyfigures`` say what there is to
show, ``figures`` draws it with matplotlib, ``page`` puts it into one HTML file, and ``write`` is
``qaroma report``. Only ``spectra`` imports torch, only ``figures`` and ``style`` matplotlib.
"""
