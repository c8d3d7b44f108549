"""Figures and the HTML page of one or several runs.

A run and its figures come from :mod:`qaroma.runs`. ``finding`` says in one line what was learned, ``outcome`` how it
ended, ``answers``, ``rank_map``, ``panels`` and ``keyfigures`` what there is to show; ``drawings`` draws it with
matplotlib, ``page`` puts it into one HTML file, ``card_image`` its first card into an image, and ``write`` is
``qaroma report``. ``run_table`` is ``qaroma runs``, ``side_by_side`` is ``qaroma compare-runs``, ``summary`` what a
run prints when it is over. Only ``spectra`` imports torch, only ``drawings``, ``card_image`` and ``style`` matplotlib.
"""
