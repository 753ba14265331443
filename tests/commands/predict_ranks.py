"""Run by test_export_command on each of two ranks: `vcr1-fast predict`, noting which rank writes files of weights.

Arguments: a file to note the ranks in, and those of predict.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vcr1_fast import cli
from vcr1_fast.run import export

if __name__ == "__main__":
    write_tensors, notes = export.write_tensors, Path(sys.argv[1])

    def noted(*arguments: object) -> None:
        with notes.open("a") as file:
            file.write(os.environ["RANK"])
        write_tensors(*arguments)  # type: ignore[arg-type]

    export.write_tensors = noted
    cli.main(["predict", *sys.argv[2:]])
