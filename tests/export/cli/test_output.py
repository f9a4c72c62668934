"""Tables: titles on a line of their own, whole cells."""

from __future__ import annotations

from flamingo_export.cli.output import results, table


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
