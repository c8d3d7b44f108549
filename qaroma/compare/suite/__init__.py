"""``qaroma compare --suite growth``: the default growth against the rank and rate that an oracle would choose.

Beds are tasks small enough for two processor cores (:mod:`.beds`); a cell is one arm on one bed with one
seed (:mod:`.cells`); a table says which cells it still wants, given those that are done (:mod:`.tables`).
"""
