"""A process that carries out cells: ``python -m qaroma.compare.suite.worker DATA FOLDER``.

It reads one cell as JSON from each line of its input and answers each with a line: empty when the cell
is written, else what went wrong. It ends with its input, in the midst of a cell too, so none outlives the command that
began it: however that ends, the system closes its end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from queue import Queue

from qaroma.compare.suite.beds import Bed, Place, all_beds
from qaroma.compare.suite.cells import Cell, Figures, Results


def main() -> None:
    """Answer until the input ends."""
    data, folder = map(Path, sys.argv[1:3])
    place, results = Place(data, folder / "cache"), Results(folder)
    beds = {bed.name: bed for bed in all_beds()}
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    lines: Queue[str] = Queue()
    threading.Thread(target=_take_in, args=(lines,), daemon=True).start()
    while True:
        line = lines.get()
        cell = Cell(**json.loads(line))
        problem = ""
        try:
            results.put(cell, _figures(cell, beds[cell.bed], place))
        except Exception as error:  # one cell that fails must not end the others
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        answers.write(f"{problem}\n")
        answers.flush()


def _take_in(lines: Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # a cell is written whole or not at all


def _figures(cell: Cell, bed: Bed, place: Place) -> Figures:
    import torch

    from qaroma.compare.suite.cost import measure
    from qaroma.compare.suite.trial import carry_out

    torch.set_num_threads(1)
    return measure(cell, bed, place) if cell.cost else carry_out(cell, bed, place)


if __name__ == "__main__":
    main()
