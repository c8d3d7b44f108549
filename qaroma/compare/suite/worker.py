"""A process that carries out cells: ``python -m qaroma.compare.suite.worker DATA FOLDER``.

It reads one cell as JSON from each line of its input and answers each with a line: empty when the cell
is written, else what went wrong. It ends with its input, so none outlives the command that began it.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from qaroma.compare.suite.beds import Bed, Place, all_beds
from qaroma.compare.suite.cells import Cell, Figures, Results


def main() -> None:
    """Answer until the input ends."""
    data, folder = map(Path, sys.argv[1:3])
    place, results = Place(data, folder / "cache"), Results(folder)
    beds = {bed.name: bed for bed in all_beds()}
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        cell = Cell(**json.loads(line))
        problem = ""
        try:
            results.put(cell, _figures(cell, beds[cell.bed], place))
        except Exception as error:  # one cell that fails must not end the others
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        answers.write(f"{problem}\n")
        answers.flush()


def _figures(cell: Cell, bed: Bed, place: Place) -> Figures:
    import torch

    from qaroma.compare.suite.cost import measure
    from qaroma.compare.suite.trial import carry_out

    torch.set_num_threads(1)
    return measure(cell, bed, place) if cell.cost else carry_out(cell, bed, place)


if __name__ == "__main__":
    main()
