"""Tables: titles on a line of their own, whole cells."""

from __future__ import annotations

import json
import os

import numpy as np

from flamingo_export.cli.output import print_json, results, table


def test_a_title_is_not_wrapped_to_its_table(capsys):
    title = ", ".join(["a title of many words"] * 8)
    results().print(table(("a", "b"), [("1", "2")], title=title))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == title
    assert max(len(line) for line in lines[1:]) < 20


def test_markup_in_titles_and_cells_is_text(capsys):
    results().print(table(("a",), [("[red]x[/red]",)], title="[bold]y"))
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert out.startswith("[bold]y\n")


def test_json_has_names_that_are_not_utf8(capsys):
    name = os.fsdecode(b"caf\xe9.png")
    print_json({"file": name, "values": (np.float32(1.5), float("nan")), "by_row": {2: name}})
    found = json.loads(capsys.readouterr().out)
    assert found == {"file": name, "values": [1.5, None], "by_row": {"2": name}}
    assert os.fsencode(found["file"]) == b"caf\xe9.png"
